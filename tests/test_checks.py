"""What arguments may be: every refusal names who, what, what was got and what is expected."""

import contextlib
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import regard
from regard.checks import checked, choice, divides, fits, number, refuse, tokens, whole
from regard.masks import Mask, causal
from regard.shapes import head_shape

FORM = re.compile(r"^[\w: .']+: \S.* \(got .+\); expected .+$", re.S)
"""who: name what is wrong (got ...); expected ..."""


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-3, ValueError), (True, TypeError), (2.0, TypeError), ("4", TypeError), (None, TypeError)],
)
def test_whole(value, error):
    with pytest.raises(error, match=r"^Layer: size .*; expected an int >= 1$") as caught:
        whole("Layer", size=value)
    assert FORM.match(str(caught.value))
    whole("Layer", 0, size=0, other=7)


def test_what_was_got_is_cut_where_it_is_long():
    for ask in (lambda: choice("Layer", ("a",), kernel="x" * 10_000), lambda: regard.create("y" * 3_000, dim=8)):
        with pytest.raises(ValueError, match=r"is unknown \(got '[xy]+\.\.\.\); expected ") as caught:
            ask()
        assert FORM.match(str(caught.value))
        assert len(str(caught.value)) < 700


def test_whole_between():
    whole("Layer", 2, most=4, n=4)
    with pytest.raises(ValueError, match=r"Layer: n is too large \(got 5\); expected an int from 2 to 4"):
        whole("Layer", 2, most=4, n=5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.0, 2])
def test_number_out_of_range(value):
    with pytest.raises(ValueError, match=r"Layer: p is out of range .* expected a finite number >= 0 and < 1"):
        number("Layer", least=0, below=1, p=value)


@pytest.mark.parametrize("value", ["0.5", None, True, torch.tensor(0.5)])
def test_number_of_the_wrong_type(value):
    with pytest.raises(TypeError, match="Layer: p has the wrong type"):
        number("Layer", least=0, p=value)


def test_number_bounds():
    number("Layer", least=0, most=1, p=0, q=1, r=0.5)
    number("Layer", above=0, p=1e-9)
    with pytest.raises(ValueError, match="expected a finite number > 0"):
        number("Layer", above=0, p=0)


def test_choice():
    choice("Layer", ("softmax", "relu"), kernel="relu")
    with pytest.raises(
        ValueError, match=r"Layer: kernel is unknown \(got 'sofmax'\); expected one of 'softmax', 'relu'; did"
    ):
        choice("Layer", ("softmax", "relu"), kernel="sofmax")


def test_divides():
    divides("Layer", num_heads=3, dim=12)
    for n in (5, 0):
        with pytest.raises(ValueError, match=rf"Layer: dim is no multiple of num_heads = {n} \(got 12\)"):
            divides("Layer", num_heads=n, dim=12)


def test_refuse_names_a_module_by_its_mechanism():
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^Linear: x is wrong"):
        refuse(module, "x", "is wrong", 1, "2")
    module.name = "kerple"
    with pytest.raises(TypeError, match=r"^kerple: x is wrong"):
        refuse(module, "x", "is wrong", 1, "2", error=TypeError)


def test_head_shape():
    assert vars(head_shape(12, 4, 2)) == {"dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 3}
    assert head_shape(10, 4, head_dim=8).head_dim == 8
    for given, words in (((10, 4), "dim is no multiple"), ((12, 4, 3), "num_heads is no multiple of num_kv_heads = 3")):
        with pytest.raises(ValueError, match=words):
            head_shape(*given)


# --- axis strings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape", "good"),
    [
        ("B T M", (2, 3, 4), True),
        ("B T M", (2, 3), False),
        ("B T M", (2, 3, 5), False),
        ("B T B", (2, 3, 2), True),
        ("B T B", (2, 3, 4), False),
        ("#B T", (1, 3), True),
        ("*b M", (4,), True),
        ("*b M", (7, 6, 5, 4), True),
        ("*b M", (), False),
        ("B *sizes M", (2, 4), True),
        ("B *sizes M", (2, 9, 9, 4), True),
        ("... M", (3, 4), True),
        ("_ M", (9, 4), True),
        ("2 M", (2, 4), True),
        ("2 M", (3, 4), False),
        ("T+1 M", (9, 4), True),
        ("", (), True),
        ("", (1,), False),
    ],
)
def test_fits(axes, shape, good):
    """M is known to be 4."""
    x = torch.zeros(shape)
    if good:
        fits("f", axes, {"M": 4}, x=x)
        return
    with pytest.raises(ValueError, match=re.escape(f"f: x has the wrong shape (got {shape})")):
        fits("f", axes, {"M": 4}, x=x)


def test_fits_learns_letters_and_broadcasts():
    assert fits("f", "B T", x=torch.zeros(2, 3), y=torch.zeros(2, 3)) == {"B": 2, "T": 3}
    with pytest.raises(ValueError, match=r"f: y has the wrong shape \(got \(2, 4\)\); expected \(B = 2, T = 3\)"):
        fits("f", "B T", x=torch.zeros(2, 3), y=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"expected \(1 or B = 5, T\)"):
        fits("f", "#B T", {"B": 5}, x=torch.zeros(2, 3))


@checked()
def function(
    q: Float[Tensor, "B T D"],
    k: Float[Tensor, "B S D"],
    index: Int[Tensor, " B"] | None = None,
    *,
    keep: Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | Mask | None = None,
    free: Tensor | None = None,
) -> Float[Tensor, "B T S"]:
    """Products."""
    return q @ k.mT


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    @checked(M="dim")
    def forward(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S M"] | None = None
    ) -> Float[Tensor, "B T M"]:
        return x if context is None else x + context.mean(1, keepdim=True)


def test_checked_functions():
    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    assert function(q, k).shape == (2, 3, 5)
    assert function(q, k=k, keep=torch.ones(2, 5, dtype=torch.bool)).shape == (2, 3, 5)
    assert function(q, k, keep=torch.ones(2, 1, 1, 5, dtype=torch.bool), free=torch.zeros(9)).shape == (2, 3, 5)
    assert function(q, k, torch.zeros(2, dtype=torch.long), keep=causal()).shape == (2, 3, 5)
    assert function.__doc__ == "Products."


Q, K, KEEP = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": K[..., :3]}, ValueError, r"k has the wrong shape \(got \(2, 5, 3\)\); expected \(B = 2, S, D = 4\)"),
        ({"k": torch.zeros(1, 5, 4)}, ValueError, "k has the wrong shape"),
        ({"q": torch.zeros(3, 4)}, ValueError, r"q has the wrong shape \(got \(3, 4\)\); expected \(B, T, D\)"),
        ({"q": Q.long()}, TypeError, "q has the wrong dtype .*torch.int64.* floating point"),
        ({"q": np.zeros((2, 3, 4))}, TypeError, r"q has the wrong type \(got ndarray\); expected a Tensor \(B, T, D\)"),
        ({"q": [[1.0]]}, TypeError, "q has the wrong type .got list."),
        ({"q": None}, TypeError, "q has the wrong type .got NoneType."),
        ({"index": torch.zeros(2)}, TypeError, "index has the wrong dtype .*integers"),
        ({"index": torch.zeros(3, dtype=torch.long)}, ValueError, "index has the wrong shape"),
        ({"keep": KEEP[:, :4]}, ValueError, r"keep .*\(B = 2, S = 5\) or \(B = 2, 1, 1, S = 5\)"),
        ({"keep": torch.ones(2, 5)}, TypeError, r"keep has the wrong dtype .*; expected torch.bool$"),
        ({"keep": "all"}, TypeError, "keep has the wrong type .got str.; expected a Tensor .* or Mask"),
    ],
)  # fmt: skip
def test_checked_refuses(change, error, words):
    given = {"q": torch.zeros(2, 3, 4), "k": torch.zeros(2, 5, 4), **change}
    with pytest.raises(error, match="^function: " + words) as caught:
        function(**given)
    assert FORM.match(str(caught.value))


def test_checked_methods():
    layer = Layer(4)
    x = torch.zeros(2, 3, 4)
    assert layer(x, None).shape == x.shape
    with pytest.raises(ValueError, match=r"^Layer: x .* expected \(B, T, M = 4\)"):
        layer(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"^Layer: context .* expected \(B = 2, S, M = 4\)"):
        layer(x, torch.zeros(3, 3, 4))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        layer()
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
        function(x, x, None, None)


def test_checked_is_transparent_to_torch():
    """It compiles to one graph, over free lengths, and works under vmap, on meta tensors and on fake ones."""
    layer = Layer(4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for length in (3, 5, 8):
        assert compiled(torch.zeros(2, length, 4), torch.zeros(2, 3, 4)).shape == (2, length, 4)
    assert torch.vmap(layer)(torch.zeros(5, 2, 3, 4)).shape == (5, 2, 3, 4)
    assert layer(torch.zeros(2, 3, 4, device="meta")).is_meta
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(layer, (torch.zeros(2, 6, 4),), dynamic_shapes={"x": {1: length}})
    assert exported.module()(torch.zeros(2, 9, 4)).shape == (2, 9, 4)


def test_tokens():
    tokens("f", "x", torch.zeros(1, 2, 3), 3)
    with pytest.raises(
        ValueError, match=r"f: context has the wrong shape \(got \(1, 2, 3\)\); expected \(B, T, M = 4\)"
    ):
        tokens("f", "context", torch.zeros(1, 2, 3), 4)


def unusual() -> "dict[str, tuple[torch.Tensor, str]]":
    x = torch.ones(1, 2, 4, 8)
    ragged = [torch.ones(2, 4, 8), torch.ones(2, 3, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(ragged)
        jagged = torch.nested.nested_tensor(ragged[:1], layout=torch.jagged)
        csr = torch.eye(8).to_sparse_csr()
    return {
        "coo": (x.to_sparse(), r"is sparse \(got torch.sparse_coo\); expected a dense tensor, {}.to_dense\(\)"),
        "csr": (csr, r"is sparse \(got torch.sparse_csr\)"),
        "csc": (csr.to_sparse_csc(), r"is sparse \(got torch.sparse_csc\)"),
        "nested": (nested, "is nested .* torch.nested.to_padded_tensor"),
        "jagged": (jagged, "is nested .* torch.nested.to_padded_tensor"),
        "float8": (x.to(torch.float8_e4m3fn), r"has the wrong dtype \(got torch.float8_e4m3fn\); .* {}.float\(\)"),
        "numpy": (x.numpy(), r"has the wrong type \(got ndarray\); .*; torch.as_tensor\({}\) makes one of it"),
    }


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "nested", "jagged", "float8", "numpy"])
def test_tensors_that_nothing_computes_with_are_refused_in_words(kind: str) -> None:
    """Wherever they are handed in: the function, layers of both kinds, maps, the drop-in; under the argument's name."""
    from regard.integrations.torch_mha import MultiheadAttention

    given, said = unusual()[kind]
    x = torch.ones(1, 4, 8)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("q", lambda: regard.attention(given, given, given)),
        ("v", lambda: regard.attention(x[None], x[None], given)),
        *(
            ("x", lambda name=name: regard.create(name, dim=8, num_heads=2)(given))  # type: ignore[misc]
            for name in ("softmax", "linear", "polarized", "efficient_probing")
        ),
        ("value", lambda: MultiheadAttention(8, 2, batch_first=True)(x, x, given)),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"{name} " + said.format(name)):
            call()


def test_a_number_in_an_array_says_how_it_gets_out() -> None:
    q = torch.ones(1, 2, 4, 8)
    for scale, whose in ((np.float32(0.5), "numpy's"), (torch.tensor(0.5), "the tensor's")):
        with pytest.raises(TypeError, match=rf"attention: scale has the wrong type .* as {whose} \.item\(\) gives"):
            regard.attention(q, q, q, scale=scale)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dim has the wrong type .* as numpy's \.item\(\) gives"):
        regard.create("softmax", dim=np.int64(8), num_heads=2)
    with pytest.raises(TypeError, match=r"dropout has the wrong type \(got True\)"):
        regard.attention(q, q, q, dropout=True)


@pytest.mark.parametrize("true", [True, False])
def test_masks_of_other_ranks_and_of_numbers_are_refused_with_the_call_that_works(true: bool) -> None:
    """The call that the message shows is run, and does what it says."""
    q = torch.randn(3, 2, 4, 8)
    pairs, keys = torch.ones(4, 4).tril().bool(), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    each = pairs.expand(3, 4, 4)
    for given, wanted in ((pairs, regard.masks.dense(pairs)), (keys, regard.masks.padding(keys)), (each, pairs)):
        mask = given if true else given.long()
        with pytest.raises((ValueError, TypeError), match="mask has ") as caught:
            regard.attention(q, q, q, mask=mask)
        calls = re.findall(r"((?:regard\.masks\.padding\()?mask[.\w()]*(?:\[[^\]]*\])?\)?) if ", str(caught.value))
        assert len(calls) == 2
        wanted = regard.masks.dense(pairs) if given is each else wanted
        expected = regard.attention(q, q, q, mask=wanted)
        found = []
        for call in calls:
            with contextlib.suppress(ValueError):  # the other reading does not fit
                found.append(regard.attention(q, q, q, mask=eval(call, {"mask": mask, "regard": regard})))
        assert any(torch.equal(expected, y) for y in found)
    with pytest.raises(TypeError, match=r'pass keep.bool\(\) if 1 means "may be seen"'):
        regard.masks.padding(keys.long())


def test_torchs_names_for_causality_point_to_this_ones() -> None:
    q = torch.ones(1, 2, 4, 8)
    for name in ("causal", "is_causal"):
        with pytest.raises(TypeError, match=r"mask=regard\.masks\.causal\(\)"):
            regard.attention(q, q, q, **{name: True})
    with pytest.raises(TypeError, match="did you mean 'causal'"):
        regard.Attention(8, 2, is_causal=True)

"""Combiner against loops over every token and region and the authors' numbers (B116); who sees whom, and what it costs.

The loops in naive_combiner.py are by an author who has read neither the code nor this test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from mixers.naive_combiner import attend, combiner
from regard.inspect import effective_weights
from regard.laws.agreement import close
from regard.mixers.combiner import Combiner, combiner_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B116.npz"
PATTERNS = ("fixed", "logsparse", "axial", "rowmajor")


def build(dim: int = 6, num_heads: int = 2, *, causal: bool = True, **options) -> Combiner:
    torch.manual_seed(0)
    return regard.create("combiner", dim=dim, num_heads=num_heads, causal=causal, **options).double()


def weights(layer: Combiner) -> dict[str, Tensor]:
    """The layer's parameters in the authors' order of axes."""
    H, D = layer.num_heads, layer.head_dim
    names = {"Wq": layer.q_proj, "Wk": layer.k_proj, "Wv": layer.v_proj}
    found = {name: proj.weight.T.unflatten(1, (H, D)) for name, proj in names.items()}
    found["Wo"] = layer.o_proj.weight.T.unflatten(0, (H, D))
    if layer.pattern == "rowmajor":
        norm = (layer.row_norm.weight, layer.row_norm.bias)
        o, k = layer.row_o_proj.weight.T, layer.row_k_proj.weight.T
        found["rowmajor"] = (o.unflatten(0, (H, D)), k.unflatten(1, (H, D)), *norm)  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_authors_numbers(pattern: str) -> None:
    numbers = {
        k.removeprefix(pattern + "_"): torch.tensor(z) for k, z in np.load(VECTORS).items() if k.startswith(pattern)
    }
    layer = build(pattern=pattern, segment=None if pattern == "logsparse" else 4)
    with torch.no_grad():
        for name, z in weights(layer).items():
            if name != "rowmajor":
                z.copy_(numbers[name])
            else:
                for own, key in zip(z, ("O2", "K2", "lnw", "lnb"), strict=True):
                    own.copy_(numbers[key])
    x = numbers["x"].requires_grad_()
    out = layer(x)
    close(out.detach(), numbers["out"])
    grads = torch.autograd.grad((out * numbers["w"]).sum(), [x, layer.k_proj.weight])
    close(grads[0], numbers["grad_x"])
    close(grads[1].T.unflatten(1, (2, 3)), numbers["grad_Wk"])


@pytest.mark.parametrize(
    ("options", "T"),
    [
        ({"pattern": "fixed", "segment": 3, "pool": "mean"}, 9),
        ({"pattern": "fixed", "segment": 4, "pool": "sum", "causal": False}, 8),
        ({"pattern": "fixed"}, 9),
        ({"pattern": "logsparse"}, 9),
        ({"pattern": "logsparse", "pool": "mean"}, 6),
        ({"pattern": "axial", "segment": 2}, 8),
        ({"pattern": "axial", "pool": "sum"}, 9),
        ({"pattern": "axial", "pool": "mean", "segment": 4}, 4),
        ({"pattern": "rowmajor", "segment": 2}, 6),
    ],
)
def test_equals_the_loops(options: dict, T: int) -> None:
    """Values and all gradients; with the default segment, T is a square."""
    layer = build(**options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    x = torch.randn(1, T, 6, dtype=torch.float64, requires_grad=True)
    about = {"pattern": layer.pattern, "w": layer.segment or round(T**0.5), "pool": layer.pool, "causal": layer.causal}
    got, want = layer(x), combiner(x, **weights(layer), **about)
    close(got.detach(), want.detach())
    leaves, direction = [x, *layer.parameters()], torch.randn(got.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((z * direction).sum(), leaves) for z in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_a_short_last_segment_is_that_of_a_longer_text() -> None:
    """Where lengths are no multiple: causal patterns are cut off, and bidirectional regions hold real tokens alone."""
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    for pattern in PATTERNS:
        layer = build(pattern=pattern, segment=4)
        for T in (1, 2, 5, 7, 11):
            close(layer(x[:, :T]).detach(), layer(x)[:, :T].detach())
    layer, keep = build(segment=4, causal=False), torch.arange(12).expand(2, -1) < 7
    close(layer(x[:, :7]).detach(), layer(x, mask=keep)[:, :7].detach())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_tokens_change_nothing(pattern: str) -> None:
    """Wherever they stand, in the middle of rows too."""
    layer, x = build(pattern=pattern, segment=4), torch.randn(2, 12, 6, dtype=torch.float64)
    keep = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    other = torch.where(keep[..., None], x, 100.0)
    assert torch.equal(layer(other, mask=keep)[keep], layer(x, mask=keep)[keep])


def effective(layer: Combiner, T: int) -> Tensor:
    x = torch.randn(1, T, layer.dim, dtype=torch.float64)
    return effective_weights(layer, x)[0].detach()


@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_every_earlier_token_has_a_weight(pattern: str) -> None:
    """Also the last of 2^n + 1, and rows sum to 1. The loops say the same of theirs."""
    for T in (9, 16, 17):
        found = effective(build(pattern=pattern, segment=4), T)
        past = torch.ones(T, T).tril().bool()
        assert found[:, past].min() > 0
        assert not found[:, ~past].any()
        close(found.sum(-1), torch.ones(2, T, dtype=torch.float64))
    q, k, v = torch.randn(3, 1, 2, 16, 3, dtype=torch.float64)
    out = combiner_attention(q, k, v, pattern=pattern, segment=4)  # type: ignore[arg-type]
    want = [attend(q[0, h] * 3**-0.5, k[0, h], v[0, h], pattern, 4)[0] for h in range(2)]
    close(out[0], torch.stack(want))


def test_rows_as_wholes_reach_every_later_token() -> None:
    """With "rowmajor" values shape keys, so that no matrix of weights says all."""
    layer, x = build(pattern="rowmajor", segment=4), torch.randn(1, 12, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)[:, :, 0]
    assert torch.equal(jacobian.ne(0).any(-1).any(1), torch.ones(12, 12).tril().bool())


def test_far_tokens_share_their_weight() -> None:
    """All later queries see the tokens of a segment in the same proportions: that is what makes it cheap."""
    found = effective(build(segment=4), 16)
    assert found[:, 15, :4].min() > 0
    for start in (0, 4):
        shares = found[:, start + 4 :, start : start + 4]
        shares = shares / shares.sum(-1, keepdim=True)
        close(shares, shares[:, :1].expand_as(shares))
        assert shares.std(-1).min() > 1e-3, "they are not all alike"


class Watch(TorchDispatchMode):
    """How large the tensors are that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        self.largest = max([self.largest, *(t.numel() for t in leaves if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_square_matrix(pattern: str) -> None:
    T, layer = 1024, build(pattern=pattern, num_heads=1, dim=4).float()
    with Watch() as watch, torch.no_grad():
        layer(torch.randn(1, T, 4))
    assert watch.largest <= T * (12 if pattern == "logsparse" else 5 * 32)


@pytest.mark.parametrize("options", [{"segment": 4}, {"segment": 1}, {"segment": 30}, {"pattern": "logsparse"}])
@pytest.mark.parametrize("chunks", [[1] * 17, [5, 3, 4, 5], [8, 9]])
def test_steps_give_what_the_whole_gives(options: dict, chunks: list[int]) -> None:
    layer, x = build(**options), torch.randn(2, 17, 6, dtype=torch.float64)
    keep = torch.rand(2, 17, generator=torch.Generator().manual_seed(3)) < 0.7
    state, parts, at = layer.init_state(2, 17), [], 0
    for n in chunks:
        out, state = layer.step(x[:, at : at + n], state, mask=keep[:, at : at + n])
        parts.append(out)
        at += n
    close(torch.cat(parts, 1)[keep].detach(), layer(x, mask=keep)[keep].detach())
    if layer.segment == 4:
        assert (state.k.shape[2], state.regions.key.shape[2]) == (1, 4)


def test_starts_and_shapes() -> None:
    plain, row = build(), build(pattern="rowmajor")
    assert sorted(dict(plain.named_parameters())) == [f"{n}_proj.weight" for n in "koqv"]
    assert {"row_o_proj.weight", "row_k_proj.weight", "row_norm.bias"} < dict(row.named_parameters()).keys()
    assert row.row_norm.eps == 1e-6
    wide = build(dim=7, num_heads=2, head_dim=4, num_kv_heads=1, pattern="rowmajor", bias=True)
    assert wide(torch.randn(1, 0, 7).double()).shape == (1, 0, 7)
    assert wide(torch.randn(1, 5, 7).double()).shape == (1, 5, 7)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"causal is off, and pattern 'axial' looks back \(got False\)"):
        build(causal=False, pattern="axial")
    with pytest.raises(ValueError, match=r"pattern is unknown \(got 'log'\)"):
        build(pattern="log")
    with pytest.raises(ValueError, match=r"pool is unknown \(got 'min'\)"):
        build(pool="min")
    with pytest.raises(ValueError, match=r"segment is too small \(got 0\)"):
        build(segment=0)
    with pytest.raises(ValueError, match=r"pattern has no streaming form \(got rowmajor\)"):
        build(pattern="rowmajor", segment=4).init_state(1, 4)
    with pytest.raises(ValueError, match=r"segment follows the length, .*\(got None\); expected an int"):
        build().init_state(1, 4)
    q = torch.randn(1, 2, 4, 3)
    with pytest.raises(ValueError, match=r"pattern is unknown \(got 'rowmajor'\)"):
        combiner_attention(q, q, q, pattern="rowmajor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="causal is off, and 'axial' looks back"):
        combiner_attention(q, q, q, pattern="axial", causal=False)

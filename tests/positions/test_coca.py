"""CoCA against loops by one who saw a summary only, neither code nor test (naive_coca.py), and the authors' numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from positions import naive_coca as naive
from positions.naive import close, vectors
from regard import masks
from regard.positions.coca import Collinear, coefficients

H, D, M = 2, 6, 12


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options: Any) -> regard.Attention:
    made = regard.create("coca", dim=M, num_heads=H, **{"causal": True, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.6 * normal(n, *p.shape))
    return made


def weights(made: regard.Attention) -> list[Tensor]:
    return [getattr(made, f"{name}_proj").weight for name in "qkvo"]


def same(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    """Values and gradients."""
    close(got, want)
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scaled", [{}, {"scaling": "linear", "factor": 3.0}], ids=str)
@pytest.mark.parametrize("form", ["exact", "slack"])
def test_is_the_definition(form: Any, scaled: dict[str, Any], causal: bool) -> None:
    made, x = layer(form=form, causal=causal, num_kv_heads=1, **scaled), normal(50, 2, 5, M).requires_grad_()
    keep = torch.tensor([[True] * 5, [True, False, True, True, False]])
    told = {"form": form, "factor": scaled.get("factor", 1.0), "causal": causal}
    want = naive.coca(x, *weights(made), H, allowed=keep[:, None].expand(-1, 5, -1), **told)[0]
    same(made(x, mask=masks.padding(keep)), want, [x, *made.parameters()])


def test_strict_queries_have_equal_halves() -> None:
    """Where they have, slack is exact."""
    made, x = layer(form="strict"), normal(50, 2, 5, M)
    q = made.q_proj.weight.unflatten(0, (H, 2, D // 2)).mean(1, keepdim=True).expand(-1, 2, -1, -1).flatten(0, 2)
    for form in ("exact", "slack"):
        close(made(x), naive.coca(x, q, *weights(made)[1:], H, form=form)[0])


@pytest.mark.parametrize("case", ["causal", "gqa_pad", "linear", "dynamic"])
def test_slack_gives_the_numbers_of_the_authors_llama(case: str) -> None:
    z = {k.removeprefix(f"{case}_"): torch.as_tensor(v) for k, v in vectors("B028").items() if k.startswith(case)}
    options = {
        "linear": {"scaling": "linear", "factor": 4.0},
        "dynamic": {"scaling": "dynamic", "factor": 4.0, "original_max": 4},
    }.get(case, {})
    made = layer(form="slack", num_kv_heads=1 if case == "gqa_pad" else 2, **options)
    theirs = {"q": "q", "k": "t", "v": "v", "o": "o"}
    made.load_state_dict({f"{a}_proj.weight": z[f"{b}_weight"] for a, b in theirs.items()}, strict=True)
    x = z["x"].requires_grad_()
    out = made(x, mask=masks.dense(z["mask"] > -1))
    close(out, z["out"])
    found = torch.autograd.grad((out * z["w"]).sum(), [x, *weights(made)])
    for gradient, name in zip(found, ("x", "q_weight", "t_weight", "v_weight", "o_weight"), strict=True):
        close(gradient, z[f"grad_{name}"])


def test_slack_gives_the_numbers_of_the_authors_gpt_neox() -> None:
    """Half of the channels turn."""
    z = {k.removeprefix("neox_"): torch.as_tensor(v) for k, v in vectors("B028").items() if k.startswith("neox")}
    made = regard.create(
        "coca", dim=16, num_heads=2, causal=True, bias=True, form="slack", partial_rotary_factor=0.5
    ).double()

    def apart(prefix: str = "") -> dict[str, Tensor]:
        found = {}
        for what in ("weight", "bias"):
            fused = z[f"{prefix}query_key_value_{what}"].unflatten(0, (2, 3, 8))
            found |= {f"{n}_proj.{what}": fused[:, i].flatten(0, 1) for i, n in enumerate("qkv")}
            found[f"o_proj.{what}"] = z[f"{prefix}dense_{what}"]
        return found

    made.load_state_dict(apart(), strict=True)
    x = z["x"].requires_grad_()
    out = made(x)
    close(out, z["out"])
    gradients = torch.autograd.grad((out * z["w"]).sum(), [x, *made.parameters()])
    close(gradients[0], z["grad_x"])
    for (name, _), gradient in zip(made.named_parameters(), gradients[1:], strict=True):
        close(gradient, apart("grad_")[name])


def scores(part: Collinear, q: Tensor, u: Tensor, i: int, j: int) -> Tensor:
    ours, theirs = part.turn(q, u, torch.tensor([i]), torch.tensor([j]))
    return (ours * theirs).sum(-1).squeeze() / D**0.5


def test_exact_scores_depend_on_distance_alone_and_slack_ones_do_not() -> None:
    q, u = normal(1, 1, 1, 1, D), normal(2, 1, 1, 1, D)
    for form, relative in (("exact", True), ("strict", True), ("slack", False)):
        part = Collinear(D, form=form)
        near, far = scores(part, q, u, 5, 2), scores(part, q, u, 905, 902)
        assert ((near - far).abs() < 1e-12) == relative, form


def test_a_pair_of_a_key_points_where_the_query_does() -> None:
    """eq. 7: before rotation, the score is the sum of t |q_a|^2, whatever the angles of q."""
    q, u = normal(1, 1, 1, 1, D), normal(2, 1, 1, 1, D)
    t, length = coefficients(u).flatten(), q.flatten()[: D // 2].square() + q.flatten()[D // 2 :].square()
    assert (t >= 0).all()
    for place in (0, 7):
        close(scores(Collinear(D), q, u, place, place), (t * length).sum() / D**0.5)


def test_of_equal_tokens_the_own_place_scores_most() -> None:
    """Not so with rotary, where the angle between a query and a key may be turned away by no distance."""
    made = layer(head_dim=8, base=10.0)
    x = normal(7, 40, 1, M).expand(-1, 9, -1)
    with torch.no_grad():
        q, k = (p(x).unflatten(-1, (H, 8)).transpose(1, 2) for p in (made.q_proj, made.k_proj))
        q, k = made.position.turn(q, k, torch.arange(9), torch.arange(9))
        found = (q[:, :, -1:] @ k.mT).squeeze(2)
    own = found[..., -1:]
    assert (found <= own + 1e-12).all()
    assert (found[..., :-1] < own).double().mean() > 0.7, "the others have no t"


@pytest.mark.parametrize("form", ["exact", "slack", "strict"])
def test_a_stream_is_the_full_pass(form: Any) -> None:
    made, x = layer(form=form), normal(4, 2, 7, M)
    state, outs = made.init_state(2, 7), []
    for size in (1, 2, 1, 3):
        y, state = made.step(x[:, sum(o.shape[1] for o in outs) :][:, :size], state)
        outs.append(y)
    close(torch.cat(outs, 1), made(x))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"form": "loose"}, ValueError, "form is unknown"),
        ({"scaling": "ntk"}, ValueError, "coca: scaling is unknown"),
        ({"factor": -1.0}, ValueError, "coca: factor is out of range"),
        ({"original_max": 0}, ValueError, "coca: original_max is too small"),
        ({"scaling": "linear", "factor": 0.5}, ValueError, "coca: factor is out of range"),
        ({"partial_rotary_factor": 0.5}, ValueError, r"partial_rotary_factor turns part .* \(got 0.5 and 'exact'\)"),
        ({"base": 1.0}, ValueError, "Collinear: base is out of range"),
        ({"head_dim": 5}, ValueError, "head_dim is no multiple of pair = 2"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        regard.create("coca", **{"dim": 16, "num_heads": 2, **options})


def test_dynamic_angles_do_not_stream() -> None:
    made = layer(scaling="dynamic", factor=2.0, original_max=4)
    with pytest.raises(ValueError, match="Collinear"):
        made.init_state(1, 4)

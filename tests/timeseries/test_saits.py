"""SAITS against loops over every step and weight and the authors' numbers (A135); what it fills gaps better than."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close, same
from regard.timeseries.saits import SAITS, DiagonallyMaskedLayer, Estimates, hide, saits_loss
from timeseries.naive_saits import naive_diagonal_attention, naive_mae, naive_saits

VECTORS = Path(__file__).parents[1] / "vectors" / "A135.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, *, num_features: int = 3, length: int = 5, num_layers: int = 2, **options) -> SAITS:
    sizes = {"dim": 6, "num_heads": 2, "head_dim": 2, "hidden_dim": 7, "num_layers": num_layers}
    model = SAITS(num_features, length, **{**sizes, **options}).double().eval()
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.copy_(0.5 * normal(100 * seed + n, *p.shape))
    return model


def weights(model: SAITS) -> tuple[dict[str, Tensor], tuple[list[dict[str, Tensor]], ...]]:
    """Under the names of the account's equations, as the oracle takes them."""

    def linear(letter: str, proj: nn.Linear) -> dict[str, Tensor]:
        return {"W" + letter: proj.weight, "b" + letter: proj.bias}

    def layer(own: DiagonallyMaskedLayer) -> dict[str, Tensor]:
        p = {"W" + n: getattr(own, n + "_proj").weight for n in "qkvo"}
        p |= {"n1_weight": own.norm.weight, "n1_bias": own.norm.bias}
        p |= {"n2_weight": own.feed_norm.weight, "n2_bias": own.feed_norm.bias}
        return p | linear("1", own.hidden_proj) | linear("2", own.feed_proj)

    p = linear("e", model.embeds[0]) | linear("a", model.embeds[1]) | linear("z", model.first_proj)
    p |= linear("b", model.second_proj) | linear("g", model.refine_proj) | linear("c", model.combine_proj)
    return p, tuple([layer(own) for own in model.running(n)] for n in range(2))


def mask(seed: int, *shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize(("length", "num_features", "num_layers"), [(5, 3, 2), (2, 1, 1), (1, 2, 1), (4, 2, 3)])
def test_equals_the_loops(length: int, num_features: int, num_layers: int) -> None:
    same_as_loops(filled(length, num_features=num_features, length=length, num_layers=num_layers))


@pytest.mark.parametrize(
    "options",
    [
        {"value_dim": 5},
        {"mask_input": False, "diagonal": False},
        {"repeats": 2},
        {"repeats": 2, "repeated": "stack", "value_dim": 1},
    ],
)
def test_variants_equal_the_loops(options: dict) -> None:
    same_as_loops(filled(9, length=4, **options), diagonal=options.get("diagonal", True))


def same_as_loops(model: SAITS, diagonal: bool = True) -> None:
    shape = (2, model.length, model.num_features)
    values, observed = normal(1, *shape), mask(2, *shape)
    leaves = list(model.parameters())
    want = naive_saits(values.where(observed, 0), observed.double(), *weights(model), heads=2, diagonal=diagonal)
    estimates = model.estimates(values, observed)
    got = [*estimates, model(values, observed)]
    for name, g, w in zip(("X1", "X2", "X3", "imputed"), got, want, strict=True):
        close(g.detach(), w.detach(), name)
    grads = [
        torch.autograd.grad(sum((e * normal(3, *e.shape)).sum() for e in out[:3]), leaves, materialize_grads=True)
        for out in (got, want)
    ]
    for (name, _), g, w in zip(model.named_parameters(), *grads, strict=True):
        close(g, w, name)


NAMES = {
    "norm": "layer_norm",
    "q_proj": "slf_attn.w_qs",
    "k_proj": "slf_attn.w_ks",
    "v_proj": "slf_attn.w_vs",
    "o_proj": "slf_attn.fc",
    "hidden_proj": "pos_ffn.w_1",
    "feed_proj": "pos_ffn.w_2",
    "feed_norm": "pos_ffn.layer_norm",
    "embeds.0": "embedding_1",
    "embeds.1": "embedding_2",
    "first_proj": "reduce_dim_z",
    "second_proj": "reduce_dim_beta",
    "refine_proj": "reduce_dim_gamma",
    "combine_proj": "weight_combine",
}
"""Ours and those of the authors' code, a layer's own without the layer."""


def theirs(name: str) -> str:
    *place, kind = name.split(".")
    if place[0] == "blocks":
        block, n, part = ("first", "second")[int(place[1])], place[2], NAMES[".".join(place[3:])]
        return f"layer_stack_for_{block}_block.{n}.{part}.{kind}"
    return f"{NAMES['.'.join(place)]}.{kind}"


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("a", {"num_heads": 2, "head_dim": 3}),
        ("b", {"num_heads": 2, "head_dim": 3, "value_dim": 5, "mask_input": False, "repeats": 2, "repeated": "stack"}),
        ("c", {"num_heads": 3, "head_dim": 5, "value_dim": 2, "diagonal": False, "repeats": 3}),
        ("d", {"num_heads": 1, "head_dim": 2, "value_dim": 6, "mask_input": False, "diagonal": False, "repeats": 3,
               "repeated": "stack"}),
    ],
)  # fmt: skip
def test_authors_numbers(case: str, options: dict) -> None:
    """All three estimates, what is imputed, and every gradient, of the released model."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    (_, length, features), dim = z["x"].shape, len(z["P_embedding_1.bias"])
    hidden = len(z["P_layer_stack_for_first_block.0.pos_ffn.w_1.bias"])
    model = SAITS(features, length, dim=dim, hidden_dim=hidden, dropout=0.0, **options).double()
    model.load_state_dict({name: z["P_" + theirs(name)] for name in model.state_dict()})
    x, observed = z["x"].requires_grad_(), z["observed"]
    estimates = model.estimates(x, observed)
    close(torch.stack(estimates).detach(), z["estimates"], "estimates")
    close(model(x, observed).detach(), z["out"], "imputed")
    own = dict(model.named_parameters())
    loss = (torch.stack(estimates) * z["w"]).sum()
    for name, grad in zip(own, torch.autograd.grad(loss, list(own.values()), retain_graph=True), strict=True):
        close(grad, z["G_" + theirs(name)], name)
    close(torch.autograd.grad(loss, x)[0][observed], z["gx"][observed], "x")  # unobserved values aren't read


def test_loss_equals_its_formula() -> None:
    estimates = Estimates(*(normal(n, 2, 5, 3) for n in range(3)))
    truth, observed = normal(4, 2, 5, 3), mask(5, 2, 5, 3)
    seen, hidden = hide(observed, 0.3, generator=torch.Generator().manual_seed(6))
    assert hidden.any()
    assert torch.equal(seen | hidden, observed)
    assert not (seen & hidden).any()
    want = sum(naive_mae(e, truth, seen.double()) for e in estimates) / 3
    want = want + 0.7 * naive_mae(estimates.combined, truth, hidden.double())
    truth[~observed] = math.nan  # never known, so never read
    close(saits_loss(estimates, truth, seen, hidden, weight=0.7), want)


@pytest.mark.parametrize("kernel", ["eager", "auto"])
def test_diagonal_mask_equals_the_loops(kernel: str) -> None:
    """The card's slot, in the pipeline."""
    q, k, v = (normal(n, 2, 3, 6, 4).requires_grad_() for n in range(3))
    want, rows = naive_diagonal_attention(q, k, v)
    pattern = regard.create("diagonal_masked", dim=12, num_heads=3).mask
    assert torch.equal(pattern.dense(6)[0, 0], ~torch.eye(6, dtype=torch.bool))
    got = regard.attention(q, k, v, mask=pattern, kernel=kernel)
    close(got.detach(), want.detach())
    direction = normal(7, *got.shape)
    grads = [torch.autograd.grad((out * direction).sum(), [q, k, v]) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)
    close(rows.sum(-1).detach(), torch.ones(2, 3, 6, dtype=torch.float64))


def test_no_step_reads_its_own_value() -> None:
    v = normal(1, 1, 1, 6, 2)
    q, k = normal(2, 1, 1, 6, 4), normal(3, 1, 1, 6, 4)
    pattern = regard.create("diagonal_masked", dim=12, num_heads=3).mask
    jacobian = torch.autograd.functional.jacobian(lambda v: regard.attention(q, k, v, mask=pattern)[0, 0], v)
    jacobian = jacobian[:, :, 0, 0]
    for i in range(6):
        for j in range(6):
            assert bool(jacobian[i, :, j].ne(0).any()) == (i != j)


def test_observed_values_come_back_and_unobserved_ones_are_not_read() -> None:
    model, values, observed = filled(3), normal(1, 2, 5, 3), mask(2, 2, 5, 3)
    want = model(values, observed)
    same(want[observed], values[observed])
    values[~observed] = math.nan
    same(model(values, observed), want)


def test_imputes_better_than_mean_and_last_value() -> None:
    """The paper's claim in small: waves of random phase, a third of the values missing."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(16)[None, :, None]
    phase = 2 * math.pi * torch.rand(160, 1, 1, generator=generator)
    speed = torch.tensor([0.5, 0.5, 1.0])
    series = torch.sin(speed * steps + phase * torch.tensor([1.0, 1.0, 2.0]) + torch.tensor([0.0, 1.0, 2.0]))
    observed = torch.rand(series.shape, generator=generator) < 0.65
    torch.manual_seed(0)
    model = SAITS(3, 16, dim=24, num_heads=2, num_layers=1, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(100):
        seen, hidden = hide(observed[:128], 0.2, generator=generator)
        loss = saits_loss(model.estimates(series[:128], seen), series[:128], seen, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    truth, known = series[128:], observed[128:]

    def error(filling: Tensor) -> float:
        return float((filling - truth).abs()[~known].mean())

    mean = (truth * known).sum((0, 1)) / known.sum((0, 1))
    last = torch.zeros_like(truth)
    for t in range(16):
        last[:, t] = torch.where(known[:, t], truth[:, t], last[:, t - 1] if t else 0.0)
    with torch.no_grad():
        ours = error(model(truth, known))
    others = error(mean.expand_as(truth)), error(last)
    assert ours < 0.6 * min(others), (ours, *others)


def test_bad_input() -> None:
    model, values, observed = filled(1), normal(1, 2, 5, 3), mask(2, 2, 5, 3)
    with pytest.raises(ValueError, match=r"values has the wrong shape \(got \(2, 4, 3\)\); .*\(B, T = 5, C = 3\)"):
        model(values[:, :4], observed[:, :4])
    with pytest.raises(TypeError, match=r"observed has the wrong dtype \(got torch.float64\); expected torch.bool"):
        model(values, observed.double())
    with pytest.raises(ValueError, match=r"dim is odd \(got 5\); expected an even int"):
        filled(1, dim=5)
    with pytest.raises(ValueError, match=r"dropout is out of range \(got 2.0\)"):
        filled(1, dropout=2.0)
    with pytest.raises(ValueError, match=r"repeated is unknown \(got 'all'\); expected one of 'layers', 'stack'"):
        filled(1, repeated="all")
    with pytest.raises(ValueError, match=r"repeats is too small \(got 0\)"):
        filled(1, repeats=0)
    with pytest.raises(ValueError, match="hidden overlaps observed"):
        saits_loss(model.estimates(values, observed), values, observed, observed)
    with pytest.raises(ValueError, match=r"fraction is out of range \(got 1.0\)"):
        hide(observed, 1.0)

"""The entropy regulariser against loops and the authors' numbers (A105); temperatures against loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close, close_all, run
from regard.training import EntropyRegularizer, HeadTemperature, row_entropy
from training.naive_entropy import naive_entropy, naive_row_entropy, naive_temperature_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "A105.npz"


def maps(seed: int, *shape: int, sharpness: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, dtype=torch.float64, generator=generator)).softmax(-1)


@pytest.mark.parametrize("case", "ABC")
def test_gives_the_authors_numbers(case: str) -> None:
    """Their code shares one row of thresholds by all layers, so that its gradient is the sum of ours."""
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}.")}
    L, _, H, _, _ = z["attention"].shape
    options = {"context_size": int(z["context_size"]), "margin": float(z["margin"]), "weight": float(z["coeff"])}
    loss = EntropyRegularizer(H, num_layers=L, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        loss.threshold.copy_(z["threshold"])
    logits = z["logits"].requires_grad_()
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1) & bool(z["causal"])
    attention = logits.masked_fill(later, -torch.inf).softmax(-1)
    close(attention.detach(), z["attention"])
    close(row_entropy(attention).detach(), z["entropy"])
    value = loss(attention)
    close(value.detach(), z["loss"].reshape(()))
    grads = torch.autograd.grad(value, (loss.threshold, logits))
    close(grads[0].sum(0), z["grad_threshold"])
    close(grads[1], z["grad_logits"])


class Naive(nn.Module):
    def __init__(self, layer: EntropyRegularizer) -> None:
        super().__init__()
        self.threshold = layer.threshold
        self.options = {"gamma": layer.margin, "coefficient": layer.weight, "per": layer.per}
        self.context_size = layer.context_size

    def forward(self, attention: Tensor) -> Tensor:
        return naive_entropy(attention, self.threshold, context_size=self.context_size, **self.options)  # type: ignore


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("context_size", [None, 9])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 2), (2, 2, 3, 4, 5)])
def test_equals_the_loops(per: str, context_size: int | None, sizes: tuple[int, ...]) -> None:
    L, _, H, _, _ = sizes
    options = {"num_layers": L, "per": per, "context_size": context_size, "margin": 0.02, "weight": 0.7}
    layer = EntropyRegularizer(H, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.threshold.copy_(torch.linspace(0.2, 0.9, L * H).view(L, H))
    attention = maps(1, *sizes, sharpness=2.0)
    close(row_entropy(attention), naive_row_entropy(attention))
    close_all(run(layer, attention), run(Naive(layer), attention))


@pytest.mark.parametrize("per", ["row", "head"])
def test_hidden_rows_count_nothing(per: str) -> None:
    layer = EntropyRegularizer(3, num_layers=2, per=per, weight=1.0, margin=0.05, context_size=7).double()  # type: ignore
    attention = maps(2, 2, 2, 3, 4, 7)
    keep = torch.tensor([[True, True, True, False]] * 2)
    poisoned = attention.clone()
    poisoned[..., 3, :] = torch.nan
    close(layer(poisoned, mask=keep), layer(attention[..., :3, :]))
    grad = run(layer, poisoned, mask=keep)["input0"]
    assert grad.isfinite().all()
    assert not grad[..., 3, :].any()
    assert layer(attention, mask=keep & False) == 0


def test_nothing_within_the_margin_and_a_jump_at_it() -> None:
    """Uniform rows over n of 8 keys have entropy log n; the penalty is d^2, not what exceeds the margin."""

    def loss(n: int) -> float:
        row = torch.zeros(8, dtype=torch.float64)
        row[:n] = 1 / n
        layer = EntropyRegularizer(1, threshold=0.5, margin=0.2, weight=1.0).double()
        return float(layer(row.expand(1, 1, 1, 1, 8)))

    half = math.log(8) / 2
    for n in (1, 2, 3, 4, 5, 8):
        d = math.log(n) - half
        assert abs(loss(n) - (d * d if abs(d) > 0.2 * math.log(8) else 0)) < 1e-7
    assert loss(3) == 0 < loss(1)


@pytest.mark.parametrize(("start", "sharpness"), [("overload", 0.05), ("collapse", 20.0)])
def test_brings_entropies_within_the_margin(start: str, sharpness: float) -> None:
    """The paper's claim in small: rows that are too flat, or too sharp, come to the threshold by this loss alone."""
    torch.manual_seed(0)
    logits = (sharpness * torch.randn(1, 1, 2, 16, 16)).requires_grad_()
    layer = EntropyRegularizer(2, threshold=0.4, margin=0.05, weight=1.0)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    most = math.log(16)
    first = row_entropy(logits.softmax(-1)).mean() / most
    assert first > 0.95 if start == "overload" else first < 0.15
    for _ in range(250):
        optimizer.zero_grad()
        loss = layer(logits.softmax(-1))
        loss.backward()
        optimizer.step()
    away = (row_entropy(logits.softmax(-1)) / most - 0.4).abs()
    if start == "overload":
        assert loss == 0
        assert away.max() < 0.06
    else:  # a few rows are so sharp that their softmax has no gradient left
        assert away.median() < 0.06


def test_bad_input_raises() -> None:
    for name, options in (("num_heads", {"num_heads": 0}), ("num_layers", {"num_heads": 2, "num_layers": 0})):
        with pytest.raises(ValueError, match=rf"{name} is too small \(got 0\); expected an int >= 1"):
            EntropyRegularizer(**options)
    with pytest.raises(ValueError, match=r"context_size is too small \(got 1\); expected an int >= 2"):
        EntropyRegularizer(2, context_size=1)
    with pytest.raises(ValueError, match=r"margin is out of range \(got -1\.0\); expected a finite number >= 0"):
        EntropyRegularizer(2, margin=-1.0)
    with pytest.raises(ValueError, match=r"per is unknown \(got 'rows'\); expected one of 'row', 'head'"):
        EntropyRegularizer(2, per="rows")  # type: ignore[arg-type]
    attention = maps(0, 1, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"attention has the wrong shape \(got \(1, 2, 3, 4, 4\)\); .* H = 2"):
        EntropyRegularizer(2)(attention)
    with pytest.raises(ValueError, match=r"mask has the wrong shape \(got \(4, 2\)\); expected \(B = 2, T = 4\)"):
        EntropyRegularizer(3)(attention, mask=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask has the wrong dtype \(got torch\.float32\); expected torch\.bool"):
        EntropyRegularizer(3)(attention, mask=torch.ones(2, 4))


# Temperatures


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_temperatures_equal_the_loops(causal: bool, kernel: str) -> None:
    torch.manual_seed(1)
    part = HeadTemperature(3, max_length=7).double()
    nn.init.uniform_(part.temperature, 0.2, 3.0)
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = regard.masks.causal() if causal else None
    got = regard.attention(q, k, v, mask=mask, score_mix=part, kernel=kernel)
    want = naive_temperature_attention(q, k, v, part.temperature, causal=causal)
    close(got, want)
    leaves = (q, k, v, part.temperature)
    w = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad((got * w).sum(), leaves), torch.autograd.grad((want * w).sum(), leaves)):
        close(a, b)


def test_a_temperature_of_one_changes_nothing_and_a_greater_one_flattens() -> None:
    q, k = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(2))
    v = torch.eye(5, dtype=torch.float64).expand(1, 2, 5, 5)

    def entropy(start: float) -> Tensor:
        return row_entropy(regard.attention(q, k, v, score_mix=HeadTemperature(2, max_length=3, start=start).double()))

    close(regard.attention(q, k, v, score_mix=HeadTemperature(2, max_length=3).double()), regard.attention(q, k, v))
    assert (entropy(0.3) < entropy(1.0)).all()
    assert (entropy(1.0) < entropy(3.0)).all()


def test_bad_temperatures_raise() -> None:
    for name, sizes in (("num_heads", (0, 3)), ("max_length", (2, 0))):
        with pytest.raises(ValueError, match=rf"{name} is too small \(got 0\); expected an int >= 1"):
            HeadTemperature(sizes[0], max_length=sizes[1])
    with pytest.raises(ValueError, match=r"start is out of range \(got 0\.0\); expected a finite number > 0"):
        HeadTemperature(2, start=0.0)

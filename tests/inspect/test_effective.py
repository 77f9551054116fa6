"""Effective weights against softmax's own and naive ones, and what has none is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.inspect.effective import effective_weights, measured_weights, reads, values_of
from regard.kernels.problem import combine
from regard.laws.agreement import close
from regard.pipeline.head_mixer import HeadMixer


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return regard.create(name, dim=12, num_heads=4, dtype=torch.float64, **options)


def heads(layer: Any, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, the keys repeated for each query head."""
    q = layer.q_proj(x).unflatten(-1, (4, 3)).transpose(1, 2)
    k = layer.k_proj(source).unflatten(-1, (-1, 3)).transpose(1, 2)
    return q, k.repeat_interleave(4 // k.shape[1], 1)


def test_softmax() -> None:
    layer, x = built("softmax", num_kv_heads=2, causal=True, dropout=0.3), tokens(2, 8, 12)
    q, k = heads(layer, x, x)
    scores = q @ k.mT / 3**0.5
    want = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1)
    close(effective_weights(layer, x), want.detach())


def test_cross_attention_and_padding() -> None:
    layer, x, memory = built("softmax"), tokens(2, 5, 12), tokens(2, 7, 12, seed=1)
    keep = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
    q, k = heads(layer, x, memory)
    want = (q @ k.mT / 3**0.5).masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
    close(effective_weights(layer, x, memory, mask=masks.padding(keep)), want.detach())


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention(causal: bool) -> None:
    """phi(q_i) . phi(k_j), divided by its sum over the keys seen: one number at a time."""
    layer, x = built("linear", causal=causal), tokens(1, 6, 12)
    q, k = heads(layer, x, x)
    phi_q, phi_k = (torch.where(z > 0, z + 1, z.exp()) for z in (q.detach(), k.detach()))
    want = torch.zeros(1, 4, 6, 6, dtype=torch.float64)
    for h in range(4):
        for i in range(6):
            seen = range(i + 1) if causal else range(6)
            parts = {j: float(phi_q[0, h, i] @ phi_k[0, h, j]) for j in seen}
            for j, part in parts.items():
                want[0, h, i, j] = part / sum(parts.values())
    close(effective_weights(layer, x), want)


def test_what_a_position_adds_is_no_weight() -> None:
    """Shaw's scheme adds vectors of its own to the outputs: the weights are those of the scores alone."""
    layer, x = built("shaw", causal=True), tokens(2, 6, 12)
    weights = effective_weights(layer, x)
    close(weights.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    close(weights, regard.trace(layer, x).weights(0))


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_some_keys_at_a_time(name: str) -> None:
    layer, x = built(name, num_kv_heads=2), tokens(2, 9, 12)
    whole = effective_weights(layer, x)
    close(effective_weights(layer, x, keys=slice(2, 7)), whole[..., 2:7])
    close(effective_weights(layer, x, keys=[8, 0]), whole[..., [8, 0]])
    assert effective_weights(layer, x, keys=[]).shape == (2, 4, 9, 0)
    with pytest.raises(
        ValueError, match=r"effective_weights: keys is out of range \(got \[9\]\); expected numbers from -9 to 8"
    ):
        effective_weights(layer, x, keys=[9])


def test_the_layer_is_left_as_it_was() -> None:
    layer, x = built("softmax", dropout=0.5), tokens(1, 4, 12)
    before = torch.get_rng_state()
    first = effective_weights(layer, x)
    assert layer.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.requires_grad
    close(first, effective_weights(layer.eval(), x))


class Odd(HeadMixer):
    """A mixer that does what it is told to values."""

    how = "square"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        a = (q @ k.mT).softmax(-1)
        if self.how == "square":
            return a @ v.square()
        if self.how == "features":
            return a @ (v * torch.arange(1.0, v.shape[-1] + 1, dtype=v.dtype))
        if self.how == "shuffle":
            return a @ v.roll(1, -1)
        if self.how == "heads":
            return (a @ v).roll(1, 1)
        return a @ v + 5.0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("square", "not linear in its values"),
        ("features", "weighs the features of a head differently"),
        ("shuffle", "weighs the features of a head differently"),
        ("heads", "mixes heads"),
    ],
)
def test_what_no_matrix_tells_is_refused(how: str, words: str) -> None:
    layer = Odd(12, 4).double()
    layer.how = how
    with pytest.raises(ValueError, match=words):
        effective_weights(layer, tokens(2, 7, 12))
    layer.how = "shift"
    q, k = heads(layer, x := tokens(2, 7, 12), x)
    close(effective_weights(layer, x), (q @ k.mT).softmax(-1).detach())


def test_other_layers_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"layer is no layer of queries, keys and values that regard knows \(got Linear\)"
    ):
        effective_weights(nn.Linear(12, 12), tokens(1, 2, 12))


def test_any_function_of_values() -> None:
    """A decaying recurrence: s <- s / 2 + v, whose weights are powers of 1/2."""

    def recurrence(v: Tensor) -> Tensor:
        out, state = [], torch.zeros_like(v[:, :, 0])
        for t in range(v.shape[2]):
            state = state / 2 + v[:, :, t]
            out.append(state)
        return torch.stack(out, 2)

    i = torch.arange(5)
    want = (0.5 ** (i[:, None] - i)).tril().double()
    close(measured_weights(recurrence, tokens(1, 2, 5, 3)), want.expand(1, 2, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_pass_the_test_of_linearity(dtype: torch.dtype) -> None:
    layer, x = built("softmax").to(dtype), tokens(2, 40, 12).to(dtype)
    assert effective_weights(layer, x).dtype == dtype


NO_MATRIX = {
    "agent": "a convolution over values",
    "long_range_grouping": "the same",
    "lightning": "a norm over outputs",
    "deltanet": "the same",
    "gated_deltanet": "the same",
    "kda": "the same",
    "gla": "the same",
    "gsa": "the same",
    "retnet": "the same",
    "lada": "features of a value weighed by those of its key",
    "hrrformer": "weights by how alike values are to what is recalled",
    "kdgqa": "heads of values are averaged and dealt out",
    "kdgqa_sequence": "the same",
    "ttt_linear": "values teach a model that is read through a norm",
    "pgqa": "less noise as strong as the outputs themselves",
    "yoso": "outputs of norm 1",
    "yoso_e": "the same",
}


@pytest.mark.parametrize("name", [name for name in regard.mechanisms() if regard.card(name).protocol == "TokenMixer"])
def test_every_layer_of_heads(name: str) -> None:
    """What is measured is what a trace tells, and times values it is what the layer puts out."""
    own = {} if "bidirectional" in regard.card(name).supports else {"causal": True}
    torch.manual_seed(0)
    layer, x = regard.create(name, dim=16, num_heads=4, dtype=torch.float64, **own).eval(), tokens(2, 16, 16)
    if not reads(layer):
        with pytest.raises(TypeError, match="is no layer of queries, keys and values"):
            effective_weights(layer, x)
        return
    if name in NO_MATRIX:
        with pytest.raises(ValueError, match="effective_weights: the mechanism"):
            effective_weights(layer, x)
        return
    weights, traced = effective_weights(layer, x), regard.trace(layer, x)
    assert torch.equal(traced.output, layer(x))
    close(traced.weights(0), weights)
    if isinstance(layer, HeadMixer):
        close(layer.merge(combine(weights, values_of(layer, x)[1])), layer(x))

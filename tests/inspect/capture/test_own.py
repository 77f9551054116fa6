"""Traces of regard's own layers hold for whatever fills a slot, also for parts that nobody had thought of."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.inspect.effective import effective_weights
from regard.inspect.trace import trace
from regard.laws.agreement import close
from regard.normalizers.entmax import Entmax
from regard.stages import Made, Mix, Rows, Score, Tokens


class Distance(Score):
    """Minus the squared distance of query and key, and a number that each key token has of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = nn.Linear(dim, 1)

    def prepare(self, tokens: Tokens) -> Made:
        return Made(key=self.own(tokens.context)[:, None])

    def forward(self, rows: Rows, scale: float) -> Tensor:
        assert rows.made.key is not None
        k = rows.k.repeat_interleave(rows.q.shape[1] // rows.k.shape[1], 1)
        return -scale * torch.cdist(rows.q, k).square() + rows.made.key.mT


class Sharper(Mix):
    """Each row times a number that its query token says."""

    needs = frozenset({"tokens"})

    def forward(self, z: Tensor, rows: Rows) -> Tensor:
        assert rows.x is not None
        return z * (1 + rows.x[:, None, :, :1].abs())


class Later(Mix):
    """A weight is half its own and half that of the row before."""

    halo = 1

    def forward(self, z: Tensor, rows: Rows) -> Tensor:
        before = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1]], 2)
        return (z + before.masked_fill(rows.i[:, None] == 0, 0)) / 2


PARTS = {
    "score": lambda: {"score": Distance(12)},
    "score and normaliser": lambda: {"score": Distance(12), "normalizer": Entmax()},
    "score mix": lambda: {"score_mix": Sharper()},
    "weight mix": lambda: {"weight_mix": Later()},
    "all": lambda: {"score": Distance(12), "score_mix": Sharper(), "normalizer": Entmax(), "weight_mix": Later()},
}


def layer(name: str, **more: bool) -> regard.Attention:
    torch.manual_seed(0)
    return regard.Attention(12, 4, num_kv_heads=2, dtype=torch.float64, **PARTS[name](), **more).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_weights_are_those_measured(name: str, causal: bool) -> None:
    made, x = layer(name, causal=causal), tokens(2, 6, 12)
    (got,) = trace(made, x).layers
    want = effective_weights(made, x)
    close(got.weights(), want)
    close(got.weights(heads=[3], rows=[4, 1]), want[:, [3]][:, :, [4, 1]])
    assert got.has_logits
    assert (got.weight_rule is None) == (name in ("score", "score mix"))
    if got.weight_rule is None:
        close(got.logits().softmax(-1), want)


def test_of_another_sequence() -> None:
    made, x, context = layer("all"), tokens(2, 3, 12), tokens(2, 5, 12)
    close(trace(made, (x, context)).weights(0), effective_weights(made, x, context))


class Careless(nn.Module):
    """A model that writes into its own tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        out = self.inner(x)
        x.zero_()
        return out


@pytest.mark.parametrize("name", PARTS)
def test_what_the_model_writes_into_its_tokens_later_changes_nothing(name: str) -> None:
    made, x = layer(name), tokens(2, 6, 12)
    close(trace(Careless(made), x).weights(0), effective_weights(made, x))

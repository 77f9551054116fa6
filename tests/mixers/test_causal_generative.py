"""The causal generative function against loops, whose author has read neither code nor test, and what it costs."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from mixers import naive_causal_generative as naive
from regard import masks
from regard.laws.agreement import close, same
from regard.mixers.causal_generative import CausalGenerative, pair_previous, running_mean, running_minimum

M = 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**options) -> CausalGenerative:
    return regard.create("causal_generative", dim=M, num_heads=1, causal=True, dtype=torch.float64, **options)


@pytest.mark.parametrize("out_proj", [False, True])
@pytest.mark.parametrize("context", ["none", "mean", "min"])
@pytest.mark.parametrize("pair", ["min", "max", "mean"])
def test_is_the_definition(pair: str, context: str, out_proj: bool) -> None:
    layer, x = built(pair=pair, context=context, out_proj=out_proj), normal(1, 3, 7, M).requires_grad_()
    keep = torch.ones(3, 7, dtype=torch.bool)
    keep[1, :3] = keep[2, [2, 6]] = False
    out = (layer.o_proj.weight, None) if out_proj else None
    for mask in (None, keep):
        got = layer(x, mask=None if mask is None else masks.padding(mask))
        want = naive.causal_generative(x, pair, context, out, mask)
        got, direction = got if mask is None else got * mask[..., None], normal(2, *x.shape)
        close(got, want)
        of = [x, *layer.parameters()]
        for mine, theirs in zip(*(torch.autograd.grad((y * direction).sum(), of) for y in (got, want)), strict=True):
            close(mine, theirs)


def test_no_token_before_the_first_and_none_behind() -> None:
    """The first is itself, with its whole gradient; what is later changes nothing, also the average."""
    x = normal(1, 2, 5, M).requires_grad_()
    for pair, context in itertools.product(("min", "max", "mean"), ("none", "mean", "min")):
        layer = built(pair=pair, context=context)
        first = layer(x)[:, 0]
        close(first, 2 * x[:, 0] if context == "mean" else x[:, 0])
        (grad,) = torch.autograd.grad(first.sum(), x)
        assert grad[:, 0].unique().tolist() == [2.0 if context == "mean" else 1.0]
        same(layer(x[:, :3]), layer(x)[:, :3])


def test_one_layer_looks_one_token_back_and_many_as_many() -> None:
    layer, x = built(pair="mean"), normal(2, 1, 9, M).requires_grad_()
    y = x
    for layers in (1, 2, 3):
        y = layer(y)
        seen = torch.autograd.grad(y[0, 8].sum(), x, retain_graph=True)[0][0].ne(0).any(-1)
        assert seen.tolist() == [False] * (8 - layers) + [True] * (layers + 1)
    assert not list(layer.parameters())
    assert [name for name, _ in built(out_proj=True).named_parameters()] == ["o_proj.weight"]


def test_hidden_tokens_are_passed_over() -> None:
    """Wherever they stand, the others get what they would get without them, and decoding goes on from there."""
    x, keep = normal(3, 2, 8, M), torch.ones(2, 8, dtype=torch.bool)
    keep[0, [0, 1, 4, 7]] = keep[1, [3, 5, 6]] = False
    x[~keep] = torch.nan
    for pair, context in itertools.product(("min", "max", "mean"), ("none", "mean", "min")):
        layer = built(pair=pair, context=context)
        got, state, parts, at = layer(x, mask=masks.padding(keep)), layer.init_state(2, 9), [], 0
        for t in (3, 0, 1, 4):
            part, state = layer.step(x[:, at : at + t], state, mask=keep[:, at : at + t])
            parts, at = [*parts, part], at + t
        for b in range(2):
            want = layer(x[b : b + 1, keep[b]])[0]
            close(got[b, keep[b]], want)
            close(torch.cat(parts, 1)[b, keep[b]], want)
            assert int(state.seen[b]) == int(keep[b].sum())
        x[0, 2] = torch.nan
        reached = layer(x, mask=masks.padding(keep))[0].isnan().any(-1) & keep[0]
        assert reached.tolist() == [j in ((2, 3) if context == "none" else (2, 3, 5, 6)) for j in range(8)]
        x[0, 2] = normal(4, M)


def test_as_read_the_running_minimum_leaves_nothing_of_the_pair() -> None:
    x = normal(5, 2, 7, M)
    for pair in ("min", "max", "mean"):
        same(built(pair=pair, context="min")(x), running_minimum(x))


def test_a_long_average_keeps_its_digits() -> None:
    x = 1 + 0.01 * normal(6, 1, 100_000, 1)
    off = running_mean(x.float()).double() - running_mean(x)
    assert off.abs().max() < 1e-6
    assert (running_mean(x.bfloat16()).double() - 1).abs().max() < 0.02


def test_stands_in_an_activations_place() -> None:
    """In an MLP it mixes tokens, where GELU keeps them apart."""
    x, up, down = normal(7, 1, 5, M).requires_grad_(), normal(8, 12, M), normal(9, M, 12)
    out = pair_previous(x @ up.T, "max") @ down.T
    assert torch.autograd.grad(out[0, 3].sum(), x)[0][0].ne(0).any(-1).tolist() == [False, False, True, True, False]


class Small(nn.Module):
    """Two blocks as nanoGPT's."""

    def __init__(self, mixer: Callable[[], nn.Module], width: int = 32, length: int = 32, vocab: int = 8) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, width), nn.Parameter(torch.randn(length, width))
        self.mixers = nn.ModuleList(mixer() for _ in range(2))
        mlp = (nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2))
        self.mlps, self.out = nn.ModuleList(mlp), nn.Linear(width, vocab)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        for n, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            h = h + mixer(self.norms[2 * n](h))
            h = h + mlp(self.norms[2 * n + 1](h))
        return self.out(h)


def sequences(count: int, length: int = 33) -> Tensor:
    """Each letter follows of the two before."""
    g = torch.Generator().manual_seed(1)
    table = (6 * torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0))).softmax(-1)
    letters = [torch.zeros(count, dtype=torch.long)] * 2
    for _ in range(length + 2):
        letters.append(torch.multinomial(table[letters[-2], letters[-1]], 1, generator=g)[:, 0])
    return torch.stack(letters[4:], 1)


def trained(name: str, steps: int = 80) -> tuple[float, int]:
    """The last losses' mean, and how many parameters there are."""
    torch.manual_seed(0)
    model = Small(lambda: regard.create(name, dim=32, num_heads=4, causal=True))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True), []
    for batch in sequences(16 * steps).split(16):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10, sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_a_smaller_model_has_a_smaller_loss() -> None:
    (ours, small), (theirs, large) = trained("causal_generative"), trained("softmax")
    assert small < 0.6 * large
    assert ours < theirs - 0.1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="pair is unknown"):
        built(pair="sum")
    with pytest.raises(ValueError, match="context is unknown"):
        built(context="all")
    with pytest.raises(TypeError, match="out_proj has the wrong type"):
        CausalGenerative(M, out_proj=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="op is unknown"):
        pair_previous(normal(1, 1, 2, 3), "less")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="causal"):
        regard.create("causal_generative", dim=M, num_heads=1, causal=False)
    with pytest.raises(ValueError, match="state has another batch"):
        built().step(normal(1, 3, 1, M), built().init_state(2, 9))

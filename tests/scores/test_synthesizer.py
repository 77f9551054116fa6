"""Synthesizers against loops, whose author has read neither code nor test, and what they promise."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.inspect import effective_weights
from regard.laws.agreement import close
from scores import naive_synthesizer as naive

M, H, D, N = 6, 3, 2, 8
CARDS = ["synthesizer_dense", "synthesizer_dense_factorized", "synthesizer_random", "synthesizer_random_fixed"]
CARDS += ["synthesizer_random_factorized", "synthesizer_mix"]
DENSE = ["dense", "dense_factorized"]
RANDOM = ["random", "random_fixed", "random_factorized"]
OWN = {"dense_factorized": {"factor": 2}, "random_factorized": {"rank": 1}}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(name: str, **options) -> regard.Attention:
    options = {"max_length": N, "bias": True, **OWN.get(name, {}), **options}
    (card,) = (card for card in CARDS if card == f"synthesizer_{name}")
    layer = regard.create(card, dim=M, num_heads=H, **options).double().eval()
    with torch.no_grad():
        for n, p in enumerate([*layer.parameters(), *layer.buffers()]):
            p.copy_(0.6 * normal(*p.shape, seed=100 + n))
    return layer


def query_maps(layer: regard.Attention) -> tuple[Tensor, Tensor]:
    return layer.q_proj.weight.unflatten(0, (H, D)), layer.q_proj.bias.unflatten(0, (H, D))


def logits(part: torch.nn.Module, name: str, layer: regard.Attention, x: Tensor) -> Tensor:
    """By the loops; maps that follow the query's are taken together with it."""
    w, b = query_maps(layer)
    if name == "dense":
        if part.hidden is not None:
            w, b = part.hidden.weight.unflatten(0, (H, -1)), part.hidden.bias.unflatten(0, (H, -1))
        return naive.dense(x, w, b, part.weight, part.bias, per_head=False)
    if name == "dense_factorized":
        maps = ((part.within_weight, part.within_bias), (part.block_weight, part.block_bias))
        (wa, ba), (wc, bc) = ((p @ w, (p @ b[..., None])[..., 0] + q) for p, q in maps)
        return naive.dense_factorized(x, wa, ba, wc, bc, per_head=False)
    if name == "random_factorized":
        return naive.random_factorized(x, part.asking, part.asked)
    return naive.random(x, part.table)


def check(layer: regard.Attention, scores: Tensor, x: Tensor, causal: bool, keep: Tensor | None = None) -> None:
    want = naive.layer(x, scores, layer.v_proj.weight, layer.o_proj.weight, H, layer.v_proj.bias, layer.o_proj.bias,
                       causal=causal, keep=keep)  # fmt: skip
    got, g = layer(x, mask=None if keep is None else masks.padding(keep)), normal(*x.shape, seed=2)
    close(got.detach(), want.detach())
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grads = [torch.autograd.grad((y * g).sum(), leaves, allow_unused=True) for y in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None or not mine.any()) if theirs is None else mine is not None
        if theirs is not None:
            close(mine, theirs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", DENSE + RANDOM)
def test_equals_the_loops(name: str, causal: bool) -> None:
    layer, x = filled(name, causal=causal), normal(2, 5, M).requires_grad_()
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    check(layer, logits(layer.score, name, layer, x), x, causal, keep)


def test_a_hidden_layer_of_its_own() -> None:
    layer, x = filled("dense", width=5), normal(2, 5, M).requires_grad_()
    assert layer.score.hidden.weight.shape == (H * 5, M)
    check(layer, logits(layer.score, "dense", layer, x), x, False)


@pytest.mark.parametrize("parts", [("random", "dot"), ("dot", "dense", "random_fixed"), ("random_factorized",)])
def test_mixtures_equal_the_loops(parts: tuple[str, ...]) -> None:
    layer, x = filled("mix", parts=parts), normal(2, 5, M).requires_grad_()
    q, k = (p(x).unflatten(-1, (H, D)) for p in (layer.q_proj, layer.k_proj))
    inner = iter(layer.score.scores)
    made = [naive.vanilla(q, k, D**-0.5) if n == "dot" else logits(next(inner), n, layer, x) for n in parts]
    check(layer, naive.mix(made, layer.score.logits), x, False)


def test_scores_are_not_scaled() -> None:
    x = normal(2, 5, M)
    for name in DENSE + RANDOM:
        layer, other = filled(name), filled(name)
        other.scale = 7.0
        assert torch.equal(layer(x), other(x))


@torch.no_grad()
@pytest.mark.parametrize("name", RANDOM)
def test_weights_do_not_depend_on_the_input(name: str) -> None:
    layer = filled(name)
    weights = effective_weights(layer, normal(1, N, M))
    close(effective_weights(layer, normal(1, N, M, seed=5)), weights)
    assert (weights - 1 / N).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_where_a_token_looks_depends_on_itself_alone(name: str) -> None:
    layer, x = filled(name), normal(1, N, M)
    weights, other = effective_weights(layer, x), x.clone()
    other[:, 3] = normal(M, seed=5)
    off = (effective_weights(layer, other) - weights).abs().amax((0, 1, 3))
    assert off[3] > 0.01
    assert off[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-12


@torch.no_grad()
def test_a_factorized_table_has_low_rank() -> None:
    """And is the same for every input: logarithms of weights are the table, less a number for each row."""
    layer = filled("random_factorized")
    weights = effective_weights(layer, normal(1, N, M))
    assert torch.linalg.matrix_rank(weights[0].log(), rtol=1e-9).max() <= 2
    close(effective_weights(layer, normal(1, N, M, seed=5)), weights)


@torch.no_grad()
def test_all_places_of_a_product_differ() -> None:
    """Tiled both ways, as other people's code has it, places 0 and N / 2 would be one."""
    part = filled("dense_factorized").score
    for p in (part.within_weight, part.block_weight):
        p.zero_()
    part.within_bias.copy_(torch.tensor([1.0, 2]))
    part.block_bias.copy_(torch.tensor([1.0, 10, 100, 1000]))
    layer, x = filled("dense_factorized"), normal(1, N, M)
    layer.score = part
    scores = effective_weights(layer, x)[0, 0, 0]
    assert scores[-1] == pytest.approx(1), "2 * 1000"
    part.block_bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    told = effective_weights(layer, x)[0, 0, 0].log()
    close(told - told[0], torch.tensor([0, 0.1, 0.1, 0.3, 0.2, 0.5, 0.3, 0.7], dtype=torch.float64))


def test_a_mixture_learns_which_part_a_task_asks_for() -> None:
    """With all weight on a part it is that part. Weighing is learned: where only the table knows, it wins."""
    layer, x, y = filled("mix"), normal(1, N, M), normal(1, N, M, seed=5)
    plain = regard.Attention(M, H, bias=True).double()
    plain.load_state_dict({k: p for k, p in layer.state_dict().items() if not k.startswith("score")})
    with torch.no_grad():
        layer.score.logits.copy_(torch.tensor([-60.0, 60]))
        close(layer(x), plain(x))
        layer.score.logits.copy_(torch.tensor([60.0, -60]))
        close(effective_weights(layer, x), effective_weights(layer, y))
        layer.score.logits.zero_()
        layer.score.scores[0].table.copy_(8 * torch.eye(N).roll(1, 0).double())
    optimizer = torch.optim.Adam([layer.score.logits], 0.1)
    for seed in range(20):
        z = normal(4, N, M, seed=seed)
        loss = (layer(z) - layer.o_proj(layer.v_proj(z.roll(1, 1)))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.score.logits.softmax(0)[0] > 0.8


@torch.no_grad()
@pytest.mark.parametrize("name", [*DENSE, *RANDOM, "mix"])
def test_documents_have_places_of_their_own(name: str) -> None:
    layer, x = filled(name, causal=True), normal(2, N, M)
    out = layer(x, mask=masks.packed(torch.tensor([0, 3, 8])))
    close(out[:, :3], layer(x[:, :3]))
    close(out[:, 3:], layer(x[:, 3:]))
    state, outs, at = layer.init_state(2, N, dtype=torch.float64), [], 0
    for t in (3, 1, 4):
        step, state = layer.step(x[:, at : at + t], state)
        outs, at = [*outs, step], at + t
    close(torch.cat(outs, 1), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("name", [*DENSE, *RANDOM, "mix"])
def test_refuses_more_tokens_than_its_table(name: str) -> None:
    layer = filled(name, causal=True)
    with pytest.raises(ValueError, match=r"x is longer than the table \(got 9\); expected at most max_length = 8"):
        layer(normal(1, N + 1, M))
    _, state = layer.step(normal(1, N, M), layer.init_state(1, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="is longer than the table"):
        layer.step(normal(1, 1, M), state)


def test_starting_values() -> None:
    """Glorot for each head, biases 0, parts of a mixture alike."""

    def created(name: str, **options) -> torch.nn.Module:
        return regard.create(f"synthesizer_{name}", dim=64, num_heads=4, **options).score

    def bound(p: Tensor, n: int, m: int) -> None:
        assert 0.98 * math.sqrt(6 / (n + m)) < p.detach().abs().max().item() <= math.sqrt(6 / (n + m))

    dense, thin = created("dense"), created("random_factorized")
    bound(dense.weight, 512, 16)
    assert not dense.bias.any()
    assert dense.hidden is None
    bound(created("dense", width=80).hidden.weight, 64, 320)
    assert thin.asking.shape == (4, 512, 8)
    bound(thin.asked, 512, 8)
    bound(created("random").table, 512, 512)
    fixed = created("random_fixed")
    assert not list(fixed.parameters())
    assert torch.equal(fixed.table, fixed.table.bfloat16().float()), "no dtype changes it"
    assert fixed.table.abs().max().item() == pytest.approx(math.sqrt(6 / 1024), rel=0.02)
    both = created("dense_factorized")
    assert (both.within_weight.shape, both.block_weight.shape) == ((4, 16, 16), (4, 32, 16))
    bound(both.block_weight, 32, 16)
    mixed = created("mix")
    assert mixed.names == ("random", "dot")
    assert not mixed.logits.any()


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("dense", {"max_length": 0}, "max_length is too small"),
        ("dense", {"width": 0}, "width is too small"),
        ("dense_factorized", {"factor": 3}, "max_length is no multiple of factor = 3"),
        ("random_factorized", {"rank": 0}, "rank is too small"),
        ("mix", {"parts": ()}, "parts are no names of parts"),
        ("mix", {"parts": "dot"}, "parts are no names of parts"),
        ("mix", {"parts": ("dots",)}, "parts is unknown"),
        ("random", {"rank": 3}, "rank"),
    ],
)
def test_refuses(name: str, wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        filled(name, **wrong)

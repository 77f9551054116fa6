"""EIT's scores against loops over pairs of tokens and heads; what its interactions can and can't tell."""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.scores.eit import EnhancedScores, many_to_many_scores
from scores.naive_eit import naive_layer, naive_scores


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for n, p in enumerate(module.parameters()):
            p.copy_(0.7 * normal(50 + n, *p.shape))
    return module.double().eval()


def named(part: EnhancedScores) -> dict[str, Tensor]:
    return {name.replace(".", "_"): p for name, p in part.named_parameters()}


SIZES = [{}, {"hidden_inner": 3, "hidden_cross": 5, "channels": 2}, {"hidden_inner": 1, "hidden_cross": 2}]


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
def test_scores_are_the_definition(heads: int, groups: int, options: dict[str, int]) -> None:
    layer = randomised(regard.create("eit", dim=4 * heads, num_heads=heads, num_kv_heads=groups, **options))
    x = normal(1, 2, 4, 4 * heads).requires_grad_()
    allowed = (torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6) | torch.eye(4, dtype=torch.bool)
    allowed[0, 1] = False
    want = naive_layer(x, layer, named(layer.score), allowed)
    got = layer(x, mask=allowed[:, None])
    close(got, want, "out")
    g = normal(9, *got.shape)
    of = [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def test_every_query_head_meets_every_key_head() -> None:
    q, k = normal(0, 1, 3, 2, 4), normal(1, 1, 2, 5, 4)
    got = many_to_many_scores(q, k)
    for i in range(3):
        for j in range(2):
            close(got[0, i, j], q[0, i] @ k[0, j].T)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_a_neutral_start_is_plain_attention(heads: int, groups: int) -> None:
    sizes = {"dim": 12, "num_heads": heads, "num_kv_heads": groups, "causal": True}
    layer, plain = (regard.create(name, **sizes).double() for name in ("eit", "softmax"))
    assert layer.score.start_neutral()
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if "score" not in name})
    x = normal(1, 2, 5, 12)
    close(layer(x), plain(x))
    assert not EnhancedScores(4, hidden_cross=7).start_neutral()


def test_query_features_of_one_head_match_key_features_of_another() -> None:
    """Tokens ask in features of the first head for what keys tell in those of the second; the projections are fixed.

    Set by hand to pass S_01 on, the layer looks where it should. Plain attention reads S_00 and S_11, which are 0.
    """
    n, half = 6, 6
    layer = regard.create("eit", dim=2 * half, num_heads=2).double()
    layer.score.start_neutral()
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            proj.weight.copy_(torch.eye(2 * half))
        layer.score.inner.up[0] = layer.score.inner.up[0].flip(-1)
    asks, tells = torch.tensor([3, 5, 0, 4, 1, 2]), torch.arange(n)
    q = torch.zeros(1, n, 2 * half, dtype=torch.float64)
    q[0, torch.arange(n), asks] = 40.0
    context = torch.zeros_like(q)
    context[0, torch.arange(n), half + tells] = 1.0
    values = context.clone()
    values[..., :half] = normal(2, 1, n, half)
    with torch.no_grad():
        layer.k_proj.weight[:half] = 0  # the first head's keys say nothing
        out = layer(q, values)[0, :, :half]
    assert (out - values[0, asks, :half]).abs().max() < 1e-4
    even = values[0, :, :half].mean(0)
    assert (out - even).abs().max() > 0.5


def test_a_constant_on_all_scores_of_a_row_is_not_harmless() -> None:
    """ReLU sees signs, so what softmax would take away counts."""
    part = randomised(EnhancedScores(2, hidden_inner=3, hidden_cross=4))
    q, k = normal(0, 1, 2, 3, 4), normal(1, 1, 2, 5, 4)
    moved = torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, torch.full_like(k[..., :1], 2.0)], -1)
    plain, shifted = (regard.attention(*qk, k, score=part, scale=0.5) for qk in ((q, k), moved))
    assert (plain - shifted).abs().max() > 1e-3


def test_the_order_of_key_heads_is_that_of_the_weights() -> None:
    part, other = (randomised(EnhancedScores(3, hidden_inner=4)) for _ in range(2))
    q, k, order = normal(0, 1, 3, 2, 4), normal(1, 1, 3, 5, 4), [2, 0, 1]
    with torch.no_grad():
        other.inner.up.copy_(part.inner.up[..., order])
    close(naive_scores(q, k, named(part), 1.0), naive_scores(q, k[:, order], named(other), 1.0))
    v = normal(2, 1, 3, 5, 4)
    close(regard.attention(q, k, v, score=part), regard.attention(q, k[:, order], v, score=other))


def test_weights_do_not_grow_with_the_model() -> None:
    small, wide = (regard.create("eit", dim=dim, num_heads=4).score for dim in (16, 256))
    H = 4
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in wide.parameters())
    inner, cross = H * (2 * H * H + 2 * H + 2 * H + 1), 2 * H * H + 2 * H + H * 2 * H + H
    assert sum(p.numel() for p in small.parameters()) == inner + cross


def test_starts_as_convolutions_do() -> None:
    torch.manual_seed(0)
    part = EnhancedScores(8)
    for weight, bias in ((part.inner.up, part.inner.up_bias), (part.cross.up, part.cross.up_bias)):
        bound = weight.shape[-1] ** -0.5
        for values in (weight, bias):
            assert values.abs().max() <= bound
        assert weight.abs().max() > 0.95 * bound


def test_refusals() -> None:
    with pytest.raises(ValueError, match="hidden_inner is too small"):
        EnhancedScores(4, hidden_inner=0)
    with pytest.raises(ValueError, match="channels is too small"):
        EnhancedScores(4, channels=0)

"""Cosine attention against loops and the attention of transformers' Swin v2."""

import math

import pytest
import torch

import regard
from regard.heads import Cosine


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("most", [None, 5.0])
def test_equals_the_formula(shared: bool, most: float | None) -> None:
    part = Cosine(6, 4, start=3.0, largest=most, shared=shared).double()
    with torch.no_grad():
        part.log_scale.add_(normal(0, *part.log_scale.shape).abs())
    q, k = normal(1, 2, 4, 3, 6), normal(2, 2, 2, 5, 6)
    k[0, 0, 0] = 0  # a key of length 0 has no direction: its scores are 0
    left, right, v = part(q, k, k)
    assert v is k
    for b, h, t, j in torch.cartesian_prod(*map(torch.arange, (2, 4, 3, 5))).tolist():
        a, c = q[b, h, t].tolist(), k[b, h // 2, j].tolist()
        scale = math.exp(float(part.state_dict()["log_scale"][0 if shared else h]))
        scale = scale if most is None else min(scale, most)
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in c))
        want = scale * sum(x * y for x, y in zip(a, c, strict=True)) / lengths if lengths else 0.0
        assert abs(float(left[b, h, t] @ right[b, h // 2, j]) / math.sqrt(6) - want) < 1e-12


def test_equals_transformers_swin_v2() -> None:
    """A window without its position bias; one head's scale is beyond the bound."""
    swin = pytest.importorskip("transformers.models.swinv2.modeling_swinv2")
    other = swin.Swinv2SelfAttention(swin.Swinv2Config(qkv_bias=False), 24, 3, 4).double().eval()
    layer = regard.create("cosine", dim=24, num_heads=3).double()
    with torch.no_grad():
        for p in other.continuous_position_bias_mlp.parameters():
            p.zero_()  # 16 sigmoid(0) = 8 for every pair, which softmax doesn't see
        for n, (mine, theirs) in enumerate(
            zip((layer.q_proj, layer.k_proj, layer.v_proj), (other.query, other.key, other.value), strict=True)
        ):
            mine.weight.copy_(normal(n, 24, 24))
            theirs.weight.copy_(mine.weight)
        layer.o_proj.weight.copy_(torch.eye(24))
        layer.heads.log_scale.copy_(torch.tensor([1.0, 2.0, 7.0]))
        other.logit_scale.copy_(layer.heads.log_scale[:, None, None])
        x = normal(5, 2, 16, 24)
        torch.testing.assert_close(layer(x), other(x)[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_scores_stay_within_the_scale() -> None:
    """However long queries and keys are; and their length changes nothing."""
    layer = regard.create("cosine", dim=24, num_heads=3, start=4.0).double()
    q, k = normal(1, 2, 3, 5, 8), normal(2, 2, 3, 7, 8)
    left, right, _ = layer.heads(q, k, k)
    assert ((left @ right.mT).abs().amax() / math.sqrt(8)) <= 4 + 1e-9
    longer = layer.heads(1e6 * q, 1e-3 * k, k)
    torch.testing.assert_close(longer[:2], (left, right), rtol=1e-9, atol=1e-9)
    x = normal(3, 2, 5, 24)
    want = layer(x)
    layer.q_proj.weight.mul_(1000)
    torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-9)


def test_henrys_form_has_one_scale() -> None:
    part = regard.create("qk_norm_l2", dim=24, num_heads=3, start=200.0).heads
    assert part.log_scale.shape == (1,)
    left, right, _ = part(torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8))
    torch.testing.assert_close((left @ right.mT).flatten() / math.sqrt(8), torch.full((3,), 200.0))  # no bound


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Cosine: start is out of range \(got 0\); expected a finite number > 0"):
        Cosine(4, 2, start=0)
    with pytest.raises(ValueError, match=r"Cosine: largest is out of range \(got -1.0\)"):
        Cosine(4, 2, largest=-1.0)
    with pytest.raises(ValueError, match=r"Cosine: q has the wrong shape \(got \(1, 3, 5, 4\)\); expected .*H = 2"):
        Cosine(4, 2)(*(torch.zeros(1, 3, 5, 4),) * 3)

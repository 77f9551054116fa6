"""ALiBi (2108.12409): -m_h |i - j| is added to the scaled scores, with the authors' slopes."""

import math

import pytest
import torch

import regard
from positions.naive import CASES, attention, case, check, close, rows, vectors
from regard import masks
from regard.positions import Alibi


def slope(h: int, H: int) -> float:
    """2^(-8 (h + 1) / H) for a power of two; otherwise P < H of those, then every other one of 2P."""
    P = 2 ** math.floor(math.log2(H))
    return 2 ** (-8 * (h + 1) / P) if h < P else 2 ** (-4 * (2 * (h - P) + 1) / P)


@pytest.mark.parametrize("seed", CASES)
def test_matches_the_definition(seed):
    c = case(seed)
    H, D = c.q.shape[1], c.q.shape[-1]
    wanted = attention(c, lambda b, h, t, i, j: c.dot(b, h, t, j) / math.sqrt(D) - slope(h, H) * abs(i - j))
    check(c, Alibi(H), wanted)


@pytest.mark.parametrize("H", [1, 3, 4, 6, 8, 12])
def test_slopes_are_the_authors_and_blooms(H):
    zero = torch.zeros(1, H, 4, 2, dtype=torch.float64)
    bias = Alibi(H).bias(rows(zero, zero))
    slopes = -bias[0, :, 3, 2]
    close(slopes, vectors("B167")[f"slopes_{H}"], atol=1e-12)
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 4), H, torch.float32).view(H, 4)
    close(slopes, theirs.diff()[:, 0].double(), atol=1e-7)


@pytest.mark.parametrize("name", ["causal", "padded"])
def test_bloom_layer(name):
    z = {k: torch.tensor(v) for k, v in vectors("B167").items()}
    x = z["x"].double().requires_grad_()
    q, k, v = (x @ z["w_qkv"].double().T + z["b_qkv"].double()).view(2, 7, 3, 3, 4).permute(3, 0, 2, 1, 4)
    keep = z[f"{name}_key_mask"].bool()
    out = regard.attention(q, k, v, mask=masks.causal() & masks.padding(keep), position=Alibi(3))
    out = out.transpose(1, 2).flatten(2) @ z["w_o"].double().T + z["b_o"].double()
    close(out[keep], z[f"{name}_out"][keep], atol=1e-5)
    (out * z[f"{name}_w"]).sum().backward()
    close(x.grad, z[f"{name}_grad_x"], atol=1e-4)


def test_only_distances_matter():
    q, k = torch.randn(1, 4, 3, 2, dtype=torch.float64), torch.randn(1, 4, 5, 2, dtype=torch.float64)
    i, j = torch.arange(2, 5), torch.arange(5)
    assert torch.equal(Alibi(4).bias(rows(q, k, i=i, j=j)), Alibi(4).bias(rows(q, k, i=i + 1000, j=j + 1000)))


def test_without_content_weights_are_geometric():
    H, S = 8, 6
    zero, v = (
        torch.zeros(1, H, S, 2, dtype=torch.float64),
        torch.eye(S, dtype=torch.float64).expand(1, H, S, S),
    )
    weights = regard.attention(zero, zero, v, mask=masks.causal(), position=Alibi(H))
    for h in range(H):
        ratio = weights[0, h, -1, 1:] / weights[0, h, -1, :-1]
        close(ratio, torch.full_like(ratio, math.exp(slope(h, H))))


def test_half_precision_keeps_neighbours_apart_far_out():
    """With absolute m * j instead of distances, bf16 could not tell neighbouring keys apart at j = 60000."""
    q, k = torch.randn(1, 8, 1, 2).bfloat16(), torch.randn(1, 8, 3, 2).bfloat16()
    bias = Alibi(8).bias(rows(q, k, i=torch.tensor([60000]), j=torch.arange(59998, 60001))).double()
    close(bias[0, :, 0], -torch.tensor([[2.0, 1, 0]]) * torch.tensor([[slope(h, 8)] for h in range(8)]))


def test_refuses_other_heads():
    """A bias of one head would broadcast in silence."""
    z = torch.zeros(1, 1, 3, 2)
    with pytest.raises(
        ValueError, match=r"Alibi: q has the wrong shape \(got \(1, 1, 3, 2\)\); expected \(B, H = 4, t, D\)"
    ):
        Alibi(4).bias(rows(z, z))
    with pytest.raises(TypeError, match=r"Alibi: num_heads has the wrong type \(got True\); expected an int >= 1"):
        Alibi(True)

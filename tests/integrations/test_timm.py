"""timm's Attention with other mechanisms, against vectors of timm 1.0.31's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regard import masks
from regard.integrations.timm import Attention as OurAttention
from regard.integrations.timm import replace

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "timm_attention.npz")
KINDS = {
    "plain": {"qkv_bias": True},
    "normed": {
        "qk_norm": True,
        "scale_norm": True,
        "gated": True,
        "norm_layer": nn.LayerNorm,
        "attn_head_dim": 5,
        "dim_out": 7,
    },
}


def vector(name: str) -> Tensor:
    return torch.from_numpy(VECTORS[name])


def loaded(kind: str, **options) -> OurAttention:
    layer = OurAttention(12, num_heads=3, **KINDS[kind], **options).double().eval()
    prefix = f"{kind}/state/"
    layer.load_state_dict({n.removeprefix(prefix): vector(n) for n in VECTORS.files if n.startswith(prefix)})
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_timm_weights_load_strictly_and_give_timm_s_outputs(kind):
    layer, x = loaded(kind), vector(f"{kind}/x")
    torch.testing.assert_close(layer(x), vector(f"{kind}/y"))
    torch.testing.assert_close(layer(x, attn_mask=vector(f"{kind}/mask")), vector(f"{kind}/y_masked"))
    torch.testing.assert_close(layer(x, is_causal=True), vector(f"{kind}/y_causal"))
    added = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~vector(f"{kind}/mask"), -torch.inf)
    torch.testing.assert_close(layer(x, attn_mask=added), vector(f"{kind}/y_masked"))


def test_a_mechanism_changes_the_outputs_as_it_should():
    x, diagonal = vector("plain/x"), torch.eye(6, dtype=torch.bool).view(1, 1, 6, 6)
    torch.testing.assert_close(loaded("plain", mechanism=masks.window(1))(x), loaded("plain")(x, attn_mask=diagonal))
    assert (loaded("plain", mechanism="entmax")(x) - vector("plain/y")).abs().max() > 1e-3


class Attention(nn.Module):
    """A layer as timm's vision transformers have it."""

    def __init__(self, scale: float = 2**-1.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 2, 4, scale
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop, self.gate = nn.Dropout(0.0), nn.Dropout(0.0), None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


def vit(**options) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), Attention(**options)) for _ in range(2))).eval()


def test_replace_keeps_weights_and_outputs():
    model, x = vit(), torch.randn(2, 7, 8)
    expected, held = model(x), dict(model.named_parameters())
    assert replace(model, "softmax") == ["0.1", "1.1"]
    torch.testing.assert_close(model(x), expected)
    assert all(p is held[name] for name, p in model.named_parameters())
    assert replace(model, "gated") == ["0.1", "1.1"]
    assert {n for n, _ in model.named_parameters()} - held.keys() == {
        f"{n}.1.parts.gate.proj.{kind}" for n in (0, 1) for kind in ("weight", "bias")
    }


def test_layers_that_compute_something_else_are_refused():
    model = vit(scale=1.0)
    with pytest.raises(ValueError, match="does not compute what timm's Attention does"):
        replace(model, "softmax")
    assert type(model[0][1]) is Attention
    with pytest.raises(ValueError, match="no timm Attention layers"):
        replace(nn.Linear(3, 3), "softmax")
    with pytest.raises(ValueError, match="does not support bidirectional"):
        loaded("plain", mechanism="moba", block=2, topk=1)(vector("plain/x"))

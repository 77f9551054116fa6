"""A pytest plugin under which local-attention's layer is a window mask of regard's, with the package's own rotation."""

import torch
from local_attention import local_attention, transformer
from local_attention.rotary import apply_rotary_pos_emb
from torch import Tensor

import regard
from peers.counting import counted
from regard import masks


class LocalAttention(local_attention.LocalAttention):
    """Constructor and rotary embeddings are theirs; what queries, keys and values do is regard's."""

    @counted
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        window_size: int | None = None,
    ) -> Tensor:
        if self.shared_qk or self.use_xpos or window_size is not None or q.dim() != 4:
            raise NotImplementedError("local_attention: shared_qk, xpos and other layouts are not tried")
        W, back, ahead, T = self.window_size, self.look_backward, self.look_forward, q.shape[2]
        if self.rel_pos is not None:
            angles, scale = self.rel_pos(k)
            q, k = apply_rotary_pos_emb(q, k, angles, scale=scale)

        def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j // W >= i // W - back) & (j // W <= i // W + ahead)

        seen = masks.predicate(near)
        if self.exact_windowsize:
            seen = seen & masks.window(W * back + 1, ahead=W * ahead + 1)
        if self.causal:
            seen = seen & masks.causal()
        keep = input_mask if mask is None else mask
        if keep is not None:
            seen = seen & masks.padding(keep)
        bias = None
        if attn_bias is not None:  # of a query in its block and a key in the blocks around
            i, j = torch.arange(T)[:, None], torch.arange(T)
            bias = attn_bias[:, i % W, (j - (i // W - back) * W).clamp(0, attn_bias.shape[2] - 1)][None]
        return regard.attention(q, k, v, mask=seen, bias=bias, scale=self.scale, dropout=self.dropout.p * self.training)


def pytest_configure() -> None:
    for module in (local_attention, transformer):
        module.LocalAttention = LocalAttention

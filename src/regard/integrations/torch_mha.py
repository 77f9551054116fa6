"""torch.nn.MultiheadAttention with any mechanism: same constructor, same state dict, same call.

Torch's masks are the other way round than regard's: True hides. What differs from torch: a query that may see nothing
gives 0 where torch gives NaN, and the weights that come back are those before dropout.

`nn.TransformerEncoderLayer` has a fast path for inference that reads the weights past the layer and would leave the
mechanism out; `_qkv_same_embed_dim = False` tells it, by its own rule, not to take it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.checks import divides, flag, number, refuse, whole
from regard.integrations.slots import About, Parts, check_mechanism, slots_of, start_as_original, why_not
from regard.integrations.torch_mha_inputs import WHO, check_masks, check_tensors, masks_of, static_length
from regard.integrations.transformers_call import Call, weights
from regard.kernels import Problem, execute
from regard.kernels.check import lowest_masked
from regard.shapes import HeadShape


class MultiheadAttention(nn.Module):
    """Drop-in for torch.nn.MultiheadAttention.

    Args:
        embed_dim ... dtype: torch's own.
        mechanism, options: as in `regard.swap`. Its parameters are in `parts`, and start where the layer is softmax's.
            The keys of `add_bias_kv` and `add_zero_attn` are of no token and stand nowhere: a mechanism that asks where
            keys stand is refused beside them.

    Shapes: query (T, B, M), key (S, B, kdim), value (S, B, vdim), or batch first, or without a batch.
    """

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mechanism: Any = "softmax",
        **options: Any,
    ) -> None:
        super().__init__()
        flag(WHO, bias=bias, batch_first=batch_first, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn)
        number(WHO, least=0, most=1, dropout=dropout)
        whole(WHO, embed_dim=embed_dim, num_heads=num_heads)
        divides(WHO, num_heads=num_heads, embed_dim=embed_dim)
        D = embed_dim // num_heads
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, D
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.dropout, self.batch_first = dropout, batch_first
        self.add_zero_attn = add_zero_attn
        self._qkv_same_embed_dim = False
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **at))
            shapes: list[int | None] = [None] * 3
        else:
            self.register_parameter("in_proj_weight", None)
            shapes = [embed_dim, self.kdim, self.vdim]
        for name, width in zip(names, shapes):
            parameter = None if width is None else nn.Parameter(torch.empty(embed_dim, width, **at))
            self.register_parameter(name, parameter)
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * embed_dim, **at)) if bias else None)
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, embed_dim, **at)) if add_bias_kv else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **at)
        self.supports = check_mechanism(mechanism)
        self.parts = parts_for(mechanism, HeadShape(embed_dim, num_heads, num_heads, D), self.supports, options).to(
            **at
        )
        if (add_bias_kv or add_zero_attn) and not self.parts.placeless:
            got = f"{mechanism!r} beside add_bias_kv or add_zero_attn"
            refuse(WHO, "mechanism", "asks where keys stand", got, "one that doesn't: the keys added stand nowhere")
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            elif name in ("bias_k", "bias_v"):
                nn.init.xavier_normal_(parameter)
            else:
                nn.init.zeros_(parameter)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, mechanism: Any = "softmax", **options: Any
    ) -> "MultiheadAttention":
        """The same layer with another mechanism; weights are copied."""
        held = module.out_proj.weight
        made = cls(
            module.embed_dim,
            module.num_heads,
            dropout=module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device=held.device,
            dtype=held.dtype,
            mechanism=mechanism,
            **options,
        )
        made.load_state_dict({**made.state_dict(), **module.state_dict()})
        return made.train(module.training)

    def forward(
        self,
        query: Float[Tensor, "*b t M"],
        key: Float[Tensor, "*b s K"],
        value: Float[Tensor, "*b s W"],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        static_k: Float[Tensor, "BH S D"] | None = None,
        static_v: Float[Tensor, "BH S D"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: `key_padding_mask` (B, S) and `attn_mask` (T, S) or (B H, T, S) are True where a key is HIDDEN,
        or numbers to add to the scores. `is_causal` says that `attn_mask` is the causal one.

        Keys that the layer adds come last in the weights, first that of `add_bias_kv`; masks say nothing of them.

        Args:
            static_k, static_v: take the place of the projected keys and values, as in torch's function
                `multi_head_attention_forward`; its module has no way to them.
        """
        widths = (self.embed_dim, self.kdim, self.vdim)
        check_tensors(query, key, value, widths, self.out_proj.weight, batch_first=self.batch_first)
        batched, same = query.dim() == 3, query is key
        if is_causal and attn_mask is None:
            raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask, which must be given too")
        x, keys, values = (z[None] if not batched else z if self.batch_first else z.transpose(0, 1)
                           for z in (query, key, value))  # fmt: skip
        if self.bias_k is not None and (static_k is not None or static_v is not None):
            refuse(WHO, "static_k and static_v", "are given beside add_bias_kv", "both", "one of the two, as in torch")
        B, H = x.shape[0], self.num_heads
        S = static_length(static_k, static_v, (B * H, keys.shape[1], self.head_dim), self.out_proj.weight)
        sizes = (B, H, x.shape[1], S)
        check_masks(attn_mask, key_padding_mask, sizes, query)
        q, k, v = self._project(x, keys, values)
        k = k if static_k is None else static_k.unflatten(0, (B, H))
        v = v if static_v is None else static_v.unflatten(0, (B, H))
        k, v = self._with_more(k, self.bias_k), self._with_more(v, self.bias_v)
        more = k.shape[2] - S
        mask, bias, keep = masks_of(attn_mask, key_padding_mask, sizes, causal_hint=is_causal, more=more)
        scale, dropout = self.head_dim**-0.5, self.dropout if self.training else 0.0
        p = Problem(q, k, v, scale, mask=mask, bias=bias, dropout=dropout)
        call = Call(lowest_masked(p), keep, need_weights)
        check_call(self.supports, call, cross=not same)
        changed = self.parts.applied(call)
        self.parts.x = x
        out = self.parts.gated(execute(changed, self.parts.kernel).transpose(1, 2))
        self.parts.x = None
        y = self.out_proj(out.flatten(2))
        seen = weights(changed, self.parts.kernel) if need_weights else None
        if seen is not None and average_attn_weights:
            seen = seen.mean(1)
        if not batched:
            return y[0], None if seen is None else seen[0]
        return y if self.batch_first else y.transpose(0, 1), seen

    def _with_more(self, z: Float[Tensor, "B H S D"], bias: Tensor | None) -> Float[Tensor, "B H S1 D"]:
        """Keys or values with those behind them that the layer adds."""
        added = [] if bias is None else [bias.view(1, self.num_heads, 1, self.head_dim).expand(len(z), -1, -1, -1)]
        if self.add_zero_attn:
            added.append(z.new_zeros(*z.shape[:2], 1, self.head_dim))
        return torch.cat([z, *added], 2) if added else z

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        """(B, H, T, D), (B, H, S, D), (B, H, S, D)."""
        stacked = self.in_proj_weight
        parts = (
            stacked.chunk(3) if stacked is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        stack: Tensor | None = self.in_proj_bias  # type: ignore[assignment]
        biases = (None,) * 3 if stack is None else stack.chunk(3)
        return [
            F.linear(z, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for z, weight, bias in zip(inputs, parts, biases)
        ]


def parts_for(
    mechanism: Any, shape: HeadShape, supports: frozenset[str], options: dict[str, Any], *, rotary: bool = False
) -> Parts:
    """The mechanism's parts for a layer that hands over plain queries and keys, rotated only where it says so."""
    slots = slots_of(mechanism, shape, options)
    about = About(shape, "bidirectional" not in supports, False, False, rotary, False, False)
    if reasons := why_not(slots, about, supports):
        raise ValueError(f"mechanism: it can't serve here: {'; '.join(reasons)}")
    parts = Parts(slots)
    parts.supports = supports
    for part in parts.children():
        start_as_original(part)
    return parts


def check_call(supports: frozenset[str], call: Call, *, cross: bool) -> None:
    """Raises ValueError where the mechanism does not support this kind of call."""
    if cross and "cross" not in supports:
        raise ValueError("mechanism: it does not support cross-attention, and query and key are different tensors")
    if not {"causal", "bidirectional"} <= supports:
        kind = "causal" if call.causal else "bidirectional"
        if kind not in supports:
            raise ValueError(f"mechanism: it does not support {kind} attention; the masks given make it so")

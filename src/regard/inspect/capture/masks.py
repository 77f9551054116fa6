"""What the attention functions of transformers are given to hide keys, in its several forms, as True = may attend."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import refuse


def as_mask(
    given: Any, name: str, module: nn.Module, q: Tensor, k: Tensor, options: Mapping[str, Any]
) -> tuple[Bool[Tensor, "#B #H T S"] | None, Float[Tensor, "#B #H #T #S"] | None]:
    """The mask, and what the mask adds to scores beyond hiding, if anything; both None where all see all."""
    T, S = q.shape[2], k.shape[2]
    if "flash" in name:
        return _of_flash(given, module, T, S, options, q.device), None
    if given is None:
        # Where a decoder's function is given no mask, torch's kernel hides later keys; eager and flex hide nothing.
        told = name not in ("eager", "flex_attention") and T > 1 and causal(module, options)
        # The library aligns torch's kernel top-left: keys behind the first T are not used.
        return (torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril() if told else None), None
    if not isinstance(given, Tensor):
        return _of_blocks(given, T, S, q.device), None
    given = given[..., :S].detach()
    if given.dtype == torch.bool:
        return given.expand(*given.shape[:2], T, S), None
    # Hidden keys carry the least number of their dtype, or of a narrower one that the mask was made in, or -inf.
    hidden = given <= torch.finfo(torch.float16).min
    seen = given.masked_fill(hidden, 0.0)
    mask = (~hidden).expand(*given.shape[:2], T, S) if hidden.any() else None
    return mask, (seen if seen.any() else None)


def causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether the function may take the layer for a decoder's where no mask says so."""
    told = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


def _of_flash(
    given: Tensor | None, module: nn.Module, T: int, S: int, options: Mapping[str, Any], device: torch.device
) -> Bool[Tensor, "#B 1 T S"] | None:
    """Flash kernels take padding (B, S), and are told of causality and windows; aligned bottom-right."""
    if options.get("cu_seq_lens_q") is not None:
        got = f"cu_seq_lens_q in {type(module).__name__}"
        refuse("trace", "packed sequences", "of a flash kernel are not read", got, "attn_implementation='sdpa'")
    decoder, window = causal(module, options), options.get("sliding_window")
    allowed = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    if decoder:
        allowed = allowed.tril(S - T)
    if window is not None:
        allowed = allowed.triu(S - T - window + 1)
        allowed = allowed if decoder else allowed.tril(S - T + window - 1)
    if given is not None:
        allowed = allowed & given[:, None, None, -S:].bool()
    return allowed if decoder or window is not None or given is not None else None


def _of_blocks(given: Any, T: int, S: int, device: torch.device) -> Bool[Tensor, "B H T S"]:
    """FlexAttention's BlockMask."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(given.mask_mod, given.shape[0], given.shape[1], T, S, device=str(device))

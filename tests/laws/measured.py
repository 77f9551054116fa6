"""What a call costs, counted rather than timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flops(call: Callable[[], Any]) -> int:
    """Two for each multiply-add of its matrix products and convolutions, by torch's own count.

    Which knows fused attention on GPUs alone.
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def largest(call: Callable[[], Any]) -> int:
    """Numbers in the largest tensor that it makes on the way."""
    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Watch():
        call()
    return max(sizes)

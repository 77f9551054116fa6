"""What a call costs, counted rather than timed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard.kernels.flops import FlopCounter


def flops(call: Callable[[], Any]) -> int:
    """Two for each multiply-add, as `regard.kernels.flops` counts them."""
    with FlopCounter() as counter:
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


def footprint(call: Callable[[], Any], most: int = 10**5) -> tuple[int, int]:
    """Bytes of the largest memory that anything made on the way lies in, and how many operators ran, of `most`.

    What lies where an operator's input lay, as a transposed weight does, was made before.
    """
    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            made = (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor))
            sizes.append(max((memory.nbytes() for memory in made if memory._cdata not in given), default=0))
            assert len(sizes) <= most, f"{most} operators"
            return out

    with Watch():
        call()
    return max(sizes), len(sizes) - 1

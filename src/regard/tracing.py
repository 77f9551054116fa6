"""Whether a branch may look at what tensors hold, and what torch is doing to a function while it runs.

Values don't depend on the answers, only how they are come by: where nobody may look, a test and its branch become a
`where` over everything. Two exceptions: eager calls off the CPU leave NaN in hidden places alone, and compiled sums
over more than `regard.kernels.sums.MANY` keys are torch's own.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def readable(*tensors: Tensor) -> bool:
    """Whether there are numbers to look at: not while compiling or tracing, under torch.func, or without data."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return not transformed(*tensors) and not any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def active() -> bool:
    """Whether anything of torch.func or forward-mode AD is at work at all."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # whoever traces torch.func has its levels entered while it does
def traced_transform() -> bool:
    """The same, asked where torch.compile traces."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def transformed(*tensors: Tensor) -> bool:
    """Whether torch.func (vmap, grad, jvp ...) or forward-mode AD works on any: code of ours has no rules for them."""
    if not active():  # mostly so, and told at once
        return False
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return True
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def exporting() -> bool:
    """Whether torch.export looks on. Its one graph is for all lengths: no count of chunks, and no branch, may depend on
    the length, nor may torch have to ask whether something that does is 1."""
    return torch.compiler.is_exporting()


def recomputing() -> bool:
    """Whether backward is at work, as when a checkpoint runs `forward` once more: what it moved must not move twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there. Devices without any, as meta, know no answer."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def as_it_is(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside: sums that were widened must not be narrowed again."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()

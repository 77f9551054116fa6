"""Layers that are watched as modules: regard's own, and torch's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from regard.inspect.capture import own, torch_mha
from regard.inspect.capture.recorder import Recorder
from regard.inspect.effective import reads


@contextmanager
def watching(recorder: Recorder) -> Iterator[None]:
    """Record the calls of the model's layers of these kinds.

    The hook is one for all modules, not one on each: torch's encoder layer gives up its fused kernel, and with it its
    bits, where a module inside it carries a hook.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module not in recorder.names:
            return
        if reads(module):
            own.record(recorder, module, args, kwargs)
        elif isinstance(module, nn.MultiheadAttention):
            torch_mha.record(recorder, module, args, kwargs)

    handle = register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

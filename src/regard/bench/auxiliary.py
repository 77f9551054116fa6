"""Losses that mechanisms have of their own, beside the task's.

A card names the method that gives it, `Card.auxiliary`: it takes what `forward` takes and returns a scalar, which the
module's `auxiliary_weight` weighs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from regard.cards import _registry


@contextmanager
def auxiliary_losses(model: nn.Module) -> Iterator[Callable[[], list[Tensor]]]:
    """Watch what the model's modules are called with; yields a function that gives their weighted losses.

    They are those of all calls since it was last asked; none, for a model that has no such module.
    """
    calls: list[Callable[[], Tensor]] = []

    def note(method: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.auxiliary_weight:
            calls.append(lambda: module.auxiliary_weight * getattr(module, method)(*args, **kwargs))

    def losses() -> list[Tensor]:
        made = [call() for call in calls.copy()]
        calls.clear()  # of calls that the losses made themselves, too
        return made

    with ExitStack() as hooks:
        for module, method in having(model):
            hook = module.register_forward_pre_hook(partial(note, method), with_kwargs=True)
            hooks.callback(hook.remove)
        yield losses


def having(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that have such a loss, with the method that gives it."""
    named: dict[object, str] = {}
    for card in _registry.values():
        if card.auxiliary:  # its modules are known by their class, or by the name that `regard.create` gives them
            named |= {card.builder: card.auxiliary, card.name: card.auxiliary}
    for module in model.modules():
        keys = (*type(module).__mro__, str(getattr(module, "name", "")))
        method = next((named[key] for key in keys if key in named), "")
        if method and hasattr(module, method):
            yield module, method

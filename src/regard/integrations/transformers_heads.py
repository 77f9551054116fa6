"""Gates on the heads of a transformers model: to silence, weigh or learn them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.integrations.interface import Interception, check_model, layers, unique

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def scale_heads(
    model: "PreTrainedModel", gates: Float[Tensor, "L H"] | Sequence[Float[Tensor, " H"]]
) -> Iterator["PreTrainedModel"]:
    """Inside the `with` block, each head's output is multiplied by its gate: 0 silences it, 1 leaves it as it is.

    Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (https://arxiv.org/abs/1905.10650), whose head mask
    transformers dropped in version 5. Differentiable in the gates. The model computes as it would without them.

    Args:
        gates: a row for each of `regard.integrations.interface.layers(model)`, in that order: encoder before decoder,
            self- before cross-attention. Layers with different numbers of heads take a sequence of rows.

    Raises:
        TypeError, ValueError: no transformers model, or gates that don't fit it.
    """
    check_model(model)
    attending = layers(model)
    if len(gates) != len(attending):
        raise ValueError(
            f"scale_heads: gates must have a row for each of the {len(attending)} attention layers, got {len(gates)}"
        )
    place = unique("_regard_gate")  # stands on the layer, and so on its copies

    def scaled(original: Any, module: nn.Module, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        gate = gates[getattr(module, place)]
        if gate.shape != (query.shape[1],):
            raise ValueError(
                f"scale_heads: gates of {type(module).__name__} must be ({query.shape[1]},), one for each head, "
                f"got {tuple(gate.shape)}"
            )
        out, seen = original(module, query, *args, **options)
        return out * gate.to(out)[:, None], seen

    for n, layer in enumerate(attending):
        setattr(layer.module, place, n)
    try:
        with Interception(model, scaled):
            yield model
    finally:
        for layer in attending:
            delattr(layer.module, place)

"""Relevancy maps: which inputs made the model answer so, by weights times their gradients.

xx[i, j] is how relevant token j of stream x is for its token i, xy[i, j] token j of the other stream; at the start
xx = yy = I, xy = yx = 0. The class token's own entry is left as it is; to set it to 0 is the reader's last step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import fits, refuse
from regard.inspect.analyses._maps import each_layer, floats

CARD = Card(
    "relevance",
    equation="""(5)  A' = mean over heads of max(dy/dA * A, 0)        y: what is explained, say the logit of a class
(6)  xx <- xx + A' xx        (7)  xy <- xy + A' xy                          self-attention in x
(8,9)  N(R) = (R - I) / rowsum(R - I) + I
(10) xy <- xy + N(xx)^T A' N(yy)        (11) xx <- xx + A' yx               queries in x, keys in y""",
    papers=(
        Paper(
            "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
            "Chefer, Gur, Wolf",
            2021,
            "2103.15679",
            "abstract; the authors' code, whose comments number the rules (5)-(11); with plain attention weights, as "
            'their "ours no lrp"',
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*T**2*S", ""),
    claim="One method for self-, co- and encoder-decoder attention; a token that decides the class by construction is "
    "ranked first: tests/inspect/analyses/test_relevance.py::test_the_token_that_decides_is_ranked_first.",
    differs=(
        "A row without relevance (0/0) is normalised to 0, where some of the authors' scripts give NaN.",
        "The class token's own entry is not set to 0.",
    ),
    verified="third-party",
)

Pair = tuple[Float[Tensor, "B _H _T _S"], Float[Tensor, "B _H _T _S"]]
"""A layer's attention weights, and the gradient of what is explained with respect to them."""


def weighted_attention(
    attention: Float[Tensor, "B H T S"], gradient: Float[Tensor, "B H T S"]
) -> Float[Tensor, "B T S"]:
    """(5): the mean over heads of what is positive in gradient times weight."""
    return (gradient * attention).clamp_min(0).mean(1)


def normalized(relevance: Float[Tensor, "B T T"]) -> Float[Tensor, "B T T"]:
    """(8, 9): what has been added to the identity, each row divided by its sum, and the identity back."""
    identity = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    rest = relevance - identity
    total = rest.sum(-1, keepdim=True)
    return rest / total.masked_fill(total == 0, 1) + identity


@dataclass(frozen=True, eq=False)
class Relevance:
    """The maps of two streams x and y, such as text and image, or decoder and encoder. Each rule gives new ones."""

    xx: Float[Tensor, "B T T"]
    xy: Float[Tensor, "B T S"]
    yx: Float[Tensor, "B S T"]
    yy: Float[Tensor, "B S S"]

    @classmethod
    def start(cls, batch: int, x: int, y: int, *, like: Tensor) -> "Relevance":
        """Before the first layer, for x and y tokens, each token means itself."""
        dtype = torch.promote_types(like.dtype, torch.float32)

        def eye(size: int) -> Tensor:
            return torch.eye(size, dtype=dtype, device=like.device).expand(batch, size, size)

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(batch, rows, columns, dtype=dtype, device=like.device)

        return cls(eye(x), zeros(x, y), zeros(y, x), eye(y))

    def turned(self) -> "Relevance":
        """The same with x and y exchanged."""
        return Relevance(self.yy, self.yx, self.xy, self.xx)

    def self_x(self, layer: Pair) -> "Relevance":
        """(6, 7): self-attention in x."""
        a = _weighted("self_x", layer, self.xx.shape[-1], self.xx.shape[-1], self.xx)
        return replace(self, xx=self.xx + a @ self.xx, xy=self.xy + a @ self.xy)

    def self_y(self, layer: Pair) -> "Relevance":
        """(6, 7): self-attention in y."""
        return self.turned().self_x(layer).turned()

    def cross_x(self, layer: Pair) -> "Relevance":
        """(10, 11): queries in x, keys in y. Where y never attends to x, yx is 0, and (11) adds nothing."""
        a = _weighted("cross_x", layer, self.xx.shape[-1], self.yy.shape[-1], self.xx)
        xy = self.xy + normalized(self.xx).mT @ a @ normalized(self.yy)
        return replace(self, xy=xy, xx=self.xx + a @ self.yx)

    def cross_both(self, x_to_y: Pair, y_to_x: Pair) -> "Relevance":
        """(10, 11) both ways at once, each from the old maps: a co-attention block. Queries of x_to_y are in x."""
        x, y = self.cross_x(x_to_y), self.turned().cross_x(y_to_x).turned()
        return Relevance(x.xx, x.xy, y.yx, y.yy)


def _weighted(rule: str, layer: Pair, queries: int, keys: int, like: Tensor) -> Float[Tensor, "B T S"]:
    attention, gradient = layer
    sizes = {"B": like.shape[0], "T": queries, "S": keys}
    fits(f"Relevance.{rule}", "B H T S", sizes, attention=attention, gradient=gradient)
    return weighted_attention(attention.to(like.dtype), gradient.to(like.dtype))


def self_relevance(layers: Sequence[Pair]) -> Float[Tensor, "B T T"]:
    """Self-attention only, rules (5, 6): row i tells which tokens position i owes what is explained to.

    Args:
        layers: (attention, gradient) of each layer, the one next to the input first.
    """
    R = _start("self_relevance", layers)
    for layer in layers:
        R = R.self_x(layer)
    return R.xx


@CARD.function
def attention_relevance(
    attention: Sequence[Float[Tensor, "B _H T T"]], gradients: Sequence[Float[Tensor, "B _H T T"]]
) -> Float[Tensor, "B T T"]:
    """`self_relevance` of each layer's maps and, map by map, the gradients of what is explained.

    Args:
        attention: the weights of each layer, the one next to the input first.
        gradients: of what is explained, with respect to each of them.
    """
    name = "attention_relevance"
    each_layer(name, attention, "B _H T T")
    if len(gradients) != len(attention):
        refuse(name, "gradients", "has another number of layers than attention", len(gradients), f"{len(attention)}")
    return self_relevance(list(zip(attention, gradients)))


def encoder_decoder_relevance(
    encoder: Sequence[Pair], decoder: Sequence[Pair], cross: Sequence[Pair]
) -> Float[Tensor, "B T S"]:
    """Row i tells which of the encoder's tokens position i of the decoder owes what is explained to.

    Args:
        encoder: self-attention of the encoder, each layer's (attention, gradient).
        decoder: self-attention of the decoder.
        cross: attention from the decoder to the encoder, as many as `decoder`.
    """
    if len(decoder) != len(cross):
        name = "encoder_decoder_relevance"
        refuse(name, "cross", "has another number of layers than decoder", len(cross), f"{len(decoder)} layers")
    memory = _start("encoder_decoder_relevance", encoder)
    for layer in encoder:
        memory = memory.self_x(layer)
    first = _start("encoder_decoder_relevance", decoder)
    B, T, S = first.xx.shape[0], first.xx.shape[-1], memory.xx.shape[-1]
    R = replace(Relevance.start(B, T, S, like=first.xx), yy=memory.xx)
    for own, other in zip(decoder, cross, strict=True):
        R = R.self_x(own).cross_x(other)
    return R.xy


def _start(name: str, layers: Sequence[Pair]) -> Relevance:
    if not layers:
        refuse(name, "layers", "is empty", layers, "(attention, gradient) of one at least")
    attention = layers[0][0]
    floats(name, "B H T T", attention=attention)
    return Relevance.start(attention.shape[0], attention.shape[-1], 0, like=attention)


def attention_gradients(
    model: nn.Module, inputs: Mapping[str, Any], target: Callable[[Any], Float[Tensor, ""]]
) -> dict[str, list[Pair]]:
    """What a transformers model attends to, and the gradients of what is explained.

    Args:
        model: loaded or set to `attn_implementation="eager"`; others give no weights that gradients reach.
        inputs: the keywords of its forward.
        target: from the model's output to the number to explain, say `lambda out: out.logits[0, 3]`. Sequences of a
            batch do not mix, so a sum over them explains each.

    Returns:
        By the names of its output (attentions, or encoder_attentions, decoder_attentions, cross_attentions), each
        layer's (attention, gradient).
    """
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if implementation != "eager":
        wanted = '"eager": call model.set_attn_implementation("eager") first'
        refuse("attention_gradients", "model", "has attention that no gradient reaches", repr(implementation), wanted)
    with torch.enable_grad():
        output = model(**{**inputs, "output_attentions": True})
        found = {n: list(output[n]) for n in output if n.endswith("attentions") and output[n] is not None}
        weights = [w for layers in found.values() for w in layers]
        if not weights or not all(isinstance(w, Tensor) and w.requires_grad for w in weights):
            refuse("attention_gradients", "model", "gave no weights with gradients", [*found], "each layer's weights")
        value = target(output)
        if not isinstance(value, Tensor) or value.dim():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            refuse("attention_gradients", "target", "gave no scalar", got, "one number to explain")
        gradients = iter(torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True))
    return {name: [(w.detach(), next(gradients)) for w in layers] for name, layers in found.items()}

"""Block spans: a token sees its block of tokens and the one before, as in most layers of MASFormer."""

from regard.cards import PLAIN, Card, Cost, Paper
from regard.masks.algebra import Mask
from regard.masks.patterns import near_blocks

PAPER = Paper(
    "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
    "Zhang, Ram, Hawkins, Zha, Zhao",
    2023,
    "2310.12442",
    "abstract, start of the introduction, a figure's caption in a summary; no code found",
)

CARD = Card(
    "block_span",
    equation="""allowed(i, j) = |floor(i / span) - floor(j / span)| <= previous   (causal: and j <= i)
in the layers that `regard.models.mixed_spans` leaves short; the others see all""",
    papers=(PAPER,),
    traits=PLAIN - {"position_free", "shift_invariant"},
    cost=Cost(
        "2*B*H*T*min(S, (2*previous + 1)*span - previous*(previous + 1)*span**2/max(S, (previous + 1)*span))*D",
        "2*min(S, (previous + 1)*span - 1)*G*D",
    ),
    claim="With one full layer anywhere every output can depend on every earlier token, and without it cannot: "
    "tests/masks/test_block_span.py::test_one_full_layer_reaches_everything.",
    differs=(
        "That a block sees one block before, and how long a span is in blocks, is not in what was read: `span` is the "
        "block, so that a query of a causal layer sees span + 1 to 2 span keys, fewer in the first block.",
        "Which layers are full, by default the lowest quarter, is this library's choice.",
        "The paper's model, its continued training and its data are not here; `regard.swap` takes the same words.",
    ),
    verified="reconstructed",
    example={"span": 3},
    defaults={"span": "ours", "previous": "ours"},
)


@CARD.fills("mask")
def block_span(*, span: int = 1024, previous: int = 1) -> Mask:
    """Blocks of `span` tokens, each of which sees itself and the `previous` ones (and later ones, if not causal)."""
    return near_blocks(span, previous)

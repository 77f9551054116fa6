"""Geometric attention: how a key's box lies to the query's multiplies its weight, learned per head."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, flag, number, refuse, whole
from regard.positions._boxes import boxes_at
from regard.stages import Made, Position, Rows, Tokens
from regard.tracing import readable

CARD = Card(
    "box_relation",
    equation="""c = (x0 + x1) / 2, w = x1 - x0 + offset of a box, and so for y       m asks, n is asked
u(m, n) = [log max(|c_m - c_n| / w_m, 1e-3), the same of y, log(w_m / w_n), the same of h]
E = [sin(100 u_c wavelength^(-8 f / dim)), then cos],   c-major, f = 0 .. dim / 8 - 1;   sine=False: E = u
g_h(m, n) = ReLU(w_h . E + b_h),   A = softmax_n(q_m . k_n / sqrt(D) + log max(g_h, floor))""",
    papers=(
        Paper(
            "Image Captioning: Transforming Objects into Words",
            "Herdade, Kappeler, Boakye, Soares",
            2019,
            "1906.05963",
            "abstract; official code",
        ),
        Paper(
            "Relation Networks for Object Detection",
            "Hu, Gu, Zhang, Dai, Wei",
            2017,
            "1711.11575",
            "not read; the code names it",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "mask", "gqa", "streaming", "dropout", "compile"},
    lacks={"cross": "a context stands in no boxes"},
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + B*H*T*S*embed_dim", "2*S*G*D + 4*S"),
    claim="Boxes alone can decide who is asked: the nearest region to the left is found, whatever regions look like: "
    "tests/positions/test_box_relation.py::test_finds_the_nearest_to_the_left.",
    differs=(
        "Boxes are handed in as `positions=`; without them tokens stand in a line, in boxes of 1 x 1.",
        "size_offset is 1 as in the code, which counts pixels but is trained on boxes in [0, 1]; the paper is said to "
        "have 0, with which scaling all boxes changes nothing.",
        "The paper is said to have log(w_n / w_m), the code has the inverse: the same but for signs of weights.",
        "Projections have biases where the layer is told so, as they do in the code, whose geometry is for 8 heads.",
        "Causal and streaming forms are ours; the code's extra skip, of no advantage by its own word, is left out.",
        "The words' decoder is a plain Transformer's and left to the caller; `RegionEncoder` is what it reads.",
    ),
    verified="third-party",
    tries={"wavelength": 100.0, "box_format": ..., "floor": 0.3},
    defaults=dict.fromkeys(("embed_dim", "wavelength", "sine", "size_offset", "floor", "box_format"), "code"),
)

Format = Literal["xyxy", "cxcywh"]


def displacement(
    asks: Float[Tensor, "*b t 4"], asked: Float[Tensor, "*b s 4"], size_offset: float = 1.0
) -> Float[Tensor, "*b t s 4"]:
    """u: how far away, and how much larger, in units of the box that asks."""
    (at, size), (other_at, other_size) = (
        ((z[..., :2] + z[..., 2:]) / 2, z[..., 2:] - z[..., :2] + size_offset) for z in (asks, asked)
    )
    at, size, other_at, other_size = (
        at[..., :, None, :],
        size[..., :, None, :],
        other_at[..., None, :, :],
        other_size[..., None, :, :],
    )
    far = ((at - other_at).abs() / size).clamp(min=1e-3).log()
    return torch.cat([far, (size / other_size).log()], -1)


def embedded(u: Float[Tensor, "*n 4"], dim: int = 64, wavelength: float = 1000.0) -> Float[Tensor, "*n {dim}"]:
    """E: sines of all four, then cosines."""
    f = torch.arange(dim // 8, device=u.device, dtype=u.dtype) / (dim // 8)
    angle = (100 * u[..., None] * wavelength**-f).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], -1)


@CARD.fills("position")
class BoxRelation(Position):
    """Adds log g of two boxes to their score; layers are called with `positions=boxes`, (B or 1, T, 4).

    Args:
        num_heads: H.
        embed_dim: of sines and cosines, a multiple of 8.
        wavelength: by how much the slowest frequencies are slower, nearly.
        sine: whether there are any; else g is of the four numbers themselves.
        size_offset: added to widths and heights; 1 where coordinates count pixels.
        floor: the least g, so that no key is lost.
        box_format: "xyxy" are two corners, "cxcywh" a centre and the sizes.

    Raises:
        ValueError: boxes that are not finite, or without width or height after the offset.
    """

    axes = 4

    def __init__(
        self,
        num_heads: int,
        *,
        embed_dim: int = 64,
        wavelength: float = 1000.0,
        sine: bool = True,
        size_offset: float = 1.0,
        floor: float = 1e-6,
        box_format: Format = "xyxy",
    ) -> None:
        super().__init__()
        whole(self, num_heads=num_heads)
        whole(self, 8, embed_dim=embed_dim)
        if embed_dim % 8:
            refuse(self, "embed_dim", "is no multiple of 8", embed_dim, "sines and cosines of four numbers")
        number(self, above=0, wavelength=wavelength, floor=floor)
        number(self, least=0, size_offset=size_offset)
        flag(self, sine=sine)
        choice(self, get_args(Format), box_format=box_format)
        self.num_heads, self.embed_dim, self.wavelength, self.sine = num_heads, embed_dim, wavelength, sine
        self.size_offset, self.floor, self.box_format = size_offset, floor, box_format
        self.weight = nn.Parameter(torch.empty(num_heads, embed_dim if sine else 4))
        self.bias_of_heads = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in the code: each head's weights Glorot uniform, and one bias, of torch's start, in all heads."""
        n = self.weight.shape[1]
        bound = (6 / (n + 1)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias_of_heads.copy_(
            torch.empty(1, device=self.weight.device).uniform_(-(n**-0.5), n**-0.5).expand(self.num_heads)
        )

    @torch.no_grad()
    def start_neutral(self) -> bool:
        """g = 1, which is plain attention."""
        self.weight.zero_()
        self.bias_of_heads.fill_(1)
        return True

    def prepare(self, tokens: Tokens) -> Made:
        if tokens.context is not tokens.x:
            refuse(self, "context", "stands in no boxes", "a context", "tokens that attend to each other")
        told = tokens.coordinates
        boxes = boxes_at(tokens.positions) if told is None else told
        boxes = boxes.to(torch.promote_types(tokens.x.dtype, torch.float32))
        if told is not None and self.box_format == "cxcywh":
            boxes = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
        if boxes.numel() and readable(boxes):
            sizes = boxes.detach()[..., 2:] - boxes.detach()[..., :2] + self.size_offset
            if not (bool(boxes.isfinite().all()) and bool((sizes > 0).all())):
                refuse(self, "boxes", "have no width or height", "NaN, or x1 < x0", f"{self.box_format}, finite")
        boxes = boxes.expand(len(tokens.x), *boxes.shape[-2:])[:, None]
        return Made(boxes, boxes)

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        assert rows.made.query is not None
        assert rows.made.key is not None
        u = displacement(rows.made.query[:, 0], rows.made.key[:, 0], self.size_offset)
        found = embedded(u, self.embed_dim, self.wavelength) if self.sine else u
        g = found @ self.weight.to(u.dtype).T + self.bias_of_heads.to(u.dtype)
        return g.clamp(min=self.floor).log().permute(0, 3, 1, 2).to(rows.q.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, embed_dim={self.embed_dim}, sine={self.sine}, size_offset={self.size_offset}"

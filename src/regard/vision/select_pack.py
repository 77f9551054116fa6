"""Select and pack attention: a gate chooses tokens, and those of all images share containers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, fits, flag, number, refuse, whole
from regard.masks import documents
from regard.pipeline.function import attention
from regard.shapes import head_shape
from regard.tracing import readable
from regard.vision.maps import to_map, to_tokens

NEIGHBOURS = (
    "images share containers, so that where one is cut depends on those before it; not with align, where it fits"
)

CARD = Card(
    "select_pack",
    equation="""s = max(x w_g + b_g, up(s of the layer before))      for each token (pixel) of each image
chosen where sigmoid(s) > threshold;   g = c sigmoid(s) x,   c = 1 where chosen and 0 elsewhere
training: (s + n_1 - n_0) / temperature in place of s, n Gumbel noise; c passes the gradient of that sigmoid
pack: the chosen g of image 1, of image 2, ..., in the raster order of the map rolled by -shift, cut every `length`
out = softmax(Q K^T / sqrt(D)) V W_o within a container, between tokens of one image;  0 where a token is not chosen
loss: binary cross entropy of sigmoid(s) with y = 1 where an object touches the token's cell, summed over layers""",
    papers=(
        Paper(
            "Context-Aware Token Selection and Packing for Enhanced Vision Transformer",
            "Zhang, Li, Seo, Cao",
            2024,
            "2410.23608",
            "abstract",
        ),
        Paper(
            "Enhancing Vision Transformers for Object Detection via Context-Aware Token Selection and Packing",
            "authors not seen",
            2026,
            "ICLR 2026",
            "abstract; a third-party account of its equations and tables",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional"},
    traits={"routed", "sparse"},
    cost=Cost("B*M*Y*X*(length + 1)", ""),
    claim="With the selection loss about as many tokens are kept as objects touch, and only those cost anything: "
    "tests/vision/test_select_pack.py::test_what_is_kept_approaches_the_objects.",
    differs=(
        "The Gumbel choice is of the logits (s, 0), its threshold is on the probability, and the map of the layer "
        "before is resized to the nearest pixel: these are inferred, as the paper's own equations were not read.",
        "No bias by relative position, which the account leaves unclear.",
        "The residual, the feed-forward on all tokens and the stages of windows before belong to the model around.",
    ),
    verified="reconstructed",
    example={"length": 8},
    tries={"threshold": 0.52, "temperature": ..., "shift": 1},
    exceptions={
        "L10": NEIGHBOURS,
        "L50 mapped_over_the_batch": NEIGHBOURS,
        "L29": "in training the choice is drawn with Gumbel noise",
    },
    defaults={
        "length": "ours, Swin's window of 7 x 7",
        "shift": "ours, of a layer between two shifted ones",
        "align": "ours, fewest containers",
        "threshold": "ours, either is as likely",
        "temperature": "ours",
        "bias": "ours, as Swin",
    },
)


class Packing(NamedTuple):
    """Tokens in containers. -1 = an empty place, which holds 0."""

    packed: Float[Tensor, "P L C"]
    image: Int[Tensor, "P L"]
    place: Int[Tensor, "P L"]


@checked()
def pack(
    x: Float[Tensor, "B N C"],
    chosen: Bool[Tensor, "B N"],
    *,
    length: int,
    order: Int[Tensor, " N"] | None = None,
    align: bool = False,
) -> Packing:
    """The chosen tokens of all images, one image after the other, in containers of `length` = L.

    Args:
        order: in which an image's tokens are taken; default as they stand.
        align: an image that would be cut, but fits into one container, starts a new one.

    Raises:
        ValueError: for shapes that don't fit together, or a length below 1.
    """
    whole("pack", length=length)
    B, N, C = x.shape
    order = torch.arange(N, device=x.device) if order is None else order
    x, chosen = x[:, order], chosen[:, order]
    starts, end = [], torch.zeros((), dtype=torch.long, device=x.device)
    for n in chosen.sum(1):
        room = -end % length
        start = torch.where((room < n) & (n <= length), end + room, end) if align else end
        starts.append(start)
        end = start + n
    first = torch.stack(starts) if starts else end.new_zeros(0)
    total = int(end) if readable(end) else B * N + (B * length if align else 0)
    slots = -(-total // length) * length
    at = torch.where(chosen, first[:, None] + chosen.cumsum(1) - 1, slots).flatten()
    image, place = (torch.full((slots + 1,), -1, device=x.device) for _ in range(2))
    image = image.scatter(0, at, torch.arange(B, device=x.device).repeat_interleave(N))[:slots]
    place = place.scatter(0, at, order.repeat(B))[:slots]
    packed = x.new_zeros(slots + 1, C).scatter(0, at[:, None].expand(-1, C), x.flatten(0, 1))[:slots]
    return Packing(*(z.unflatten(0, (slots // length, length)) for z in (packed, image, place)))


def unpack(packing: Packing, batch: int, tokens: int) -> Float[Tensor, "B N C"]:
    """Each packed token where it came from, and 0 where none did. B = `batch`, N = `tokens`."""
    packed, image, place = packing
    sizes = fits("unpack", "P L C", packed=packed)
    for name, where in (("image", image), ("place", place)):
        fits("unpack", "P L", {letter: sizes[letter] for letter in "PL"}, **{name: where})
    at = torch.where(image < 0, batch * tokens, image * tokens + place).flatten()[:, None].expand(-1, packed.shape[2])
    room = packed.new_zeros(batch * tokens + 1, packed.shape[2])
    return room.scatter(0, at, packed.flatten(0, 1))[:-1].unflatten(0, (batch, tokens))


def select_loss(scores: Sequence[Float[Tensor, "B Y X"]], objects: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """The cross entropy of each layer's scores with what objects touch, summed over layers; the paper takes 0.01 of it.

    Args:
        scores: of layers whose maps may be of different sizes.
        objects: 1 where an object is, on a map that is as fine as the finest of them, or finer.
    """
    if not scores:
        refuse("select_loss", "scores", "is empty", "no map", "those of at least one layer")
    losses = []
    for s in scores:
        touched = F.adaptive_max_pool2d(objects[:, None], s.shape[1:])[:, 0]
        losses.append(F.binary_cross_entropy_with_logits(s, touched.to(s.dtype)))
    return torch.stack(losses).sum()


class Selected(NamedTuple):
    """What a layer gives."""

    out: Float[Tensor, "B M Y X"]
    scores: Float[Tensor, "B Y X"]
    """For the next layer, and for `select_loss`."""
    chosen: Bool[Tensor, "B Y X"]


@CARD.module
class SelectPackAttention(nn.Module):
    """Attention among the tokens that a learned gate chooses, as many in each image as there are.

    Args:
        dim, num_heads: M and H.
        length: L, tokens in a container.
        shift: by how many pixels the map is rolled before it is packed, both ways.
        align: whether images that fit into a container are kept whole, for more padding.
        threshold: of the probability above which a token is chosen; lower keeps more.
        temperature: in training, of the sigmoid whose gradient the choice passes on.
        bias: of queries, keys, values and outputs.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        length: int = 49,
        shift: int = 0,
        align: bool = False,
        threshold: float = 0.5,
        temperature: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = head_shape(dim, num_heads, None, None, who=type(self).__name__).head_dim
        whole(self, length=length)
        whole(self, 0, shift=shift)
        flag(self, align=align, bias=bias)
        number(self, above=0, below=1, threshold=threshold)
        number(self, above=0, temperature=temperature)
        self.dim, self.num_heads, self.length, self.shift, self.align = dim, num_heads, length, shift, align
        self.threshold, self.temperature = threshold, temperature
        self.gate = nn.Linear(dim, 1)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02 and no bias, as Swin."""
        for proj in (self.gate, self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.trunc_normal_(proj.weight, std=0.02)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)

    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        return self.select(x).out

    @checked(M="dim")
    def select(
        self,
        x: Float[Tensor, "B M Y X"],
        previous: Float[Tensor, "B v u"] | None = None,
        *,
        noise: Float[Tensor, "B Y X 2"] | None = None,
    ) -> Selected:
        """The outputs, the scores and the choice.

        Args:
            previous: the scores of the layer before, of any size: what it chose firmly is chosen again.
            noise: Gumbel noise for the choice and against it; default drawn in training, and none in evaluation.
        """
        B, _, Y, X = x.shape
        r = to_tokens(x)
        s = self.gate(r)[..., 0].to(torch.promote_types(x.dtype, torch.float32))
        if previous is not None:
            s = torch.maximum(s, F.interpolate(previous[:, None].to(s.dtype), (Y, X))[:, 0].flatten(1))
        if noise is None and self.training:
            noise = -torch.empty(B, Y, X, 2, dtype=s.dtype, device=s.device).exponential_().log()
        if noise is None:
            soft = s.detach().sigmoid()
        else:
            soft = ((s + (noise[..., 0] - noise[..., 1]).flatten(1)) / self.temperature).sigmoid()
        chosen = ~(soft.detach() <= self.threshold)  # not `>`: what holds NaN is taken, so that it stays to be seen
        c = chosen.to(soft.dtype) + soft - soft.detach() if noise is not None else chosen.to(soft.dtype)
        gated = (c * s.sigmoid()).to(r.dtype)[..., None] * r
        at = torch.arange(Y * X, device=x.device).view(Y, X).roll((-self.shift, -self.shift), (0, 1)).flatten()
        most = int(chosen.sum()) if readable(chosen) else chosen.numel()
        room = min(self.length, max(1, most))  # one container holds all, however long it is said to be
        packing = pack(gated, chosen, length=room, order=at, align=self.align)
        packed, image, place = packing
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(packed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for proj in projections)
        out = self.o_proj(attention(q, k, v, mask=documents(image)).transpose(1, 2).flatten(2))
        out = to_map(unpack(Packing(out, image, place), B, Y * X), (Y, X))
        return Selected(out, s.unflatten(1, (Y, X)), chosen.unflatten(1, (Y, X)))

"""xPos: rotary pairs that fade with distance, fast ones most; at inference, keys of two blocks only."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, number, refuse, whole
from regard.masks.algebra import Mask
from regard.masks.patterns import blocks
from regard.positions._shared import frequencies, work_dtype
from regard.positions.rotary import Rotary, rotate
from regard.stages import Position
from regard.tracing import readable

CARD = Card(
    "xpos",
    equation="""q'_i = z_a^(i/b) R(i) q_i,   k'_j = z_a^(-j/b) R(j) k_j      on the a-th pair, R as of rotary
so that what pair a adds to the score fades as z_a^((i-j)/b),   z_a = (2a/D + gamma) / (1 + gamma),   a = 0 .. D/2 - 1
blockwise causal attention: j <= i and j // w in {i // w - 1, i // w},   w = trained_length // 2""",
    papers=(
        Paper(
            "A Length-Extrapolatable Transformer",
            "Sun, Dong, Patra, Ma, Huang, Benhaim, Chaudhary, Song, Wei",
            2022,
            "2212.10554",
            "abstract; sections 1-5; official code (torchscale)",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + 4*(B*H*T*D + B*G*S*D)", "2*S*G*D"),
    claim="What a query expects of keys falls more evenly with distance than by rotary, and scores depend on distance "
    "alone: tests/positions/test_xpos.py::test_resolution_exceeds_that_of_rotary, "
    "tests/positions/test_xpos.py::test_scores_fade_by_distance_alone.",
    differs=(
        "Algorithm 1 prints b = 1, and neither gamma nor b is named in the paper; with b = 1 the fastest pair would "
        "lose 5/7 at every token and could not be held at length 8192, as the paper says it is. gamma and b are the "
        "code's.",
        "The code counts the exponents from the middle of the sequence at hand, here they count from `centre`, so that "
        "keys can be cached; a common shift changes no score.",
        "Eq. 10 has a slip in its second row, where Algorithm 1 is right. Algorithm 1 multiplies scores by the mask; "
        "here, as in the code, what is masked is left out.",
        "The paper trains with plain causal attention and cuts it into blocks only at inference: build the layer with "
        "`trained_length` then, it has the same parameters. The code has no such mask.",
        "Positions farther from `centre` than scales can be held are refused (float32: 36,000 at the default b); the "
        "paper's own bound is float16 at 8192.",
        "The blocks of `trained_length` count from the first token of a row, padding among them: pad on the right.",
        "Bidirectionally, which the paper leaves out, later keys grow with distance as earlier ones fade.",
    ),
    verified="third-party",
    example={"scale_base": 16384.0},  # smaller ones can't hold the million keys of a law
    tries={"trained_length": 6, "centre": ...},
    defaults={
        "scale_base": "code",
        "gamma": "code",
        "base": "paper, section 3.2",
        "interleaved": "paper, Algorithm 1",
        "centre": "paper, Algorithm 1",
        "trained_length": "paper, which trains without blocks",
    },
)


def decay(head_dim: int, gamma: float, device: torch.device | None = None) -> Float[Tensor, " half"]:
    """z_a (eq. 9), in the widest float that the device has; it grows with a, to below 1."""
    wide = torch.float32 if device is not None and device.type == "mps" else torch.float64
    return (torch.arange(0, head_dim, 2, device=device, dtype=wide) / head_dim + gamma) / (1 + gamma)


def attention_resolution(scores: Float[Tensor, "*b N"]) -> Float[Tensor, "*b"]:
    """R of eq. 3: how well softmax tells distances apart, given the score that each distance 0 .. N - 1 expects.

    Source: https://arxiv.org/abs/2212.10554, section 3.1. The last distance has none to be compared with.
    """
    fits("attention_resolution", "*b N", None, scores=scores)
    weights = scores.softmax(-1)
    return (weights[..., :-1] * (weights[..., :-1] - weights[..., 1:])).sum(-1)


class XPos(Rotary):
    """Turns queries and keys of width `head_dim` as rotary does, and scales their pairs. No parameters.

    Source: https://arxiv.org/abs/2212.10554, section 3.2 and Algorithm 1.

    Args:
        head_dim: D, even.
        scale_base: b, how many tokens it takes until a pair has faded to z_a.
        gamma: > 0; the larger, the slower the fastest pairs fade.
        base: of the geometric frequencies.
        interleaved: whether pairs are neighbours, or D/2 apart.
        centre: the position at which nothing is scaled. Scores do not depend on it, but what can be held does: scales
            grow as 3.5^(1/b) a token, which float32 holds for some 36,000 tokens on either side, float16 for 4,500.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        scale_base: float = 512.0,
        gamma: float = 0.4,
        base: float = 10000.0,
        interleaved: bool = True,
        centre: int = 0,
    ) -> None:
        super().__init__(head_dim, base=base, interleaved=interleaved)
        number(self, above=0, scale_base=scale_base, gamma=gamma)
        whole(self, 0, centre=centre)
        self.scale_base, self.gamma, self.centre = scale_base, gamma, centre

    def turn(
        self, q: Tensor, k: Tensor, at: Int[Tensor, "*b T"], keys: Int[Tensor, "*b S"]
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G S D"]]:
        """Raises ValueError where positions are so far from the centre that scales can't be held."""
        fits(self, "B H T D", {"D": self.head_dim}, q=q)
        fits(self, "B H T D", {"D": self.head_dim}, k=k)
        return self._faded(q, at, 1.0), self._faded(k, keys, -1.0)

    def _faded(self, z: Tensor, positions: Tensor, sign: float) -> Tensor:
        """z turned, its pairs times z_a^(sign (position - centre) / b), in at least float32."""
        if z.numel() == 0:
            return z
        rate = decay(self.head_dim, self.gamma, z.device).log() * (sign / self.scale_base)
        self._holds(positions, z.dtype)
        turned = rotate(
            z.to(work_dtype(z)),
            self.angles(positions, frequencies(self.head_dim, self.base, z.device)),
            interleaved=self.interleaved,
        )
        scale = self.angles(positions - self.centre, rate).exp().to(turned.dtype)
        scale = scale.repeat_interleave(2, -1) if self.interleaved else torch.cat((scale, scale), -1)
        return (turned * (scale if scale.dim() == 2 else scale.unsqueeze(1))).to(z.dtype)

    def _holds(self, positions: Tensor, dtype: torch.dtype) -> None:
        if not (positions.is_cpu and readable(positions)):  # elsewhere NaN shows it: to ask would take time
            return
        slowest = -math.log(self.gamma / (1 + self.gamma)) / self.scale_base
        most = int(math.log(torch.finfo(dtype).max) / slowest)
        if (far := int((positions - self.centre).abs().max())) > most:
            wanted = f"at most {most} from centre for {dtype}; set centre, or a larger scale_base"
            refuse(self, "positions", "are too far for scales to be held", far, wanted)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_base={self.scale_base:g}, gamma={self.gamma:g}, centre={self.centre}"


@CARD.fills()
def xpos(
    head_dim: int,
    *,
    scale_base: float = 512.0,
    gamma: float = 0.4,
    base: float = 10000.0,
    interleaved: bool = True,
    centre: int = 0,
    trained_length: int | None = None,
) -> dict[str, Position | Mask]:
    """The position, and the mask of blockwise causal attention where a trained length is given.

    Args:
        scale_base, gamma, base, interleaved, centre: as of `XPos`.
        trained_length: l; queries then see their own block of l // 2 tokens and the one before, so never farther than
            in training. None: all that the layer's other masks allow.
    """
    parts: dict[str, Position | Mask] = {
        "position": XPos(
            head_dim, scale_base=scale_base, gamma=gamma, base=base, interleaved=interleaved, centre=centre
        )
    }
    if trained_length is not None:
        whole("xpos", 2, trained_length=trained_length)
        parts["mask"] = blocks(trained_length // 2, before=1)
    return parts

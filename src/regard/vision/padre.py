"""PADRe: a polynomial of the pixels, by convolutions and elementwise products, in place of attention."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, refuse, whole

PAPER = Paper(
    "PADRe: A Unifying Polynomial Attention Drop-in Replacement for Efficient Vision Transformer",
    "Letourneau, Singh, Cheng, Han, Shi, Jones, Langston, Cai, Porikli",
    2024,
    "2407.11306",
    "abstract; an account of its method by a reader; third-party code of a 1-D form; not the paper's body",
)

CARD = Card(
    "padre",
    equation="""Y_i = A_i X B_i,   i = 1 .. d:   Z_1 = Y_1,   Z_{i+1} = (C_i Z_i D_i) * Y_{i+1},   y = Z_d
A, C act on places: depthwise K x K;   B, D on channels: 1 x 1, before them;   no softmax, no scale, no head""",
    papers=(PAPER,),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("(2*degree - 1)*B*Y*X*M*(M + kernel_size**2)", ""),
    claim="A polynomial of degree d: without biases t x gives t^d y: "
    "tests/vision/test_padre.py::test_is_homogeneous_without_biases.",
    differs=(
        "Channels are mixed before places, as in the third-party code; with biases the order counts at borders.",
        "Zeros stand beyond the border, which the account leaves open.",
        "Nothing follows the last product, as in the account's experiments; out_proj is the map of the general form.",
        "The account names no starting values: they are torch's.",
        "The residual and the norm before it belong to the block around it.",
    ),
    verified="reconstructed",
    example={"kernel_size": 3},
    tries={"degree": 2},
    defaults={
        "degree": "paper, by account",
        "kernel_size": "paper, by account",
        "bias": "paper, by account",
        "out_proj": "paper, by account",
    },
)


def polynomial_recursion(
    ys: Sequence[Float[Tensor, "*b"]], mix: Sequence[Callable[[Tensor], Tensor]]
) -> list[Float[Tensor, "*b"]]:
    """Z_1 .. Z_d of Y_1 .. Y_d, `mix` being the d - 1 linear maps between them: Z_{i+1} = mix_i(Z_i) * Y_{i+1}.

    Other maps make other members of the family, such as Hyena's long convolutions. A polynomial with all degrees is a
    weighted sum of what comes out.

    Raises:
        ValueError: no Y, or another number of maps.
    """
    if not ys or len(mix) != len(ys) - 1:
        refuse("polynomial_recursion", "mix", "has the wrong length", len(mix), "one map less than ys, of which one is")
    zs = [ys[0]]
    for between, y in zip(mix, ys[1:], strict=True):
        zs.append(between(zs[-1]) * y)
    return zs


def check_polynomial(who: object, dim: int, degree: int, kernel_size: int, bias: bool, out_proj: bool) -> None:
    """Refuse what neither form takes."""
    whole(who, dim=dim, degree=degree, kernel_size=kernel_size)
    flag(who, bias=bias, out_proj=out_proj)


@CARD.module
class PolynomialMixer(nn.Module):
    """A polynomial of a map.

    Args:
        dim: C.
        degree: d; the paper's are 2 and 3.
        kernel_size: K, odd.
        bias: whether the maps have biases, which bring all lower degrees.
        out_proj: whether a 1 x 1 convolution follows the last product.

    Shapes: x (B, C, Y, X) -> (B, C, Y, X).
    """

    def __init__(
        self, dim: int, *, degree: int = 3, kernel_size: int = 11, bias: bool = True, out_proj: bool = False
    ) -> None:
        super().__init__()
        check_polynomial(self, dim, degree, kernel_size, bias, out_proj)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even, and has no centre", kernel_size, "an odd int")

        def place_map() -> nn.Sequential:
            depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)
            return nn.Sequential(nn.Conv2d(dim, dim, 1, bias=bias), depthwise)

        self.dim, self.degree = dim, degree
        self.first = nn.ModuleList(place_map() for _ in range(degree))
        self.between = nn.ModuleList(place_map() for _ in range(degree - 1))
        self.o_proj = nn.Conv2d(dim, dim, 1, bias=bias) if out_proj else None

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        y = polynomial_recursion([f(x) for f in self.first], list(self.between))[-1]
        return y if self.o_proj is None else self.o_proj(y)

    def extra_repr(self) -> str:
        return f"{self.dim}, degree={self.degree}"

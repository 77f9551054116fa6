"""BigBird: blocks of tokens see their neighbours, the first and the last block, and a few at random.

One softmax over all of them. The first and the last block see everything, so that any two tokens are two steps apart.
"""

from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import flag, refuse, whole
from regard.masks import Mask, bigbird
from regard.masks.random_blocks import Draw
from regard.routing._shared import ends, real_keys
from regard.stages import Selector

CARD = Card(
    "bigbird",
    equation="""n = T / b blocks of b = block tokens, g = num_global, w = window
block i sees block c where   i or c < g,   or i or c >= n - g,   or |i - c| <= w,   or c in R(h, i)
R(h, i): r = num_random blocks drawn without replacement among the others, for each head; not
         block n - 1 - g either for i = g, nor block g for i = n - 1 - g   (g = w = 1)
out_t = softmax over the keys of all blocks seen of q_t . k_j / sqrt(D)""",
    papers=(
        Paper(
            "Big Bird: Transformers for Longer Sequences",
            "Zaheer et al.",
            2020,
            "2007.14062",
            "abstract; start of the introduction; official code of masks and draws; the layer in transformers",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "mask", "gqa", "dropout", "compile"},
    lacks={
        "causal": "its first and last blocks see all, and all see the last one",
        "cross": "its blocks are those of one sequence",
        "streaming": "its first and last blocks see all, and all see the last one",
    },
    traits=PLAIN - {"position_free", "shift_invariant"},
    cost=Cost(
        "2*B*H*D*(min(T, 2*num_global*block)*S + max(0, T - 2*num_global*block)"
        "*min(S, (2*num_global + 2*window + 1 + num_random)*block))",
        "",
    ),
    claim="Any two tokens are within two steps, for a share of the pairs of about (5 + r) / n: "
    "tests/routing/test_bigbird.py::test_all_is_two_steps_away_for_a_share_of_the_pairs.",
    differs=(
        "Blocks seen are a set. In evaluation the layer in transformers has block 0 in place of every random one, and "
        "counts it once more each time, so that no weights of it are loaded; here evaluation sees what training sees.",
        "The last block may be short; the authors' model fills it up.",
        "All see all where n < 5 + r, so that r could not be drawn; transformers' model does from n <= 5 + 2 r on.",
        "What is drawn is a hash of seed, head and blocks; of draw='front' the authors' code has a rule of its own for "
        "1024, 3072 and 4096 tokens, which is left out. A pool of fewer than r is taken whole.",
        "Blocks are those of a row's real tokens, so that padding behind them changes nothing; the authors' model "
        "takes those of the batch. Masks are hard, where the code adds -10000.",
        "The form with extra global tokens is `etc`.",
    ),
    verified="third-party",
    exceptions={
        "L3 receptive_field": "which blocks are seen follows from the length, which a receptive field is not told"
    },
    example={"block": 2, "num_random": 1},
    tries={
        "draw": {"draw": "front", "block": 1, "num_random": 1},
        "num_global": {"num_global": 2, "block": 1},
        "window": {"window": 0, "block": 1},
    },
    defaults={
        "block": "code",
        "num_random": "code",
        "num_global": "code",
        "window": "code",
        "draw": "paper",
        "per_head": "code",
        "seed": "ours, the code's are the layers' numbers",
    },
)


@CARD.fills("selector")
class BigBird(Selector):
    """`regard.masks.bigbird` for whatever length comes. No parameters.

    Args:
        block: b, tokens.
        num_random, num_global, window, draw, seed: as of `regard.masks.bigbird`.
        per_head: whether each head has random blocks of its own.
    """

    streams = False

    def __init__(
        self,
        *,
        block: int = 64,
        num_random: int = 3,
        num_global: int = 1,
        window: int = 1,
        draw: Draw = "anywhere",
        per_head: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        whole(self, block=block)
        flag(self, per_head=per_head)
        self.block, self.num_random, self.num_global, self.window = block, num_random, num_global, window
        self.draw, self.per_head, self.seed = draw, per_head, seed
        self._mask(1, 1)  # which refuses options that can't be

    def _mask(self, T: int, heads: int, lengths: Int[Tensor, " B"] | None = None) -> Mask:
        return bigbird(
            T,
            heads if self.per_head else 1,
            block=self.block,
            num_random=self.num_random,
            num_global=self.num_global,
            window=self.window,
            draw=self.draw,
            seed=self.seed,
            lengths=lengths,
        )

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        T, S = q.shape[2], k.shape[2]
        if T != S:
            refuse(self, "k", "is of another length than q", S, f"{T}, the same tokens")
        real = real_keys(mask, S, k.device)
        if real is None:
            return self._mask(T, q.shape[1]).to(q.device)
        last = ends(real)[:, 0]
        return self._mask(T, q.shape[1], last)

    def extra_repr(self) -> str:
        return f"block={self.block}, num_random={self.num_random}, draw={self.draw!r}, seed={self.seed}"

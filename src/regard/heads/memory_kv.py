"""Persistent memory: learned keys and values that every query sees besides the sequence's.

A softmax over two sets of keys is the softmax over each, weighted by its sum of exponentials. So the sequence is
attended to as ever, by any kernel that tells the logarithm l of that sum, and the memory apart:

    y = sigmoid(l - m) y_sequence + sigmoid(m - l) y_memory,   m the memory's own

Masks, windows, caches and pages know nothing of it. A query that sees no key has l = -inf, and reads the memory alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import refuse, whole
from regard.stages import Memory

UNSEEN = "a query that sees no key reads the memory, which nothing hides"

CARD = Card(
    "memory_kv",
    equation="""y_t = softmax(q_t [K, M]^T / sqrt(D)) [V, U],
M = sqrt(D) m, U = sqrt(N) u;  m and u (G, N, D) are parameters
M stands nowhere: it meets q_t as it is before rotation, no bias is added, and no mask hides it""",
    papers=(
        Paper(
            "Augmenting Self-attention with Persistent Memory",
            "Sukhbaatar, Grave, Lample, Jegou, Joulin",
            2019,
            "1907.01470",
            "abstract; the authors' code, facebookresearch/adaptive-span, from which factors and starting values are",
        ),
    ),
    traits=PLAIN - {"normalised", "linear_in_values"},
    cost=Cost("2*B*H*T*(S+num_memories)*D", "2*S*G*D"),
    claim="It does the work of a feed-forward layer: one token alone, whose attention is linear in it, learns the "
    "exclusive or: tests/heads/test_memory_kv.py::test_a_token_alone_learns_the_exclusive_or.",
    differs=(
        "The paper puts it in the place of feed-forward layers; here it is a part, and what else a block has is the "
        "model's.",
        "x-transformers' attn_num_mem_kv has keys and values of variance 1 without the factors, and lets rotated "
        "queries meet them, as if they stood at position 0.",
        "A soft cap holds for its scores too; other functions of single pairs don't, which ask where a key stands.",
    ),
    verified="third-party",
    example={"num_memories": 3},
    exceptions={
        "L8 rows_that_see_nothing": UNSEEN,
        "L8 no_keys_at_all": UNSEEN,
    },
    defaults={"num_memories": "ours"},
)


class Memories(Memory):
    """These keys and values, used as they are. A parameter stays whose it is.

    Args:
        keys, values: (G, N, D) and (G, N, V).
    """

    def __init__(self, keys: Float[Tensor, "G N D"], values: Float[Tensor, "G N V"]) -> None:
        super().__init__()
        for name, z in (("keys", keys), ("values", values)):
            if not isinstance(z, Tensor) or z.dim() != 3 or not z.dtype.is_floating_point:
                got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                refuse("Memories", name, "are no memory", got, "floating point numbers (heads, number, width)")
        if keys.shape[:2] != values.shape[:2]:
            got = f"{tuple(keys.shape)} and {tuple(values.shape)}"
            refuse("Memories", "keys and values", "differ in heads or number", got, "one value for each key")
        self.keys, self.values = keys, values

    def forward(self) -> tuple[Float[Tensor, "G N D"], Float[Tensor, "G N V"]]:
        return self.keys, self.values

    def extra_repr(self) -> str:
        return f"heads={self.keys.shape[0]}, num_memories={self.keys.shape[1]}"


@CARD.fills("memory")
class MemoryKV(Memories):
    """Learned keys and values for each key head; `keys` and `values` (G, N, D) are the parameters.

    What is attended to is sqrt(D) keys and sqrt(N) values: of variance 1 at the start, as tokens' own after a norm,
    with parameters as small, and steps as large, as those of other layers.

    Args:
        num_memories: N.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, *, num_memories: int = 16) -> None:
        whole(type(self).__name__, num_memories=num_memories)
        shape = num_kv_heads, num_memories, head_dim
        super().__init__(nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _, N, D = self.keys.shape
        nn.init.normal_(self.keys, std=D**-0.5)
        nn.init.normal_(self.values, std=N**-0.5)

    def forward(self) -> tuple[Float[Tensor, "G N D"], Float[Tensor, "G N D"]]:
        _, N, D = self.keys.shape
        return self.keys * D**0.5, self.values * N**0.5

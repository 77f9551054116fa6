"""CKA: how alike the representations of two layers are, of one model or of two, whatever their width.

The estimate has no bias, so that it may be below 0 for what is unlike.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import refuse

CARD = Card(
    "representation_similarity",
    equation="""K = X X^T, L = Y Y^T over N inputs, diagonals set to 0
HSIC(K, L) = (tr(K L) + 1^T K 1 1^T L 1 / ((N-1)(N-2)) - 2 / (N-2) 1^T K L 1) / (N (N-3))
CKA = sum HSIC(K, L) / sqrt(sum HSIC(K, K) sum HSIC(L, L)), sums over batches""",
    papers=(
        Paper(
            "Teaching Matters: Investigating the Role of Supervision in Vision Transformers",
            "Walmer, Suri, Gupta, Shrivastava",
            2022,
            "2212.03862",
            "abstract; the authors' code (cka/cka_main.py), which follows Nguyen et al. 2020 (arXiv 2010.15327), eq. 3",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("N**2*M", ""),
    claim="Representations of different models compare: 1 under rotation and scale, near 0 for unrelated features: "
    "tests/inspect/analyses/test_representation_similarity.py::test_does_not_see_rotation_scale_and_shift, "
    "tests/inspect/analyses/test_representation_similarity.py::test_has_no_bias.",
    differs=("Gram matrices are not scaled by their greatest entry before they are summed over batches.",),
    verified="reconstructed",
)

Batch = Sequence[Float[Tensor, " _N *_F"]]
"""Features of one batch of inputs, one tensor a layer."""


@CARD.function
def representation_similarity(x: Sequence[Batch], y: Sequence[Batch] | None = None) -> Float[Tensor, "L K"]:
    """CKA of every layer of x with every layer of y, 1 for those that differ by rotation and scale only.

    Args:
        x: for each batch of at least 4 inputs, the features (N, ...) of each layer; all but N is flattened.
        y: another model's, on the same inputs; default x.

    Raises:
        ValueError: batches or inputs that differ in number, fewer than 4 inputs.
    """
    other = x if y is None else y
    name = "representation_similarity"
    if not x:
        refuse(name, "x", "is empty", x, "one batch at least")
    if len(x) != len(other):
        refuse(name, "y", "has another number of batches than x", len(other), f"{len(x)}")
    sums: list[Tensor] = []
    for one, two in zip(x, other, strict=True):
        K, L = _grams("x", one), _grams("y", two)
        if K.shape[1] != L.shape[1]:
            refuse(name, "y", "has a batch of other inputs than x", f"{L.shape[1]} inputs", f"the same {K.shape[1]}")
        parts = [_hsic(K, L), _hsic(K).diagonal(), _hsic(L).diagonal()]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    xy, xx, yy = sums
    return xy / (xx[:, None] * yy).sqrt()


def _grams(name: str, batch: Batch) -> Float[Tensor, "L N N"]:
    sizes = sorted({len(features) for features in batch})
    if len(sizes) != 1 or sizes[0] < 4:
        got = f"layers of {sizes} inputs"
        refuse("representation_similarity", name, "has a batch that says too little", got, "as many in all, at least 4")
    rows = [f.flatten(1).to(torch.promote_types(f.dtype, torch.float32)) for f in batch]
    return torch.stack([(r @ r.mT).fill_diagonal_(0) for r in rows])


def _hsic(K: Float[Tensor, "L N N"], other: Float[Tensor, "K N N"] | None = None) -> Float[Tensor, "L K"]:
    """The unbiased estimate for all pairs of Gram matrices without diagonal."""
    L = K if other is None else other
    N = K.shape[-1]
    trace = torch.einsum("aij,bij->ab", K, L)
    rows, columns = K.sum(-1), L.sum(-1)
    both = rows @ columns.mT
    return (trace + rows.sum(-1)[:, None] * columns.sum(-1) / ((N - 1) * (N - 2)) - 2 / (N - 2) * both) / (N * (N - 3))

"""Queries and keys of a head in one plane, over all sentences, so that near means attended (AttentionViz).

    q' = c q        k' = k / c + a        a = mean(c q) - mean(k / c)

Scaling queries and keys in opposite ways leaves q . k as it is, and a vector added to all keys adds the same to all
scores of a row, which the softmax drops: both are free, and are chosen so that queries and keys lie together. The keys
are moved onto the queries' centre; c gives both the same median distance from it.

C. Yeh et al., "AttentionViz: A Global View of Transformer Attention", 2023, https://arxiv.org/abs/2305.03210; read in
the account of one of its authors, C. Chen ("Visualizing Attention"), which names three ways to choose c. This is the
third. The first, by the weighted correlation of scores and distances of the nearest half percent of pairs, chose the
least c it was offered in most heads of a small BERT, which draws all queries into one point.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from regard.inspect.layers import LayerTrace

PROBE = 200
"""Queries, and keys, that agreement is measured on."""
NOWHERE = 65535
"""Both coordinates of a point that is no number."""


def joint(q: Float[Tensor, "N D"], k: Float[Tensor, "M D"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "M D"]]:
    """Queries and keys scaled in opposite ways and laid on one centre; their softmax weights stay as they were."""
    widths = [(x - x.mean(0)).norm(dim=-1).median() for x in (q, k)]
    scale = (widths[1] / widths[0]).sqrt() if min(widths) > 0 else torch.ones(())
    q, k = q * scale, k / scale
    return q, k + (q.mean(0) - k.mean(0))


def agreement(scores: Float[Tensor, "N M"], distances: Float[Tensor, "N M"]) -> float:
    """Correlation of a query's scores with its distances from the keys, on average: -1 is best, 0 says nothing."""
    x, y = (t - t.mean(-1, keepdim=True) for t in (scores, distances))
    spread = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return float(((x * y).sum(-1) / spread.clamp_min(1e-30)).mean())


def pca(points: Float[Tensor, "N D"]) -> Float[Tensor, "N 2"]:
    """The two directions of largest variance. An axis points to where its largest entry is positive."""
    centred = points - points.mean(0)
    axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(-1)[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    flat = centred @ axes
    return flat if flat.shape[-1] == 2 else torch.cat([flat, torch.zeros_like(flat)], -1)


def tsne(points: Float[Tensor, "N D"]) -> Float[Tensor, "N 2"]:
    """scikit-learn's t-SNE, started from PCA with a fixed seed. Seconds a head for a thousand points."""
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('t-SNE needs scikit-learn: pip install "regard[inspect]"') from error
    perplexity = max(1.0, min(30.0, (len(points) - 1) / 3))
    flat = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points.numpy())
    return torch.from_numpy(flat).to(points.dtype)


def umap(points: Float[Tensor, "N D"]) -> Float[Tensor, "N 2"]:
    """umap-learn's UMAP with a fixed seed."""
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("UMAP needs umap-learn: pip install umap-learn") from error
    return torch.from_numpy(UMAP(random_state=0).fit_transform(points.numpy())).to(points.dtype)


PLANES: dict[str, Callable[[Float[Tensor, "N D"]], Float[Tensor, "N 2"]]] = {"pca": pca, "tsne": tsne, "umap": umap}
"""Ways to lay points into a plane."""


def visible(layer: LayerTrace) -> tuple[Integer[Tensor, "N 2"], Integer[Tensor, "M 2"]]:
    """The queries that see a key, and the keys that some query sees, as (batch row, place): all but padding."""
    B, _, T, S = layer.shape
    if layer.mask is None:
        seeing, seen = torch.ones(B, T, dtype=torch.bool), torch.ones(B, S, dtype=torch.bool)
    else:
        mask = layer.mask.expand(B, -1, T, S)
        seeing, seen = mask.any(-1).any(1), mask.any(-2).any(1)
    if layer.kind == "self" and T == S:  # a padded query may see keys, but nobody sees its own key
        seeing = seeing & seen
    return seeing.nonzero(), seen.nonzero()


def spread(places: Integer[Tensor, "N 2"], count: int) -> Integer[Tensor, "n 2"]:
    """At most `count` of the places, evenly over all of them."""
    if len(places) <= count:
        return places
    return places[torch.linspace(0, len(places) - 1, count).round().long()]


def flat(
    layer: LayerTrace, head: int, queries: Integer[Tensor, "N 2"], keys: Integer[Tensor, "M 2"], *, plane: str
) -> tuple[Integer[Tensor, "L 2"], float]:
    """Queries, then keys, of one head in the plane, in steps of 1/65534 of the larger side; and their agreement.

    What holds NaN or infinity has no place: `NOWHERE`.
    """
    q = layer.q[queries[:, 0], head, queries[:, 1]].detach().cpu().double()
    k = layer.k[keys[:, 0], head // (layer.q.shape[1] // layer.k.shape[1]), keys[:, 1]].detach().cpu().double()
    finite = torch.cat([q, k]).isfinite().all(-1)
    places = torch.full((len(finite), 2), NOWHERE, dtype=torch.int32)
    placed, near = _placed(q[finite[: len(q)]], k[finite[len(q) :]], plane)
    places[finite] = placed
    return places, near


def _placed(q: Float[Tensor, "N D"], k: Float[Tensor, "M D"], plane: str) -> tuple[Integer[Tensor, "L 2"], float]:
    if not len(q) or not len(k):
        return torch.zeros(len(q) + len(k), 2, dtype=torch.int32), 0.0
    # Whatever their size, so that no square overflows; the plane is scaled anyway.
    q, k = (x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny) for x in (q, k))
    points = PLANES[plane](torch.cat(joint(q, k)))
    few, many = slice(0, len(q), 1 + len(q) // PROBE), slice(0, len(k), 1 + len(k) // PROBE)
    near = agreement(q[few] @ k[many].mT, torch.cdist(points[: len(q)][few], points[len(q) :][many]))
    low = points.amin(0)
    side = (points.amax(0) - low).max().clamp_min(1e-12)
    return ((points - low) / side * (NOWHERE - 1)).round().to(torch.int32), near

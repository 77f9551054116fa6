"""The lightning indexer against loops over pairs, the choices of transformers' DeepSeek V3.2, and full attention.

The loops' author has read neither the code nor this test.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import kept, lightning_indexer
from regard.routing._indexing import best
from regard.routing.lightning_indexer import LightningIndexer
from routing import naive_lightning_indexer as naive

VECTORS = Path(__file__).parents[1] / "vectors" / "S-dsa.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    small = {"dim": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 3}
    own = {"num_index_heads": 2, "index_dim": 6, "topk": 3, "rope_dim": 4}
    made = regard.create("lightning_indexer", **{**small, **own, **options}, causal=True).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return made


def angles(T: int, R: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, R, 2).double() / R)
    return at.cos().repeat(1, 2).expand(2, -1, -1), at.sin().repeat(1, 2).expand(2, -1, -1)


def naive_scores(indexer: LightningIndexer, x: Tensor, latent: Tensor) -> Tensor:
    R = 0 if indexer.rotary is None else indexer.rotary.head_dim
    norm, maps = indexer.k_norm, (indexer.wq_b.weight, indexer.wk.weight)
    return naive.indexer_scores(
        x, latent, *maps, norm.weight, norm.bias, indexer.weights_proj.weight, *angles(x.shape[1], R)
    )


def naive_attention(module: Any, x: Tensor, allow: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output of all heads, weights, and what was chosen."""
    q, k, v = (p(x).unflatten(-1, (-1, module.head_dim)) for p in (module.q_proj, module.k_proj, module.v_proj))
    chosen = naive.top_keys(scores.detach(), allow, module.selector.topk)
    return *naive.attend(q, k, v, chosen), chosen


@pytest.mark.parametrize("pairs", [1, 2**20])
@pytest.mark.parametrize("options", [{}, {"rope_dim": 0, "topk": 1}, {"topk": 99}, {"num_index_heads": 1, "topk": 4}])
def test_is_the_definition(options: dict, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_indexer, "PAIRS", pairs)
    module, x = layer(**options), normal(1, 2, 8, 8).requires_grad_()
    real = torch.arange(8) >= torch.tensor([[0], [2]])
    allow = torch.ones(8, 8, dtype=torch.bool).tril() & real[:, None]
    got = module(x, mask=masks.padding(real))
    out, _, _ = naive_attention(module, x, allow, naive_scores(module.selector, x, x))
    want = module.o_proj(out.flatten(2))
    close(got[real], want[real], "out")
    leaves = [x, *(getattr(module, f"{n}_proj").weight for n in "qkvo")]
    direction = normal(2, *got.shape) * real[..., None]
    for mine, theirs in zip(*(torch.autograd.grad((o * direction).sum(), leaves) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def test_chooses_as_transformers_does() -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix("i_"): torch.from_numpy(file[k]) for k in file}
    indexer = LightningIndexer(10, num_index_heads=2, index_dim=6, topk=3, rope_dim=4, q_dim=5).double()
    indexer.load_state_dict({name: z[name] for name in indexer.state_dict()})
    made, allow = indexer.features(z["x"], z["q_latent"], torch.arange(7)), z["allow"]
    scores = indexer._scores(made.query, made.key, torch.arange(7), masks.causal())
    close(scores[allow], z["scores"][allow], "scores")
    nothing = torch.zeros(2, 1, 7, 1).double()
    tiles = indexer(nothing, nothing, masks.causal(), made).dense(7)[:, 0]
    assert torch.equal(tiles, torch.zeros_like(tiles).scatter(2, z["topk"], True) & allow)


def test_of_equals_the_latest_are_taken() -> None:
    scores = torch.tensor([[1.0, 0, 0, 2, 0], [0, 0, 0, 0, 0], [3, -1, -2, 5, 4]])
    assert best(scores, 3).int().tolist() == [[1, 0, 0, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]]
    assert best(torch.tensor([1.0, torch.nan, 2, 3]), 2).tolist()[1]


@pytest.mark.parametrize("chosen", [False, True])
def test_the_loss_is_the_definition(chosen: bool) -> None:
    module, x = layer(), normal(1, 2, 7, 8)
    real = torch.arange(7) < torch.tensor([[7], [5]])
    allow = torch.ones(7, 7, dtype=torch.bool).tril() & real[:, None]
    scores = naive_scores(module.selector, x, x)
    _, _, picked = naive_attention(module, x, allow, scores)
    q, k, v = (p(x).unflatten(-1, (-1, 3)) for p in (module.q_proj, module.k_proj, module.v_proj))
    over = picked if chosen else allow
    want = naive.indexer_kl(scores, naive.attend(q, k, v, over)[1], over)
    got = module.selector.divergence(module, x, mask=masks.padding(real), chosen=chosen)
    close(got, want, "loss")
    leaves = list(module.selector.parameters())
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        close(mine, theirs, "gradient")
    loss = module.selector.divergence(module, x.requires_grad_(), chosen=chosen)
    others = [x, module.q_proj.weight, module.k_proj.weight]
    assert torch.autograd.grad(loss, others, allow_unused=True) == (None, None, None)


def test_sees_the_best_keys_alone() -> None:
    """The last token's output stays, whatever values and keys the others have; it changes with any chosen one's."""
    module, x = layer(topk=4), normal(0, 1, 12, 8)
    p = module._prepare(x, None, None, None)[0]
    seen = p.mask.dense(12)[0, 0, -1]
    assert seen.sum() == 4
    for s in range(12):
        other = p.v.clone()
        other[:, :, s] += 1
        out, changed = (regard.attention(p.q, p.k, v, mask=p.mask)[:, :, -1] for v in (p.v, other))
        assert torch.equal(out, changed) != bool(seen[s])


@pytest.mark.slow
def test_training_finds_what_attention_reads() -> None:
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "num_index_heads": 4, "index_dim": 8, "rope_dim": 0}
    module = layer(**sizes, topk=8).float()

    def recall(x: Tensor) -> tuple[float, float]:
        """Of the 8 keys of 64 that the last 8 tokens read most, and of all attention."""
        p, _, allowed, _ = module._prepare(x, None, None, None)
        full = regard.attention(p.q, p.k, torch.eye(64).expand(len(x), 1, -1, -1), mask=masks.causal())[:, 0]
        chosen = p.mask.dense(64)[:, 0]
        found = (best(full, 8) & chosen)[:, -8:].float().sum(-1).mean() / 8
        return float(found), float(kept(p.q, p.k, p.mask, mask=allowed).mass.mean())

    with torch.no_grad():
        for proj in (module.q_proj, module.k_proj):
            proj.weight.mul_(1.5)
        other = normal(99, 16, 64, 8).float()
        before = recall(other)
    optimizer = torch.optim.Adam(module.selector.parameters(), 0.03)
    for step in range(100):
        optimizer.zero_grad()
        module.selector.divergence(module, normal(step, 8, 64, 8).float(), chosen=step > 80).backward()
        optimizer.step()
    with torch.no_grad():
        after = recall(other)
    assert before[0] < 0.2, "a random choice finds 8 of 60"
    assert after[0] > 0.6
    assert after[1] > before[1] + 0.3


def test_starts_as_written() -> None:
    module = regard.create("lightning_indexer", dim=64, num_heads=2, causal=True)
    indexer = module.selector
    assert (indexer.num_index_heads, indexer.index_dim, indexer.topk) == (64, 128, 2048)
    assert (indexer.rotary.head_dim, indexer.rotary.base, indexer.k_norm.eps) == (64, 10000, 1e-6)
    assert {n for n, _ in indexer.named_parameters()} == {
        *("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": 0}, "topk is too small"),
        ({"rope_dim": 8}, "rope_dim is too large"),
        ({"rope_dim": 3}, "rope_dim"),
        ({"num_index_heads": 0}, "num_index_heads is too small"),
    ],
)
def test_refuses(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"LightningIndexer: {words}"):
        layer(**options)


def test_refuses_where_there_are_no_tokens() -> None:
    module, q = layer(), normal(0, 1, 4, 5, 3)
    with pytest.raises(ValueError, match="attention: selector LightningIndexer reads the tokens behind q and k"):
        regard.attention(q, q, q, selector=module.selector)
    with pytest.raises(ValueError, match=r"LightningIndexer: made is missing \(got None\); expected what"):
        module.selector(q, q, None)
    with pytest.raises(ValueError, match="LightningIndexer: layer has another selector"):
        module.selector.divergence(layer(), normal(0, 1, 5, 8))
    kerple = layer(position=regard.create("kerple", dim=12, num_heads=4).position)
    with pytest.raises(ValueError, match="layer does more than softmax of dot products"):
        kerple.selector.divergence(kerple, normal(0, 1, 5, 8))
    latent = layer()
    latent.selector = LightningIndexer(8, num_index_heads=2, index_dim=6, topk=3, rope_dim=4, q_dim=5).double()
    with pytest.raises(ValueError, match=r"LightningIndexer: q_dim is not the tokens' width \(got 8\); exp"):
        latent(normal(0, 1, 5, 8))

"""Landmark attention against loops over positions and the numbers of the authors' code (B065.npz).

The loops' author saw only the paper's account, neither code nor test.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing.landmark import LandmarkBlocks, LandmarkScores, landmark_scores
from routing import naive_landmark as naive

VECTORS = Path(__file__).parents[1] / "vectors" / "B065.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}


def run(z: dict[str, Tensor], x: Tensor, **parts: Any) -> tuple[Tensor, Tensor]:
    """Output and weights of all heads, with their projections."""
    wide = F.linear(x, z["Wqkv"], z["bqkv"]).unflatten(-1, (3, int(z["H"]), -1))
    q, k, v = wide.permute(2, 0, 3, 1, 4)
    out, one_hot = (
        regard.attention(q, k, u, mask=masks.causal(), **parts)
        for u in (v, torch.eye(x.shape[1]).to(v).expand(*v.shape[:2], -1, -1))
    )
    return F.linear(out.transpose(1, 2).flatten(2), z["Wo"], z["bo"]), one_hot


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Landmarks at equal distances, and at others in each row."""
    z = numbers(case)
    x = z["x"].requires_grad_()
    part = LandmarkScores(block=3) if case == "a" else LandmarkScores(landmarks=z["is_landmark"])
    out, weights = run(z, x, score_mix=part)
    close(out, z["out"], "out")
    close(weights, z["weights"], "weights")
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["grad_x"], "gradient")


def test_an_empty_block_counts_for_nothing() -> None:
    """Where the authors' code loses what its landmark gets; all else is as theirs, but for that factor."""
    z = numbers("edge")
    _, weights = run(z, z["x"], score_mix=LandmarkScores(landmarks=z["is_landmark"]))
    theirs = z["weights"]
    close(weights.sum(-1), torch.ones(1, 2, 7).double(), "rows")
    close(weights[:, :, 1:], (theirs / theirs.sum(-1, keepdim=True))[:, :, 1:], "weights")
    assert (theirs[:, :, 0] == 0).all(), "a landmark in front of all has nothing to see in their code"


def test_fetches_as_the_authors_code_does() -> None:
    z = numbers("c")
    x = torch.cat([z["x1"], z["x2"]], 1)
    parts = {"score_mix": LandmarkScores(block=2), "selector": LandmarkBlocks(block=2, topk=int(z["topk"]), chunk=12)}
    close(run(z, x, **parts)[0], torch.cat([z["out1"], z["out2"]], 1), "out")


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    made = regard.create("landmark", dim=8, num_heads=2, causal=True, **{"block": 2, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return made


def loops(module: Any, x: Tensor, chunk: int | None = None, **options: Any) -> Tensor:
    projections = torch.cat([getattr(module, f"{n}_proj").weight for n in "qkv"]), module.o_proj.weight
    marks = (torch.arange(x.shape[1]) % 3 == 2).expand(len(x), -1)
    if chunk is None:
        return naive.landmark_attention(x, marks, *projections, 2)
    memory = [naive.Memory() for _ in x]
    pieces = zip(x.split(chunk, 1), marks.split(chunk, 1), strict=True)
    outs = [naive.retrieve_chunk(*piece, *projections, 2, 2, memory=memory, **options) for piece in pieces]
    return torch.cat(outs, 1)


def test_is_the_definition() -> None:
    module, x = layer(), normal(1, 2, 10, 8).requires_grad_()
    got, want = module(x), loops(module, x)
    close(got, want, "out")
    leaves, direction = [x, *module.parameters()], normal(2, 2, 10, 8)
    for mine, theirs in zip(*(torch.autograd.grad((o * direction).sum(), leaves) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize(("choose", "theirs"), [("each", "per_token_and_head"), ("together", "max_over_heads")])
@pytest.mark.parametrize("chunk", [3, 4])
@pytest.mark.parametrize("topk", [1, 2])
def test_fetches_as_the_definition(topk: int, chunk: int, choose: str, theirs: str) -> None:
    """Chunks that end with a block, and chunks that cut one."""
    module, x = layer(topk=topk, chunk=chunk, choose=choose), normal(3, 2, 14, 8)
    close(module(x), loops(module, x, chunk, top_k=topk, selection=theirs), "out")
    assert (module(x) - layer()(x)).abs().max() > 1e-3, "all blocks give something else"


def test_all_blocks_are_the_grouped_softmax() -> None:
    x = normal(4, 1, 13, 8)
    close(layer(topk=99, chunk=4)(x), layer()(x))


def test_a_block_is_found_by_its_landmark() -> None:
    """Of a long past only the block whose landmark answers is read, and never the landmark's own value."""
    k, v = 0.1 * normal(0, 1, 1, 61, 8), normal(1, 1, 1, 61, 8)
    q = normal(2, 1, 1, 61, 8)
    k[0, 0, 24] = 9 * q[0, 0, 60]  # ends the fifth block of five
    parts = {"score_mix": LandmarkScores(block=4), "selector": LandmarkBlocks(block=4, topk=1, chunk=50)}

    def last(v: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=masks.causal(), **parts)[0, 0, 60]

    read = torch.autograd.functional.jacobian(last, v)[:, 0, 0].abs().sum((0, 2))
    assert set(read.nonzero().flatten().tolist()) == {*range(20, 24), *(t for t in range(50, 61) if t % 5 != 4)}
    near = [t for t in range(50, 61) if t % 5 != 4]
    assert read[20:24].sum() > 5 * read[near].sum(), "what answers is most of it"


def test_shares_of_blocks_are_those_of_landmarks() -> None:
    scores = normal(5, 1, 1, 12, 12)
    at = torch.arange(12)
    marks, group = (at % 4 == 3)[None], at.div(4, rounding_mode="floor")[None]
    got = landmark_scores(scores, marks, group, group, 3, (at <= at[:, None])[None, None]).softmax(-1)[0, 0]
    assert (got[:, 3::4] == 0).all()
    outer = torch.cat([scores[0, 0, 10, [3, 7]], scores[0, 0, 10, 8:11]]).softmax(0)
    close(torch.stack([got[10, :3].sum(), got[10, 4:7].sum()]), outer[:2], "shares")
    close(got[10, 4:7], outer[1] * scores[0, 0, 10, 4:7].softmax(0), "in the block")


@pytest.mark.parametrize("topk", [None, 1])
def test_a_stream_may_be_cut_anywhere(topk: int | None) -> None:
    module, x = layer(topk=topk, chunk=4), normal(6, 2, 15, 8)
    state, outs = module.init_state(2, 15), []
    for piece in x.split([1, 6, 1, 3, 4], 1):
        out, state = module.step(piece, state)
        outs.append(out)
    close(torch.cat(outs, 1), module(x))


def test_a_long_block_is_causal_attention() -> None:
    x = normal(7, 1, 9, 8)
    module = layer(block=9)
    module.score_mix = None
    close(layer(block=9)(x), module(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 0}, "block is too small"),
        ({"topk": 0}, "topk is too small"),
        ({"choose": "all"}, "choose is unknown"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**options)
    with pytest.raises(TypeError, match="LandmarkScores: landmarks has the wrong dtype"):
        LandmarkScores(landmarks=torch.zeros(3))

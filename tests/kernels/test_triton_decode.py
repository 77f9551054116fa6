"""Triton decoding over a prefix tree in Triton's interpreter: against the tree's own product, and how it is started."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from regard.cache import PrefixTree
from regard.kernels import triton_decode as kernel
from regard.laws.agreement import close, near, same

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU the interpreter stands in for it (see conftest)."""

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [1, 2], [1, 2, 3, 4, 5, 6, 8, 9], [1, 2, 3, 9, 9, 9], [], [4, 4, 4]]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def grown(
    prompts: list[list[int]], chunk: int, *, G: int = 1, D: int = 5, V: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[PrefixTree, list[int]]:
    """A tree with these sequences. A token's key depends on its name and place alone; unused places hold NaN."""
    tree = PrefixTree(G, D, value_dim=V, chunk=chunk, dtype=dtype, device=DEVICE)
    places, ids = 1 + max(map(len, prompts), default=0), []
    k, v = (normal(n, 10 * places, G, size).to(dtype) for n, size in enumerate((D, V)))
    for p in prompts:
        at = torch.tensor([10 * place + name for place, name in enumerate(p)], dtype=torch.long, device=DEVICE)
        ids.append(tree.add(k[at].transpose(0, 1), v[at].transpose(0, 1), tokens=p))
    used = torch.zeros(tree.k.shape[1], dtype=torch.bool, device=DEVICE)
    for i in ids:
        for at in _seen(tree, i):
            used[at] = True
    tree.k[:, ~used] = tree.v[:, ~used] = torch.nan
    return tree, ids


def _seen(tree: PrefixTree, sequence: int) -> list[slice]:
    from regard.cache.prefix_tree import _first

    return _first(tree._stretches(tree._sequences[sequence].chunks), tree.length(sequence))


def plain(tree: PrefixTree, q: Tensor, ids: list[int]) -> Tensor:
    """Softmax over the keys of each sequence, by itself."""
    rows = []
    for row, i in zip(q, ids, strict=True):
        k, v = (z.to(q.dtype).repeat_interleave(len(row) // len(z), 0) for z in tree.keys(i))
        weights = (k @ row[:, :, None] * q.shape[2] ** -0.5).softmax(1)
        rows.append((weights.mT @ v)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize(("chunk", "G", "R"), [(1, 2, 1), (3, 2, 1), (3, 1, 3), (64, 1, 3)])
def test_every_sequence_sees_its_own_tokens(chunk: int, G: int, R: int) -> None:
    tree, ids = grown(PROMPTS, chunk, G=G)
    q = normal(7, len(ids), G * R, 5)
    got = tree.attend(q, ids, kernel="triton")
    close(got, plain(tree, q, ids))
    same(got[4], torch.zeros_like(got[4]), "a sequence without tokens")


@pytest.mark.parametrize("length", [15, 16, 17, 32, 33])
def test_pieces_of_any_length(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Around the end of a tile, and of a piece; shared and own; wide heads of no round size."""
    monkeypatch.setattr(kernel, "LARGEST", 16)
    shared = [n % 10 for n in range(length)]
    tree, ids = grown([[*shared, 1], [*shared, 2, 3]], 8, D=17, V=19)
    q = normal(8, 2, 2, 17)
    close(tree.attend(q, ids, kernel="triton"), plain(tree, q, ids))


def test_more_rows_than_a_tile_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LARGEST", 4)
    tree, ids = grown([[1, 2, 3, n] for n in range(5)], 3)
    q = normal(9, 5, 2, 5)
    close(tree.attend(q, ids, kernel="triton"), plain(tree, q, ids))
    assert tree._last_pieces[2].most_rows == 2


def test_a_tree_that_grows_and_branches() -> None:
    """Pieces are made anew when paths change, and only then."""
    tree, ids = grown([[1, 2, 3, 4, 5]], 4)
    ids.append(tree.fork(ids[0]))
    made = []
    for step in range(5):
        tree.append(ids, normal(step, 2, 1, 1, 5), normal(step + 50, 2, 1, 1, 3))
        q = normal(step + 99, 2, 2, 5)
        close(tree.attend(q, ids, kernel="triton"), plain(tree, q, ids))
        made.append(tree._last_pieces[2])
    assert [a is b for a, b in pairwise(made)] == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    tree, ids = grown(PROMPTS, 3, dtype=dtype)
    del ids[4]
    q = normal(7, len(ids), 2, 5).to(dtype)
    near(tree.attend(q, ids, kernel="triton"), plain(tree, q.double(), ids), tree.attend(q, ids))


def test_scores_of_any_size() -> None:
    tree, ids = grown(PROMPTS[:4], 3)
    q = 1e4 * normal(7, 4, 2, 5)
    close(tree.attend(q, ids, kernel="triton"), plain(tree, q, ids))
    tree.k[:, tree._sequences[ids[1]].chunks[0].slot * 3] = torch.nan
    assert tree.attend(q, ids, kernel="triton")[1].isnan().all(), "a NaN among the keys stays one"


@pytest.mark.parametrize("split", [3, 512])
def test_caches_that_share_nothing(split: int) -> None:
    """Split-KV decoding; what lies beyond a row's length is not read."""
    lengths = torch.tensor([7, 0, 4], dtype=torch.int32, device=DEVICE)
    k, v, q = normal(1, 3, 2, 9, 5), normal(2, 3, 2, 9, 3), normal(3, 3, 4, 5)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = v[b, :, n:] = torch.nan
    got = kernel.decode_batch(q, k, v, lengths, split=split)
    for b, n in enumerate(lengths.tolist()):
        keys, values = (z[b, :, :n].repeat_interleave(2, 0) for z in (k, v))
        weights = (keys @ q[b, :, :, None] * 5**-0.5).softmax(1)
        close(got[b], (weights.mT @ values)[:, 0])
    same(got[1], torch.zeros_like(got[1]), "no keys")
    assert kernel.decode_batch(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 4, 3)


# --- how it is started --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 3, 4, 100])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_pieces_cover_every_token_of_every_row_once(split: int, at_once: int) -> None:
    shared = [((0, 1, 2), [slice(0, 8), slice(20, 24)]), ((0, 2), [slice(8, 12)])]
    own = [[slice(40, 44)], [slice(60, 72), slice(16, 20)], [], []]
    cut = kernel.pieces(shared, own, [16, 12, 16, 0], rows_at_once=at_once, split=split)
    seen: list[list[tuple[int, int]]] = [[] for _ in own]
    for start, tokens, _, slot, rows in torch.stack(cut[:5], 1).tolist():
        assert 1 <= tokens <= split
        assert rows <= at_once
        for row in cut.row_of[slot : slot + rows].tolist():
            seen[row] += range(start, start + tokens)
    want = [[*range(12), *range(20, 24), *range(40, 44)], [*range(8), *range(16, 24), *range(60, 72)]]
    want += [[*range(12), *range(20, 24)], []]
    assert [sorted(s) for s in seen] == want
    for row, (a, b) in enumerate(zip(cut.bounds.tolist(), cut.bounds[1:].tolist())):
        assert set(cut.row_of[cut.order[a:b]].tolist()) <= {row}
    assert sorted(cut.order.tolist()) == list(range(len(cut.row_of)))
    assert cut.rows[: cut.shared].max() == cut.most_rows
    assert cut.position[cut.shared :].tolist()[:1] == [16]


@pytest.mark.parametrize("heads", [1, 7, 128])
@pytest.mark.parametrize("D", [1, 64, 256])
def test_tiles_fit(heads: int, D: int) -> None:
    tile = kernel.tiles(heads, kernel.rows_at_once(heads), D, 64)
    assert tile.shared >= kernel.rows_at_once(heads) * heads
    assert tile.own >= heads
    assert tile.features >= D
    assert all(n >= 16 and n & (n - 1) == 0 for n in tile)
    assert tile.keys * max(tile.features, tile.values) <= kernel.ENTRIES


# --- refusals, and the real compiler ------------------------------------------------------------------------------


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, ids = grown([[1, 2]], 3)
    q = normal(0, 1, 2, 5).requires_grad_()
    with pytest.raises(NotImplementedError, match='kernel "triton" has no derivatives; expected kernel="torch"'):
        tree.attend(q, ids, kernel="triton").sum().backward()
    with pytest.raises(ValueError, match=r"PrefixTree: kernel is unknown .got 'flash'"):
        tree.attend(q, ids, kernel="flash")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernel.why_not(q.cpu()) == [
        "tensors are on cpu: only CUDA devices, or TRITON_INTERPRET=1 in the environment"
    ]
    monkeypatch.setattr(kernel, "installed", lambda: False)
    with pytest.raises(ValueError, match=r'kernel "triton" cannot run: triton is not installed: pip install "regard'):
        tree.attend(q, ids, kernel="triton")


def test_the_operator_keeps_torchs_rules() -> None:
    cut = kernel.pieces([], [[slice(0, 3)]], [0], rows_at_once=1, device=DEVICE)
    lengths = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    args = (normal(0, 1, 1, 4), normal(1, 1, 3, 4), normal(2, 1, 3, 4), list(cut[:8]), 1, 0, lengths, 0.5)
    torch.library.opcheck(kernel._decode, args, test_utils=("test_schema", "test_faketensor"))


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regard.kernels import _triton_decode as programs
from regard.kernels.triton_decode import tiles

tile = tiles(4, 16, 128, 128)
chosen = dict(H=32, R=4, D=128, V=128, SCALE=0.1, PRECISION="tf32", BM=64, BN=tile.keys, BD=128, BV=128)
kinds = {name: "*bf16" for name in ("q", "k", "v", "out")}
kinds |= {name: "*fp32" for name in ("m_out", "z_out", "o_out", "m_in", "z_in", "o_in")}
kinds |= {name: "i32" for name in ("from_piece", "k_head", "k_token", "v_head", "v_token")}
for program in (programs.run_pieces, programs.run_merge):
    names = program.arg_names
    types = {n: "constexpr" if n in chosen else kinds.get(n, "*i32") for n in names}
    fixed = {(n,): chosen[name] for n, name in enumerate(names) if name in chosen}
    options = dict(num_warps=4, num_stages=2)
    made = triton.compile(ASTSource(program, types, fixed), target=GPUTarget("cuda", 90, 32), options=options)
    print(len(made.asm["cubin"]) > 0, bool(re.search("mma", made.asm["ptx"])), made.metadata.shared)
"""


@pytest.mark.slow
def test_compiles_for_cuda() -> None:
    """Without a device: machine code that uses the matrix units, and fits into a multiprocessor's shared memory."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    (_, mma, memory), (made, *_) = (line.split() for line in done.stdout.splitlines())
    assert (made, mma) == ("True", "True")
    assert int(memory) <= 99 * 1024

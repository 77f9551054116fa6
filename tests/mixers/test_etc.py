"""ETC's global-local attention against loops over every query and key, and the authors' numbers (B096)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.mixers.etc import ETCAttention, Pieces, Table, distance_labels, global_local_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B096.npz"
PIECES = ("l2l", "l2g", "g2g", "g2l")


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def attend_one(q: Tensor, seen: list[tuple[Tensor, Tensor, int | None]], table: Table | None, head: int) -> Tensor:
    """One query, one head: softmax over (key, value, label) triples."""
    logits = []
    for key, _, label in seen:
        s = float(q @ key)
        if label is not None and table is not None:
            s += float(q @ table.vector[label, head]) + float(table.number[label, head])
        logits.append(s / math.sqrt(len(q)))
    largest = max(logits)
    e = [math.exp(s - largest) for s in logits]
    return sum(w / sum(e) * v for w, (_, v, _) in zip(e, seen, strict=True))  # type: ignore[return-value]


def oracle(
    long_q: Tensor,
    global_q: Tensor,
    k: Pieces,
    v: Pieces,
    radius: int,
    masks: Pieces,
    labels: Pieces,
    long_table: Table | None,
    global_table: Table | None,
) -> tuple[Tensor, Tensor]:
    B, H, N, _ = long_q.shape
    NG = global_q.shape[2]
    long_out = torch.zeros(B, H, N, v.l2l.shape[-1], dtype=long_q.dtype)
    global_out = torch.zeros(B, H, NG, v.l2l.shape[-1], dtype=long_q.dtype)

    def piece(given: Tensor | None, b: int, i: int, column: int) -> int | None:
        return None if given is None else int(given[min(b, given.shape[0] - 1), i, column])

    def entry(name: str, b: int, h: int, i: int, j: int, column: int) -> list[tuple[Tensor, Tensor, int | None]]:
        if piece(getattr(masks, name), b, i, column) == 0:
            return []
        key, value = getattr(k, name)[b, h, j], getattr(v, name)[b, h, j]
        return [(key, value, piece(getattr(labels, name), b, i, column))]

    for b, h in np.ndindex(B, H):
        for i in range(N):
            seen = []
            for j in range(max(0, i - radius), min(N, i + radius + 1)):
                seen += entry("l2l", b, h, i, j, j - i + radius)
            for j in range(NG):
                seen += entry("l2g", b, h, i, j, j)
            if seen:
                long_out[b, h, i] = attend_one(long_q[b, h, i], seen, long_table, h)
        for i in range(NG):
            seen = [one for j in range(NG) for one in entry("g2g", b, h, i, j, j)]
            seen += [one for j in range(k.g2l.shape[2]) for one in entry("g2l", b, h, i, j, j)]
            if seen:
                global_out[b, h, i] = attend_one(global_q[b, h, i], seen, global_table, h)
    return long_out, global_out


# The authors' numbers


def test_oracle_gives_the_authors_own_test() -> None:
    """Their unit test has one piece only: here the four keys are the long tokens of a global query."""
    z = vectors("authors_test_")
    q, k, v = (z[n].transpose(1, 2) for n in "qkv")
    none = torch.zeros(2, 2, 0, 3, dtype=torch.float64)
    got = oracle(
        none,
        q,
        Pieces(none, none, torch.zeros_like(q), k),
        Pieces(v[:, :, :0], none, v[:, :, :3], v),
        1,
        Pieces(None, None, torch.zeros(1, 3, 3), z["mask"]),
        Pieces(None, None, None, z["rel_ids"]),
        None,
        Table(z["rel_emb"], torch.zeros(z["rel_emb"].shape[:2], dtype=torch.float64)),
    )[1]
    assert (got.transpose(1, 2) - z["expected"]).abs().max() < 1e-6


@pytest.mark.parametrize("case", ["sparse_", "full_", "norel_wide_"])
@pytest.mark.parametrize("which", ["oracle", "module"])
def test_gives_the_authors_numbers(case: str, which: str) -> None:
    z = vectors(case)
    x_long = z["long_in"].clone().requires_grad_()
    x_global = z["global_in"].clone().requires_grad_()
    H = z["long_rel_emb"].shape[1]

    def project(x: Tensor, name: str) -> Tensor:
        return (x @ z[name + "_w"] + z[name + "_b"]).unflatten(-1, (H, -1)).transpose(1, 2)

    def source(name: str) -> Tensor:
        return x_long if name.endswith("2l") else x_global

    k = Pieces(*(project(source(n), n + "_key") for n in PIECES))
    v = Pieces(*(project(source(n), n + "_value") for n in PIECES))
    masks = Pieces(*(z[n + "_att_mask"].bool() if n + "_att_mask" in z else None for n in PIECES))
    ids = [z.get(n + "_relative_att_ids") for n in PIECES]
    labels = Pieces(*(None if i is None else i.long() for i in ids))
    tables = {
        side: Table(z[side + "_rel_emb"], z[side + "_rel_bias"]) if labels.l2l is not None else None
        for side in ("long", "global")
    }
    queries = project(x_long, "long_query"), project(x_global, "global_query")
    if which == "oracle":
        detached = [Pieces(*(t.detach() for t in pieces)) for pieces in (k, v)]
        outs = oracle(
            *(q.detach() for q in queries),
            *detached,
            int(z["radius"]),
            masks,
            labels,
            tables["long"],
            tables["global"],
        )
    else:
        outs = global_local_attention(
            *queries,
            k,
            v,
            radius=int(z["radius"]),
            masks=masks,
            labels=labels,
            long_table=tables["long"],
            global_table=tables["global"],
        )
    got = [
        out.transpose(1, 2).flatten(2) @ z[side + "_output_w"] + z[side + "_output_b"]
        for out, side in zip(outs, ("long", "global"), strict=True)
    ]
    close(got[0].detach(), z["long_out"])
    close(got[1].detach(), z["global_out"])
    if which == "module":
        sum((out * z["w_" + side]).sum() for out, side in zip(got, ("long", "global"), strict=True)).backward()
        close(x_long.grad, z["grad_long_in"])
        close(x_global.grad, z["grad_global_in"])


# The function against the loops


@pytest.mark.parametrize("seed", range(20))
def test_function_equals_the_loops(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    B, H, N, NG, D, V, radius = (int(torch.randint(1, n, (), generator=g)) for n in (3, 3, 12, 4, 5, 5, 5))
    labelled, masked = seed % 2 == 0, seed % 3 > 0
    shapes = Pieces((N, 2 * radius + 1), (N, NG), (NG, NG), (NG, N))
    keys = Pieces(N, NG, NG, N)
    k = Pieces(*(normal(10 * seed + n, B, H, size, D) for n, size in enumerate(keys)))
    v = Pieces(*(normal(20 * seed + n, B, H, size, V) for n, size in enumerate(keys)))
    samples = (1, B)[seed % 2]
    # Some queries may see nothing at all: their output is 0.
    masks = Pieces(*(torch.rand(samples, *s, generator=g) < 0.5 if masked else None for s in shapes))
    labels = Pieces(*(torch.randint(5, (samples, *s), generator=g) if labelled else None for s in shapes))
    tables = [Table(normal(3, 5, H, D), normal(4, 5, H)), Table(normal(5, 5, H, D), normal(6, 5, H))]
    long_table, global_table = tables if labelled else (None, None)
    long_q, global_q = normal(1, B, H, N, D), normal(2, B, H, NG, D)
    want = oracle(long_q, global_q, k, v, radius, masks, labels, long_table, global_table)
    got = global_local_attention(
        long_q,
        global_q,
        k,
        v,
        radius=radius,
        masks=masks,
        labels=labels,
        long_table=long_table,
        global_table=global_table,
    )
    for one, other in zip(got, want, strict=True):
        close(one, other)


def test_labels_count_distance_with_the_right_side_first() -> None:
    K = 3
    for d in range(-6, 7):
        want = min(d, K) if d >= 0 else K + min(-d, K)
        assert int(distance_labels(torch.tensor(d), K)) == want


# The layer


def filled(seed: int, *sizes: int, **options) -> ETCAttention:
    layer = ETCAttention(*sizes, **options).double().eval()
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.6 * normal(100 * seed + n, *parameter.shape))
    return layer


def layer_oracle(layer: ETCAttention, x: Tensor, keep: Tensor, num_global: int, radius: int, K: int | None) -> Tensor:
    """The layer by its description: projections by name, labels by distance, one for long-global pairs."""
    p = {name: value.detach() for name, value in layer.state_dict().items()}
    H = p["long_vector"].shape[1] if "long_vector" in p else layer.num_heads
    x_long, x_global = x[:, num_global:], x[:, :num_global]
    N, NG = x_long.shape[1], num_global

    def weight(kind: str, *names: str) -> tuple[Tensor, Tensor]:
        name = next(n for n in names if f"{kind}.{n}.weight" in p)
        return p[f"{kind}.{name}.weight"], p[f"{kind}.{name}.bias"]

    def project(z: Tensor, kind: str, *names: str) -> Tensor:
        w, b = weight(kind, *names)
        return (z @ w.T + b).unflatten(-1, (H, -1)).transpose(1, 2)

    def four(kind: str) -> Pieces:
        side = {"l": "long", "g": "global"}
        return Pieces(*(project(x_long if n[2] == "l" else x_global, kind, n, side[n[0]], "all") for n in PIECES))

    shapes = Pieces((N, 2 * radius + 1), (N, NG), (NG, NG), (NG, N))
    keep_long, keep_global = keep[:, NG:], keep[:, :NG]
    masks = Pieces(*(torch.zeros(len(x), *s, dtype=torch.bool) for s in shapes))
    labels = Pieces(*(torch.zeros(1, *s, dtype=torch.long) for s in shapes))

    def label(d: int) -> int:
        assert K is not None
        return min(d, K) if d >= 0 else K + min(-d, K)

    for b in range(len(x)):
        for i in range(N):
            for j in range(max(0, i - radius), min(N, i + radius + 1)):
                masks.l2l[b, i, j - i + radius] = keep_long[b, j]
                if K is not None:
                    labels.l2l[0, i, j - i + radius] = label(j - i)
        masks.l2g[b] = keep_global[b]
        masks.g2g[b] = keep_global[b]
        masks.g2l[b] = keep_long[b]
    if K is not None:
        for i in range(NG):
            for j in range(NG):
                labels.g2g[0, i, j] = label(j - i)
        labels.l2g.fill_(2 * K + 1)
        labels.g2l.fill_(2 * K + 1)
        tables = [Table(p[f"{s}_vector"], p[f"{s}_number"]) for s in ("long", "global")]
    else:
        labels, tables = Pieces(None, None, None, None), [None, None]
    outs = oracle(
        project(x_long, "q_proj", "long", "all"),
        project(x_global, "q_proj", "global", "all"),
        four("k_proj"),
        four("v_proj"),
        radius,
        masks,
        labels,
        *tables,
    )
    merged = [out.transpose(1, 2).flatten(2) for out in outs]
    y = []
    for out, side in ((merged[1], "global"), (merged[0], "long")):
        w, b = weight("o_proj", side, "all")
        y.append(out @ w.T + b)
    return torch.cat(y, dim=1)


@pytest.mark.parametrize("share", ["qkv", "kv", "none"])
@pytest.mark.parametrize("K", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_layer_equals_the_loops(share, K: int | None, seed: int) -> None:
    num_global, radius = 1 + seed, 3 - seed
    layer = filled(seed, 6, 2, num_global=num_global, radius=radius, max_distance=K, share=share)
    x = normal(seed + 9, 2, num_global + 7, 6)
    keep = torch.ones(2, x.shape[1], dtype=torch.bool)
    if seed:
        keep[0, -2:] = False
        keep[1, num_global + 1] = False
    got = layer(x, mask=keep if seed else None).detach()
    want = layer_oracle(layer, x, keep, num_global, radius, K)
    close(got.masked_fill(~keep[..., None], 0), want.masked_fill(~keep[..., None], 0))


def test_a_wide_radius_without_labels_is_full_attention() -> None:
    layer = filled(3, 8, 2, num_global=2, radius=9, max_distance=None)
    x = normal(4, 2, 9, 8)
    p = {name.removesuffix(".weight"): value for name, value in layer.state_dict().items()}

    def project(z: Tensor, name: str) -> Tensor:
        return z @ p[name].T + p[name + ".bias"]

    q, k, v = (project(x, f"{n}_proj.all").unflatten(-1, (2, 4)).transpose(1, 2) for n in "qkv")
    out = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    close(layer(x).detach(), project(out.transpose(1, 2).flatten(2), "o_proj.all"), 1e-12)


def test_far_tokens_are_reached_in_two_layers_through_the_globals() -> None:
    first, second = (filled(n, 8, 2, num_global=1, radius=2, max_distance=3) for n in (5, 6))
    x = normal(7, 1, 12, 8)
    changed = x.clone()
    changed[:, 11] += 1.0
    one, other = first(x), first(changed)
    assert torch.equal(one[:, 1:9], other[:, 1:9])  # long 1 .. 8 are farther than 2 from 11
    assert not torch.equal(one[:, 9], other[:, 9])
    assert not torch.equal(one[:, 0], other[:, 0])
    assert (second(one)[:, 1] - second(other)[:, 1]).abs().max() > 1e-6


def test_padding_cannot_poison() -> None:
    layer = filled(8, 8, 2, num_global=2, radius=2, max_distance=3)
    x = normal(9, 1, 9, 8)
    keep = torch.arange(9)[None] < 7
    poisoned = x.clone()
    poisoned[:, 7:] = float("nan")
    assert torch.equal(layer(x, mask=keep)[:, :7], layer(poisoned, mask=keep)[:, :7])
    assert (layer(x, mask=keep)[:, :7] - layer(x[:, :7])).abs().max() < 1e-12


def test_every_form_of_padding_is_the_same_and_other_masks_are_refused() -> None:
    layer = filled(12, 8, 2, num_global=2, radius=2, max_distance=3)
    x = normal(13, 3, 9, 8)
    keep = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    keep[:, 0] = True
    want = layer(x, mask=keep)
    assert torch.equal(layer(x, mask=keep[:, None, None]), want)
    assert torch.equal(layer(x, mask=regard.masks.padding(keep)), want)
    assert not torch.equal(layer(x), want)
    for bad in (regard.masks.causal(), keep[:, :5], keep.float()):
        with pytest.raises((ValueError, TypeError), match="mask"):
            layer(x, mask=bad)


def test_weights_start_truncated_at_two_standard_deviations() -> None:
    torch.manual_seed(0)
    p = ETCAttention(64, 2, num_global=2, radius=2, share="none").state_dict()
    for name, std in (("k_proj.l2g.weight", 0.02), ("long_vector", 0.5)):
        assert 1.8 * std < float(p[name].abs().max()) <= 2 * std
    assert not p["k_proj.l2g.bias"].any()
    assert not p["long_number"].any()


def test_gradcheck() -> None:
    layer = filled(10, 4, 2, num_global=1, radius=1, max_distance=2)
    assert torch.autograd.gradcheck(layer, (normal(11, 1, 5, 4).requires_grad_(),))

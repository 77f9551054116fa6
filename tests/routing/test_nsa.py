"""Native sparse attention against loops over queries and blocks, flash-linear-attention's numbers, and full attention.

The loops' author has read neither the code nor this test.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels.flops import FlopCounter
from regard.laws.agreement import close
from regard.routing import nsa_branches
from regard.routing.nsa import NativeSparseAttention
from regard.routing.nsa_branches import (
    BlockMLP,
    Brief,
    chosen_blocks,
    cut,
    mean,
    native_sparse_attention,
    read_in_full,
)
from routing import naive_nsa

VECTORS = Path(__file__).parents[1] / "vectors" / "S-nsa.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def means(k: Tensor, v: Tensor, block: int) -> Brief:
    k, v = (mean(cut(z, block, block)) for z in (k, v))
    return Brief(k, v, torch.ones(1, k.shape[2], dtype=torch.bool), block, block)


def layer(seed: int = 0, **options: Any) -> NativeSparseAttention:
    torch.manual_seed(seed)
    small = {"dim": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "block": 2, "count": 3, "window": 3}
    made = regard.create("nsa", **{**small, **options}, causal=True).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def compressed(phi: BlockMLP, g: int, stride: int) -> Callable[[Tensor], Any]:
    weights = phi.inner.weight, phi.inner.bias, phi.outer.weight, phi.outer.bias
    places = phi.positions[g]
    return lambda z: naive_nsa.mlp_blocks(z, len(places), stride, places, *weights)


@pytest.mark.parametrize(
    ("T", "options"),
    [
        (13, {}),
        (9, {"block": 3, "window": 5, "base": None, "num_kv_heads": 1}),
        (16, {"compress": "mlp", "length": 4, "stride": 2, "num_kv_heads": 1}),
        (19, {"compress": "mlp", "length": 3, "stride": 2, "block": 4, "num_kv_heads": 1}),
    ],
)
def test_is_the_definition(T: int, options: dict) -> None:
    module, x = layer(**options), normal(T, 2, T, 8).requires_grad_()
    got = module(x)
    told: dict[str, Any] = {
        name: getattr(module, name) for name in ("block", "count", "window", "num_heads", "num_kv_heads")
    }
    if module.compress == "mlp":
        told["compress"] = [compressed(phi, 0, module.stride) for phi in (module.k_compress, module.v_compress)]
    gates = module.g_proj.weight.unflatten(0, (-1, 3)).unbind(1)
    maps = [getattr(module, f"{n}_proj").weight for n in "qkvo"]
    want = naive_nsa.layer(x, *maps, gates, base=options.get("base", 10000.0), **told)
    close(got, want, "out")
    leaves, direction = [x, *module.parameters()], normal(1, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * direction).sum(), leaves) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_flash_linear_attentions_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    q, k, v = (z[n].transpose(1, 2).clone().requires_grad_() for n in "qkv")
    gates = torch.stack([z[f"gate_{n}"] for n in ("compressed", "selected", "window")], -1).transpose(1, 2)
    gates.requires_grad_()
    sizes = {"block": int(z["block_size"]), "count": int(z["count"])}
    brief = means(k, v, sizes["block"])
    out = native_sparse_attention(q, k, v, gates, brief, **sizes, window=int(z["window"])).transpose(1, 2)
    close(out, z["out"], "out")
    gq, gk, gv, gg = torch.autograd.grad((out * z["w"]).sum(), (q, k, v, gates))
    for got, name in ((gq, "gq"), (gk, "gk"), (gv, "gv"), (gg[..., 0], "ggate_compressed")):
        close(got.transpose(1, 2), z[name], name)
    tiles = chosen_blocks(q.detach(), brief, k.shape[2], **sizes).transpose(1, 2)
    picked = torch.nn.functional.one_hot(z["block_indices"] + 1, tiles.shape[3] + 1)[..., 1:].any(3)
    assert torch.equal(tiles, picked)


@pytest.mark.parametrize("count", [8, 99])
def test_all_blocks_are_full_attention(count: int) -> None:
    q, k, v = normal(0, 2, 4, 31, 6), normal(1, 2, 2, 31, 6), normal(2, 2, 2, 31, 5)
    gates = torch.tensor([0.0, 1.0, 0.0]).double().expand(2, 4, 31, 3)
    got = native_sparse_attention(q, k, v, gates, means(k, v, 4), block=4, count=count, window=3)
    close(got, regard.attention(q, k, v, mask=masks.causal()))


def test_four_times_the_tokens_cost_far_less_than_sixteen_times() -> None:
    module = regard.create("nsa", dim=16, num_heads=1, causal=True, block=16, count=4, window=32)
    found = []
    for T in (512, 2048):
        with FlopCounter() as counter, torch.no_grad():
            module(torch.randn(1, T, 16))
        found.append(counter.get_total_flops())
    assert found[1] < 9 * found[0]


def planted(seed: int, B: int = 48, T: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, one token of which is marked and holds two numbers that the last token asks for; they, and its place."""
    g = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(B, T, 16, generator=g)
    x[..., :4] = 0
    at, value = torch.randint(4, T - 8, (B,), generator=g), torch.randn(B, 2, generator=g)
    x[torch.arange(B), at, 0], x[torch.arange(B), at, 2:4] = 3.0, value
    x[:, -1, 1] = 3.0
    return x, value, at


@pytest.mark.slow
def test_training_teaches_which_block_holds_the_needle() -> None:
    """Only gradients through the blocks in brief can: the choice has none. One block of 13 is free to be chosen."""
    torch.manual_seed(0)
    module = regard.create(
        "nsa", dim=16, num_heads=2, num_kv_heads=1, causal=True, block=4, count=4, window=4, base=None
    )

    def recall() -> float:
        x, _, at = planted(99, 256)
        with torch.no_grad():
            q, k, v = module.split(x, x)
            tiles = chosen_blocks(q[:, :, -1:, :-3], means(k, v, 4), 64, block=4, count=4)
        return float(tiles[torch.arange(256), 0, 0, at // 4].float().mean())

    before = recall()
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    for step in range(60):
        x, value, _ = planted(step)
        loss = (module(x)[:, -1, :2] - value).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.35
    assert recall() > 0.8


@pytest.mark.parametrize(
    "options",
    [{}, {"compress": "mlp", "length": 4, "stride": 1}, {"own_kv": True, "compress": "mlp", "length": 2, "stride": 2}],
)
def test_streams_with_hidden_tokens_to_the_full_pass(options: dict) -> None:
    module, x, keep = layer(**options), normal(3, 2, 17, 8), torch.ones(2, 17, dtype=torch.bool)
    keep[0, :5] = keep[1, 8:11] = False
    x[~keep] = torch.nan
    with torch.no_grad():
        want, state, outs, done = module(x, mask=masks.padding(keep)), module.init_state(2, 17), [], 0
        for t in (1, 0, 3, 1, 1, 6, 1, 1, 1, 2):
            y, state = module.step(x[:, done : done + t], state, mask=keep[:, done : done + t])
            outs.append(y)
            done += t
    close(torch.cat(outs, 1)[keep], want[keep])
    assert want[keep].isfinite().all()


def test_one_query_reads_chosen_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(k.shape[2])
        return regard.attention(q, k, v, **options)

    q, k, v = normal(0, 2, 4, 3, 6), normal(1, 2, 2, 41, 6), normal(2, 2, 2, 41, 5)
    keep = torch.arange(41) >= torch.tensor([[0], [6]])
    mask = masks.causal() & masks.padding(keep)
    tiles = chosen_blocks(q, means(k, v, 4), 41, block=4, count=4)
    want = read_in_full(q, k, v, tiles, block=4, count=4, mask=mask)
    monkeypatch.setattr(nsa_branches, "attention", attend)
    got = read_in_full(q[:, :, -1:], k, v, tiles[:, :, -1:], block=4, count=4, mask=mask)
    close(got, want[:, :, -1:])
    assert seen == [16]


def test_each_branch_may_have_keys_of_its_own() -> None:
    module, x = layer(own_kv=True), normal(0, 1, 9, 8)
    assert module.k_proj.weight.shape == (24, 8)
    D = module.num_kv_heads * module.head_dim
    with torch.no_grad():
        outs = []
        for branch in range(3):  # all branches but one are silenced by values of 0
            other = layer(own_kv=True)
            other.load_state_dict(module.state_dict())
            kept = other.v_proj.weight[branch * D : (branch + 1) * D].clone()
            other.v_proj.weight.zero_()
            other.v_proj.weight[branch * D : (branch + 1) * D] = kept
            outs.append(other(x))
        close(sum(outs), module(x))
        assert all(out[:, 2:].abs().max() > 0.01 for out in outs)


def test_starts_as_written() -> None:
    module = regard.create("nsa", dim=128, num_heads=2, num_kv_heads=1, causal=True)
    assert (module.block, module.count, module.window, module.length, module.stride) == (64, 16, 512, 64, 64)
    assert module.rotary.base == 10000
    assert {n for n, _ in module.named_parameters()} == {f"{n}_proj.weight" for n in "qkvog"}
    module = regard.create("nsa", dim=16, num_heads=2, num_kv_heads=1, causal=True, compress="mlp")
    assert module.k_compress.positions.eq(0).all()
    assert module.k_compress.positions.shape == (1, 32, 8)
    assert module.k_compress.inner.weight.shape == (256, 256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 2}, r"count is too small \(got 2\); expected an int >= 3"),
        ({"block": 0}, "block is too small"),
        ({"window": 0}, "window is too small"),
        ({"length": 4, "stride": 5}, r"stride is too large \(got 5\)"),
        ({"compress": "max"}, "compress is"),
        ({"head_dim": 3}, r"head_dim is odd, and rotation turns pairs \(got 3\); expected an even one, or base=None"),
    ],
)
def test_refuses(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"NativeSparseAttention: {words}"):
        layer(**options)


def test_refuses_states_of_others() -> None:
    module, x = layer(), normal(0, 2, 3, 8)
    with pytest.raises(TypeError, match="state has the wrong type"):
        module.step(x, None)
    with pytest.raises(ValueError, match="state has another batch than x"):
        module.step(x, module.init_state(3, 5))
    with pytest.raises(ValueError, match="exceed capacity 2"):
        module.step(x, module.init_state(2, 2))


def test_nothing_at_all() -> None:
    module = layer()
    assert module(normal(0, 0, 5, 8)).shape == (0, 5, 8)
    assert module(normal(0, 2, 0, 8)).shape == (2, 0, 8)
    hidden = module(normal(0, 2, 9, 8), mask=torch.zeros(2, 9, dtype=torch.bool))
    assert hidden.eq(0).all()


def test_equal_blocks_are_chosen_alike_in_every_length() -> None:
    """Before a brief block is complete no block stands out, and more of them than are read in full are equal."""
    torch.manual_seed(0)
    options = {"block": 1, "count": 5, "window": 2, "compress": "mlp", "length": 32, "stride": 16}
    layer = NativeSparseAttention(16, 2, **options).double()
    x = normal(1, 2, 33, 16)
    whole, state, steps = layer(x), layer.init_state(2, 33), []
    for token in x.split(1, 1):
        out, state = layer.step(token, state)
        steps.append(out)
    close(torch.cat(steps, 1), whole, "stream")
    for T in (17, 30):
        close(layer(x[:, :T]), whole[:, :T], "prefix")

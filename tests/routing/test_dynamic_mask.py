"""Dynamic mask attention against loops over queries and keys, and the authors' layer in transformers.

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
from regard.routing import kept, running_best
from regard.routing.dynamic_mask import DynamicMaskAttention
from regard.routing.running_best import dynamic_mask_attention, standing
from routing import naive_dynamic_mask as naive

VECTORS = Path(__file__).parents[1] / "vectors" / "A015.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int = 0, *, noise: float = 0.5, **options: Any) -> DynamicMaskAttention:
    torch.manual_seed(seed)
    small = {"dim": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "keep_window": 3}
    made = regard.create("dynamic_mask", **{**small, **options}, causal=True).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(noise * torch.randn_like(p))
    return made


def told(module: DynamicMaskAttention) -> dict[str, Tensor]:
    found = {f"w{n}": getattr(module, f"{n}_proj").weight for n in ("q", "k", "v", "o")}
    found |= {f"b{n}": getattr(module, f"{n}_proj").bias for n in ("q", "k", "v", "o")}
    found |= {"wdt": module.dt_proj.weight, "bdt": module.dt_proj.bias, "a": module.A}
    if module.norm is not None:
        found |= {"q_norm": module.norm.q_weight, "k_norm": module.norm.k_weight}
    return found


@pytest.mark.parametrize("chunk", [2, 128])
@pytest.mark.parametrize(
    "options",
    [{}, {"form": "linear", "base": None, "bias": True}, {"qk_norm": False, "keep_window": 40}, {"keep_window": 1}],
)
def test_is_the_definition(options: dict, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_best, "CHUNK", chunk)
    module, x, keep = layer(**options), normal(1, 2, 9, 8).requires_grad_(), torch.ones(2, 9, dtype=torch.bool)
    keep[0, :2] = keep[1, 5] = False
    same = {"window": module.keep_window, "form": module.form, "base": options.get("base", 10000.0)}
    got = module(x, mask=masks.padding(keep))
    want = naive.dynamic_mask_attention(x, told(module), num_heads=4, num_kv_heads=2, keep=keep, **same)
    close(got[keep], want[keep], "out")
    leaves, direction = [x, *module.parameters()], normal(3, *got.shape) * keep[..., None]
    for mine, theirs in zip(*(torch.autograd.grad((o * direction).sum(), leaves) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    bias = "q_proj.bias" in z
    module = layer(dim=12, bias=bias, keep_window=int(z["keep_window"]))
    ours = {n: n.replace("norm.q_weight", "q_norm.weight") for n, _ in module.named_parameters()}
    ours = {n: name.replace("norm.k_weight", "k_norm.weight") for n, name in ours.items()}
    module.load_state_dict({n: z[name] for n, name in ours.items()})
    x = z["x"].clone().requires_grad_()
    out = module(x, mask=masks.padding(z["keep"]))
    seen = z["keep"].cumsum(1) > 0  # theirs averages all keys where none may be seen
    close(out[seen], z["out"][seen], "out")
    got = torch.autograd.grad((out * z["w"]).sum(), [x, *module.parameters()])
    close(got[0], z["gx"], "gradient of x")
    for n, g in zip(ours.values(), got[1:], strict=True):
        close(g, z[f"g.{n}"], f"gradient of {n}")


def test_who_is_seen_is_a_running_choice() -> None:
    """Against sorting for each query; the one who goes never comes back, and of equals the latest stays."""
    delta, real = normal(0, 2, 3, 20).mul(2).round(), normal(1, 2, 3, 20) > -1
    seen, stays = standing(delta, real, 20, 4)
    for b, g, t in np.ndindex(2, 3, 20):
        best = sorted((s for s in range(t + 1) if real[b, g, s]), key=lambda s: (-float(delta[b, g, s]), -s))[:4]
        assert seen[b, g, t].nonzero().flatten().tolist() == sorted(best)
    assert torch.equal(seen[:, :, -1], stays & real)
    gone = torch.arange(20)[:, None] >= torch.arange(20)
    assert ((~seen & gone)[:, :, :-1] <= ~seen[:, :, 1:]).all()
    part, _ = standing(delta[..., :12], real[..., :12], 12, 4)
    assert torch.equal(part, seen[:, :, :12, :12]), "later keys change nothing"
    wider, _ = standing(delta, real, 20, 6)
    assert (seen <= wider).all(), "a larger window only adds keys"


def test_room_for_all_is_full_attention_with_a_bias() -> None:
    q, k, v, delta = normal(0, 2, 4, 9, 6), normal(1, 2, 2, 9, 6), normal(2, 2, 2, 9, 5), normal(3, 2, 2, 9)
    want = regard.attention(q, k, v, mask=masks.causal(), bias=delta.repeat_interleave(2, 1)[:, :, None])
    for window in (9, 100):
        close(dynamic_mask_attention(q, k, v, delta, window=window)[0], want)


def test_a_new_layer_sees_the_last_keys() -> None:
    module, x = layer(noise=0.0), normal(0, 1, 12, 8)
    q, k, v = module.split(x, x)
    q, k, v = module.norm(q, k, v)
    at = torch.arange(12)
    q, k = module.rotary.turn(q, k, at, at)
    near = masks.causal() & masks.window(3)
    close(module(x), module.merge(regard.attention(q, k, v, mask=near)))
    assert module.A.eq(0).all()
    wide = regard.create("dynamic_mask", dim=256, num_heads=2, causal=True)
    assert (wide.keep_window, wide.form, wide.norm.eps, wide.rotary.base) == (2048, "exp", 1e-6, 10000)
    for proj in (wide.q_proj, wide.k_proj, wide.v_proj, wide.o_proj, wide.dt_proj):
        assert float(proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_says_what_it_keeps() -> None:
    """A tenth of the keys can hold nearly all attention: what matters has much larger scores."""
    q, k = normal(0, 1, 1, 200, 8), normal(1, 1, 1, 200, 8)
    delta = 6.0 * (torch.arange(200) % 12 == 0).double()[None, None]
    seen, _ = standing(delta, torch.ones(1, 1, 200, dtype=torch.bool), 200, 20)
    k9 = torch.cat([k, delta[..., None] * 9**0.5], -1)
    q9 = torch.cat([q, torch.ones(1, 1, 200, 1)], -1)
    report = kept(q9, k9, masks.dense(seen), mask=masks.causal())
    assert report.pairs < 0.2
    assert report.mass.min() > 0.9


def test_a_state_holds_no_more_than_the_window() -> None:
    module, x, keep = layer(), normal(3, 2, 17, 8), torch.ones(2, 17, dtype=torch.bool)
    keep[0, :5] = keep[1, 8:11] = False
    x[~keep] = torch.nan
    with torch.no_grad():
        want, state, outs, done = module(x, mask=masks.padding(keep)), module.init_state(2, 17), [], 0
        for t in (1, 0, 3, 1, 1, 6, 1, 1, 1, 2):
            y, state = module.step(x[:, done : done + t], state, mask=keep[:, done : done + t])
            outs.append(y)
            done += t
            assert state.k.shape[2] == min(3, done)
    close(torch.cat(outs, 1)[keep], want[keep])
    assert want[keep].isfinite().all()


@pytest.mark.slow
def test_learns_to_keep_a_marked_token_far_beyond_the_window() -> None:
    """One token of 24 is marked; all behind it should give its two numbers. The layer holds 4 keys."""
    torch.manual_seed(0)
    module = regard.create("dynamic_mask", dim=12, num_heads=1, causal=True, keep_window=4, base=None)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))

    def batch(seed: int, B: int = 64, T: int = 24) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        x, value, at = (
            0.5 * torch.randn(B, T, 12, generator=g),
            torch.randn(B, 2, generator=g),
            torch.randint(T - 12, (B,), generator=g),
        )
        x[..., 0] = 0
        x[torch.arange(B), at, 0], x[torch.arange(B), at, 1:3] = 4.0, value
        return x, value, (torch.arange(T) - at[:, None])

    def error(x: Tensor, value: Tensor, age: Tensor, least: int) -> Tensor:
        return (module(x)[..., :2] - value[:, None])[age >= least].square().mean()

    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for step in range(150):
        optimizer.zero_grad()
        error(*batch(step), 0).backward()
        optimizer.step()
    with torch.no_grad():
        x, value, age = batch(999)
        assert error(x, value, age, 10) < 0.4
        _, state = module.step(x, module.init_state(64, 24))
        assert state.k.shape[2] == 4
        module.A.zero_()
        assert error(x, value, age, 10) > 0.8, "a window of 4 has forgotten it"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_window": 0}, "keep_window is too small"),
        ({"form": "relu"}, "form is"),
        ({"eps": -1.0}, "eps is out of range"),
        ({"head_dim": 3}, r"head_dim is odd, and rotation turns pairs \(got 3\); expected an even one, or base=None"),
    ],
)
def test_refuses(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**options)


def test_refuses_states_of_others() -> None:
    module, x = layer(), normal(0, 2, 3, 8)
    with pytest.raises(TypeError, match="state has the wrong type"):
        module.step(x, None)
    with pytest.raises(ValueError, match="state has another batch than x"):
        module.step(x, module.init_state(3, 5))


def test_nothing_at_all() -> None:
    module = layer()
    assert module(normal(0, 0, 5, 8)).shape == (0, 5, 8)
    assert module(normal(0, 2, 0, 8)).shape == (2, 0, 8)
    assert module(normal(0, 2, 9, 8), mask=torch.zeros(2, 9, dtype=torch.bool)).eq(0).all()


def test_hidden_tokens_of_a_new_layer_make_no_mask_of_its_terms() -> None:
    module, x = layer(noise=0.0, keep_window=4), normal(1, 2, 6, 8)
    keep = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    out = module(x, mask=masks.padding(keep))
    close(out[:1, :4], module(x[:1, :4]), "without them")
    close(out[1:], module(x[1:]), "the other row")

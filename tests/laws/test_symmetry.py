"""L11 to L16: heads, order of tokens, grouped keys, scale, sums of weights, shifts."""

import torch

import regard
from laws.subject import (
    DIM,
    HEADS,
    WIDTH,
    B,
    T,
    build,
    causalities,
    close,
    close_all,
    form,
    law,
    run,
    same,
    takes,
    tokens,
)
from regard import masks


@law("L11", traits="head_independent", pipeline=True)
def test_order_of_heads_is_free(name: str) -> None:
    """Permuting the heads of all tensors leaves the layer unchanged (11 is no other size here)."""
    H, D, dim = 11, 4, 20
    shape = {"dim": dim, "num_heads": H, "head_dim": D}
    module, x = build(name, **shape), tokens(dim=dim)
    if module.num_kv_heads != H or module.receptive_field().heads > 1:
        return
    order = torch.randperm(H, generator=torch.Generator().manual_seed(0))
    block = (order[:, None] * D + torch.arange(D)).flatten()
    other = build(name, **shape)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            for axis, size in enumerate(tensor.shape):
                if size in (H, H * D):
                    tensor.copy_(tensor.index_select(axis, order if size == H else block))
    close(other(x), module(x), "permuted heads")


@law("L11", traits="head_independent", pipeline=True)
def test_heads_do_not_meet(name: str) -> None:
    """Changing the projections of one head changes that head's output only."""
    module, x = build(name), tokens()
    if module.num_kv_heads != HEADS:
        return
    module.o_proj = torch.nn.Identity()
    want = module(x).detach()
    with torch.no_grad():
        for proj in (module.q_proj, module.k_proj, module.v_proj):
            proj.weight[:WIDTH] *= -2
    got = module(x)
    same(got[..., WIDTH:], want[..., WIDTH:], "other heads")
    assert not torch.allclose(got[..., :WIDTH], want[..., :WIDTH])


@law("L12", needs="bidirectional", traits="position_free")
def test_order_of_tokens_is_free(name: str) -> None:
    module, x = build(name, causal=False), tokens()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    close(module(x[:, order]), module(x)[:, order], "permuted tokens")
    if "cross" in module.supports:
        context = tokens(B, 7, seed=5)
        close(module(x, context.flip(1)), module(x, context), "permuted context")


@law("L12", needs="bidirectional mask", traits="position_free", function=True)
def test_order_of_keys_and_mask_is_free(name: str) -> None:
    f = form(name)
    q, k, v = f.qkv()
    allowed = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(0)) < 0.6
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    got = f(q, k[:, :, order], v[:, :, order], mask=allowed[..., order])
    close(got, f(q, k, v, mask=allowed), "permuted keys")


@law("L13", needs="gqa")
def test_grouped_keys_are_repeated(name: str) -> None:
    """G key heads = H key heads of which each group is one, side by side; gradients add up over the group."""
    grouped = build(name, num_kv_heads=2) if not regard.card(name).is_part or "gqa" not in name else build(name)
    if grouped.num_kv_heads == HEADS:
        return
    G = grouped.num_kv_heads
    full = build(name) if "gqa" not in name and "mqa" not in name else build("softmax")
    source, target = dict(grouped.named_parameters()), dict(full.named_parameters())
    assert source.keys() == target.keys()
    with torch.no_grad():
        for key, p in target.items():
            p.copy_(_repeat(source[key], p.shape, G))
        for key, drawn in grouped.named_buffers():
            full.get_buffer(key).copy_(drawn)
    x = tokens()
    got, want = run(grouped, x), run(full, x)
    for key, p in source.items():
        if p.shape != want[key].shape:
            want[key] = _sum_groups(want[key], p.shape, G)
    close_all(got, want)


def _repeat(tensor: torch.Tensor, shape: torch.Size, G: int) -> torch.Tensor:
    for axis, (have, need) in enumerate(zip(tensor.shape, shape, strict=True)):
        if have != need:
            tensor = (
                tensor.unflatten(axis, (G, have // G)).repeat_interleave(need // have, axis).flatten(axis, axis + 1)
            )
    return tensor


def _sum_groups(grad: torch.Tensor, shape: torch.Size, G: int) -> torch.Tensor:
    for axis, (have, need) in enumerate(zip(grad.shape, shape, strict=True)):
        if have != need:
            grad = grad.unflatten(axis, (G, have // need, need // G)).sum(axis + 1).flatten(axis, axis + 1)
    return grad


@law("L14", function=True)
def test_scale(name: str) -> None:
    """Default 1/sqrt(D); a scale is a factor of q; powers of two move between q and k bit for bit."""
    f = form(name)
    q, k, v = f.qkv()
    want = f(q, k, v)
    same(f(q, k, v, scale=WIDTH**-0.5), want, "scale 1/sqrt(D)")
    if f.reads_only_scores:
        same(f(4 * q, k / 4, v), want, "4 q, k / 4")
        close(f(q, k, v, scale=0.3), f(0.3 * WIDTH**0.5 * q, k, v), "scale 0.3")
    assert not torch.allclose(f(q, k, v, scale=0.9), want), "the scale changes nothing"


def weights(name: str, causal: bool, allowed: torch.Tensor) -> torch.Tensor:
    """(B, H, T, S): what one-hot values show."""
    f = form(name)
    q, k, _ = f.qkv()
    one_hot = torch.eye(T, dtype=torch.float64).expand(*k.shape[:2], T, T)
    return f(q, k, one_hot, causal=causal, mask=allowed).detach()


@law("L15", function=True, traits="linear_in_values", needs="mask")
def test_weights(name: str) -> None:
    """Masked weights are exactly 0; by trait, rows sum to 1, nothing is negative, some allowed are 0."""
    traits = regard.card(name).traits
    for causal in causalities(name):
        drawn = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(0)) < 0.7
        drawn |= torch.eye(T, dtype=torch.bool)
        a = weights(name, causal, drawn)
        allowed = form(name).arguments(causal, drawn)["mask"].dense(T).expand_as(a)
        same(a[~allowed], torch.zeros_like(a[~allowed]), "masked weights")
        if "normalised" in traits:
            close(a.sum(-1), torch.ones_like(a.sum(-1)), "sum of weights")
        if "nonnegative" in traits:
            assert (a >= 0).all()
        else:
            assert (a < 0).any(), "the trait 'nonnegative' is missing"
        some = bool((a[allowed] == 0).any())
        assert some == ("sparse" in traits), f"{'some' if some else 'no'} weights are 0: the trait 'sparse' says else"


@law("L15", function=True, traits="linear_in_values")
def test_linear_in_values(name: str) -> None:
    f = form(name)
    q, k, v = f.qkv()
    w = torch.randn_like(v)
    close(f(q, k, 2.5 * v - 0.7 * w), 2.5 * f(q, k, v) - 0.7 * f(q, k, w))


@law("L16", traits="shift_invariant")
def test_shift_of_positions(name: str) -> None:
    """The same constant added to all positions changes nothing."""
    for causal in causalities(name):
        module, x = build(name, causal=causal), tokens()
        if not takes(module, "positions"):
            continue
        for shift in (1, 100):
            close(module(x, positions=torch.arange(T) + shift), module(x), f"shift of {shift}")


@law("L16", function=True, traits="shift_invariant", needs="mask")
def test_shift_of_everything(name: str) -> None:
    """What stands behind a few hidden tokens comes out as if they weren't there: in biases and values too."""
    f, hidden = form(name), 3
    if f.arguments()["mask"] is not None and not f.parts["mask"].is_shift_invariant:
        return
    for causal in causalities(name):
        q, k, v = f.qkv()
        keep = (torch.arange(T) >= hidden).expand(B, T)
        got = f(q, k, v, causal=causal, mask=masks.padding(keep))[:, :, hidden:]
        close(got, f(*(t[:, :, hidden:] for t in (q, k, v)), causal=causal))


def test_the_sizes_differ() -> None:
    assert len({B, T, DIM, HEADS, WIDTH}) == 5

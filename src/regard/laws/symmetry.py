"""L11 to L14 and L16: heads, order of tokens, grouped keys, scale, shifts."""

from typing import Any

import torch
from torch import Tensor, nn

from regard import masks
from regard.laws.agreement import close, close_all, does_not_apply, hold, run, same
from regard.laws.masking import asks
from regard.laws.registry import law
from regard.laws.subject import Subject, takes
from regard.pipeline.layer import Attention


def permutation(n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@law("L11", traits="head_independent", pipeline=True)
def order_of_heads_is_free(s: Subject) -> None:
    """Permuting the heads of all tensors leaves the layer unchanged."""
    H, D, dim = 11, 4, 20  # 11 is no other size here
    shape: dict[str, Any] = {"dim": dim, "num_heads": H, "head_dim": D}
    module, x = s.build(**shape), s.tokens()[..., :dim]
    if module.num_kv_heads != H:
        does_not_apply("it has fewer key heads than query heads")
    if module.receptive_field().heads > 1:
        does_not_apply("its mask gives each head its own keys")
    order = permutation(H)
    block = (order[:, None] * D + torch.arange(D)).flatten()
    other = s.build(**shape)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            for axis, size in enumerate(tensor.shape):
                if size in (H, H * D):
                    tensor.copy_(tensor.index_select(axis, order if size == H else block))
    close(other(x), module(x), "permuted heads")


@law("L11", traits="head_independent")
@torch.no_grad()
def heads_do_not_meet(s: Subject) -> None:
    """Changing the projections of one key head and its queries changes the output of those heads only."""
    module, x = s.build(), s.tokens()
    projections: list[Any] = [getattr(module, f"{name}_proj", None) for name in "qkvo"]
    q, k, v, o = projections
    if not all(isinstance(p, nn.Linear) for p in projections):
        does_not_apply("it has no q_proj, k_proj, v_proj and o_proj that could be changed head by head")
    width = o.in_features // s.heads
    groups = max(1, v.out_features // max(1, width))
    parts = [p.out_features // groups for p in (q, k, v)]  # of each group of heads
    whole = all(n * groups == p.out_features for n, p in zip(parts, (q, k, v), strict=True)) and parts[2] == width
    if not whole or o.in_features != o.out_features or s.heads % groups:
        does_not_apply("its projections don't consist of heads of one width")
    nn.init.eye_(o.weight)
    want = module(x)
    for n, proj in zip(parts, (q, k, v), strict=True):
        proj.weight[:n] *= -2
    group = s.heads // groups
    got = (module(x) - want).unflatten(-1, (s.heads, width))
    same(got[..., group:, :], torch.zeros_like(got[..., group:, :]), "other heads")
    for h in range(group):
        own = got[..., h, :]
        hold(not torch.allclose(own, torch.zeros_like(own)), f"head {h} does not follow its projections")


@law("L12", needs="bidirectional", traits="position_free")
def order_of_tokens_is_free(s: Subject) -> None:
    """Permuted tokens give permuted outputs, with their padding too; the order of a context doesn't count."""
    module, x = s.build(causal=False), s.tokens()
    order = permutation(s.length)
    close(module(x[:, order]), module(x)[:, order], "permuted tokens")
    if "padding" in s.supports:
        keep = torch.arange(s.length).expand(s.batch, -1) != 4
        want = module(x, mask=masks.padding(keep))
        got = module(x[:, order], mask=masks.padding(keep[:, order]))
        real = keep[:, order]
        close(got[real], want[:, order][real], "permuted tokens and padding")
    if "cross" in s.supports:
        context = s.context()
        close(module(x, context.flip(1)), module(x, context), "permuted context")


@law("L12", needs="bidirectional", traits="position_free", protocols="Pooler Pointer")
def order_of_what_is_read_is_free(s: Subject) -> None:
    """Permuted tokens are pooled to the same; a pointer's columns and rows follow the tokens that they stand for."""
    module, given = s.build(causal=False), s.inputs()
    if s.protocol == "Pooler":
        (x,) = given
        close(module(x[:, permutation(x.shape[1])]), module(x), "permuted tokens")
        return
    x, context = given
    want, rows, columns = module(x, context), permutation(x.shape[1]), permutation(context.shape[1], 1)
    close(module(x[:, rows], context), want[:, rows], "permuted queries")
    close(module(x, context[:, columns]), want[..., columns], "permuted context")


@law("L12", needs="bidirectional mask", traits="position_free", function=True)
def order_of_keys_and_mask_is_free(s: Subject) -> None:
    """Keys, values and the mask's columns permuted together change nothing."""
    f: Any = s.form()
    q, k, v = f.qkv()
    size = (s.batch, 1, s.length, s.length)
    allowed = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.6
    order = permutation(s.length, 1)
    got = f(q, k[:, :, order], v[:, :, order], mask=allowed[..., order])
    close(got, f(q, k, v, mask=allowed), "permuted keys")


@law("L13", needs="gqa")
def grouped_keys_are_repeated(s: Subject) -> None:
    """G key heads = H key heads of which each group is one, side by side; gradients add up over the group."""
    grouped = s.build(**s.groups)
    G = getattr(grouped, "num_kv_heads", None)
    if G is None:
        does_not_apply("it doesn't say its num_kv_heads")
    if s.heads == G:
        does_not_apply("it has as many key heads as query heads")
    full = s.build() if s.groups else Attention(s.dim, s.heads, causal=grouped.causal).double().eval()
    source, target = dict(grouped.named_parameters()), dict(full.named_parameters())
    hold(source.keys() == target.keys(), f"parameters {sorted(source)} with {G} key heads, {sorted(target)} with all")
    with torch.no_grad():
        for key, p in target.items():
            p.copy_(repeated(source[key], p.shape, G))
        for key, drawn in grouped.named_buffers():
            full.get_buffer(key).copy_(drawn)
    x = s.tokens()
    got, want = run(grouped, x), run(full, x)
    for key, p in source.items():
        if p.shape != want[key].shape:
            want[key] = summed(want[key], p.shape, G)
    close_all(got, want)


def repeated(tensor: Tensor, shape: torch.Size, G: int) -> Tensor:
    """Every group's part side by side as often as its heads are many, along the axes that differ from `shape`."""
    for axis, (have, need) in enumerate(zip(tensor.shape, shape, strict=True)):
        if have != need:
            groups = tensor.unflatten(axis, (G, have // G))
            tensor = groups.repeat_interleave(need // have, axis).flatten(axis, axis + 1)
    return tensor


def summed(grad: Tensor, shape: torch.Size, G: int) -> Tensor:
    """The gradient of `repeated`."""
    for axis, (have, need) in enumerate(zip(grad.shape, shape, strict=True)):
        if have != need:
            grad = grad.unflatten(axis, (G, have // need, need // G)).sum(axis + 1).flatten(axis, axis + 1)
    return grad


@law("L14", function=True, where=lambda s: "" if asks(s, "scale") else "it takes no scale")
def scale(s: Subject) -> None:
    """Default 1/sqrt(D); a scale is a factor of q; powers of two move between q and k bit for bit."""
    f: Any = s.form()
    D = s.width
    q, k, v = f.qkv()
    want = f(q, k, v)
    same(f(q, k, v, scale=D**-0.5), want, "scale 1/sqrt(D)")
    if f.reads_only_scores:
        same(f(4 * q, k / 4, v), want, "4 q, k / 4")
        close(f(q, k, v, scale=0.3), f(0.3 * D**0.5 * q, k, v), "scale 0.3")
    hold(not torch.allclose(f(q, k, v, scale=0.9), want), "the scale changes nothing")


@law("L16", traits="shift_invariant")
def shift_of_positions(s: Subject) -> None:
    """The same constant added to all positions changes nothing."""
    for causal in s.causalities:
        module, x = s.build(causal=causal), s.tokens()
        if not takes(module, "positions"):
            does_not_apply("it can't be told positions")
        for shift in (1, 100):
            close(module(x, positions=torch.arange(s.length) + shift), module(x), f"shift of {shift}")


@law("L16", function=True, traits="shift_invariant", needs="mask")
def shift_of_everything(s: Subject) -> None:
    """What stands behind a few hidden keys comes out as if they weren't there: in biases and values too."""
    f: Any = s.form()
    hidden = 3
    if f.arguments()["mask"] is not None and not f.parts["mask"].is_shift_invariant:
        does_not_apply("its mask is no matter of distances alone")
    for causal in s.causalities:
        q, k, v = f.qkv()
        keep = (torch.arange(s.length) >= hidden).expand(s.batch, -1)
        got = f(q, k, v, causal=causal, mask=masks.padding(keep))[:, :, hidden:]
        close(got, f(*(t[:, :, hidden:] for t in (q, k, v)), causal=causal))


@law("L16", traits="shift_invariant", needs="padding")
@torch.no_grad()
def shift_of_tokens(s: Subject) -> None:
    """In a layer, too, what stands behind a few hidden tokens comes out as if they weren't there."""
    hidden, x = 3, s.tokens()
    keep = (torch.arange(s.length) >= hidden).expand(s.batch, -1)
    for causal in s.causalities:
        module = s.build(causal=causal)
        if hasattr(module, "receptive_field") and not module.receptive_field().is_shift_invariant:
            does_not_apply("its receptive field is no matter of distances alone")
        close(module(x, mask=masks.padding(keep))[:, hidden:], module(x[:, hidden:]), f"causal={causal}")


@law("L16", traits="shift_invariant", protocols="GraphMixer")
@torch.no_grad()
def shift_of_places(s: Subject) -> None:
    """A graph whose nodes have places gives the same when all of them are moved alike."""
    module, given = s.build(), s.inputs()
    if not takes(module, "pos"):
        does_not_apply("its nodes have no places")
    nodes, edges, places = given
    want = module(nodes, edges, places)
    for shift in (1.0, 100.0):
        close(module(nodes, edges, places + shift), want, f"shift of {shift}")
    hold(not torch.allclose(module(nodes, edges, 2 * places), want), "places change nothing")

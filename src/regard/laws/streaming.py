"""L18, L19, L21: token by token and chunk by chunk are the full pass, and a state is a value."""

import copy
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor

from regard import masks
from regard.laws.agreement import close, does_not_apply, hold, refused, same, says
from regard.laws.registry import law
from regard.laws.subject import Subject, placed, takes
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.page_pool import PagePool
from regard.pipeline.streaming import WHERE


def stream(module: Any, x: Tensor, sizes: list[int], *, keep: Tensor | None = None, mask: Any = None) -> Tensor:
    """The outputs of all chunks; `keep` in whichever form `step` takes it: a mask of all keys, or the chunk's own."""
    if min(sizes) < 0:
        does_not_apply(f"there are no chunks of {sizes} tokens")
    state, outs, done = module.init_state(x.shape[0], x.shape[1]), [], 0
    for size in sizes:
        given: dict[str, Any] = {} if mask is None else {"mask": mask}
        if keep is not None:
            given["mask"] = masks.padding(keep) if whole_masks(module) else keep[:, done : done + size]
        y, state = module.step(x[:, done : done + size], state, **given)
        done += size
        outs.append(y)
        hold(y.shape[1] == size, f"{size} tokens give {y.shape[1]} outputs")
        if isinstance(state, KVCache):
            hold(state.length == done, f"after {done} tokens the cache says {state.length}")
            held = [b for name, b in state.buffers.items() if name != WHERE]  # where tokens stand are whole numbers
            kept = all(b.dtype == x.dtype and b.device == x.device for b in held)
            hold(kept, "the cache has another dtype or device than the tokens")
    hold(done == x.shape[1], f"the chunks hold {done} tokens of {x.shape[1]}")
    return torch.cat(outs, 1)


def whole_masks(module: Any) -> bool:
    """Whether `step` takes a `Mask` of all keys so far, as the pipeline does."""
    return "Mask" in str(inspect.signature(module.step).parameters["mask"].annotation)


def partitions(length: int, count: int = 8) -> list[list[int]]:
    """Ways to cut so many tokens, the same ones every time; chunks of 0 and of 1 tokens are among them."""
    generator = torch.Generator().manual_seed(0)
    found = [[0, 1, length - 1, 0], [0, 0, length]]
    while len(found) < count:
        cuts = torch.randint(0, length + 1, (1 + len(found) % 6,), generator=generator)
        ends = [0, *sorted(cuts.tolist()), length]
        found.append([b - a for a, b in itertools.pairwise(ends)])
    return found


@law("L18", needs="streaming")
@torch.no_grad()
def token_by_token(s: Subject) -> None:
    """Token by token, in odd chunks and all at once, a stream gives the full pass."""
    module, x, T = s.build(causal=True), s.tokens(), s.length
    want = module(x)
    close(stream(module, x, [1] * T), want, "one by one")
    close(stream(module, x, [1, 3, 0, 2, T - 7, 1]), want, "odd chunks")
    close(stream(module, x, [T]), want, "all at once")


@law("L19", needs="streaming", weight="heavy")
@torch.no_grad()
def any_partition(s: Subject) -> None:
    """However the tokens are cut into chunks, empty ones included, the outputs are the full pass's."""
    module, x = s.build(causal=True), s.tokens()
    want = module(x)
    for sizes in partitions(s.length):
        close(stream(module, x, sizes), want, f"chunks of {sizes}")


@law("L18", needs="streaming gqa")
@torch.no_grad()
def grouped_keys_stream(s: Subject) -> None:
    """With fewer key heads than query heads, too, a stream gives the full pass."""
    module = s.build(causal=True, **s.groups)
    close(stream(module, s.tokens(), [4, 1, s.length - 5]), module(s.tokens()))


@law("L18", needs="streaming padding", pipeline=True)
@torch.no_grad()
def padded_stream(s: Subject) -> None:
    """Keys hidden in the full pass are hidden in the stream."""
    module, x = s.build(causal=True), s.tokens()
    kept = torch.ones(s.batch, s.length, dtype=torch.bool)
    kept[1:, :3] = False
    mask = masks.padding(kept)
    close(stream(module, x, [2, 1, 6, s.length - 9], mask=mask), module(x, mask=mask))


@law("L18", needs="streaming padding", pipeline=True)
@torch.no_grad()
def left_padded_stream(s: Subject) -> None:
    """Told where its tokens stand, a row behind padding comes out of the stream as it does alone, however long the
    others are."""
    module, x, pads = s.build(causal=True), s.tokens(), 3
    if not takes(module, "positions") or placed(module):
        does_not_apply("it can't be told positions, or sees by places in the batch")
    kept = torch.ones(s.batch, s.length, dtype=torch.bool)
    kept[0, :pads] = False
    mask, where = masks.padding(kept), (kept.cumsum(1) - 1).clamp(min=0)
    want = module(x)
    want[0, pads:] = module(x[:1, pads:])[0]
    for sizes in ([2, 1, 0, 4, s.length - 7], [1] * s.length):
        state, outs, done = module.init_state(s.batch, s.length), [], 0
        for size in sizes:
            at = slice(done, done + size)
            out, state = module.step(x[:, at], state, mask=mask, positions=where[:, at])
            outs.append(out)
            done += size
        got = torch.cat(outs, 1)
        close(got[kept], want[kept], f"chunks of {sizes}")


@law("L18", needs="streaming")
def gradients_through_the_stream(s: Subject) -> None:
    """A loss over all steps has the full pass's gradients."""
    module, x = s.build(causal=True), s.tokens().requires_grad_()
    wanted = {"x": x, **dict(module.named_parameters())}
    direction = s.tokens(seed=8)

    def gradients(out: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad((out * direction).sum(), list(wanted.values()), allow_unused=True)

    want = gradients(module(x))
    got = gradients(stream(module, x, [5, 1, s.length - 6]))
    for name, g, w in zip(wanted, got, want, strict=True):
        hold((g is None) == (w is None), f"{name} has a gradient in the stream or in the full pass alone")
        if g is not None and w is not None:
            close(g, w, f"gradient of {name}")


@law("L21", needs="streaming")
@torch.no_grad()
def a_state_is_a_value(s: Subject) -> None:
    """Stepping from a state leaves it as it was: it can be stepped from again, or copied."""
    module, x, other = s.build(causal=True), s.tokens(), s.tokens(seed=11)
    _, early = module.step(x[:, :5], module.init_state(s.batch, s.length))
    copied = copy.deepcopy(early)
    first, late = module.step(x[:, 5:8], early)
    module.step(other[:, 5:8], early)
    module.step(other[:, 5:6], early)
    again, _ = module.step(x[:, 5:8], early)
    same(again, first, "the same step twice")
    same(module.step(x[:, 5:8], copied)[0], first, "from a copy")
    module.step(other[:, 5:8], early)
    close(module.step(x[:, 8:], late)[0], module(x)[:, 8:], "after others have written")


@law("L21", needs="streaming", pipeline=True)
@torch.no_grad()
def cache_algebra(s: Subject) -> None:
    """fork, reorder and crop of a cache each equal the full pass over the tokens it stands for."""
    module, x, other = s.build(causal=True), s.tokens(), s.tokens(seed=11)
    _, state = module.step(x[:, :6], module.init_state(s.batch, s.length))
    branch = state.fork()
    y, _ = module.step(other[:, 6:9], branch)
    close(y, module(torch.cat([x[:, :6], other[:, 6:9]], 1))[:, 6:], "fork")
    close(module.step(x[:, 6:9], state)[0], module(x[:, :9])[:, 6:], "beside the fork")
    swapped = state.reorder(torch.tensor([1, 0, 1]))
    y, _ = module.step(x[[1, 0, 1], 6:9], swapped)
    close(y, module(x[[1, 0, 1], :9])[:, 6:], "reorder")
    if state.window is None:
        cropped = state.crop(4)
        y, _ = module.step(other[:, 4:7], cropped)
        close(y, module(torch.cat([x[:, :4], other[:, 4:7]], 1))[:, 4:], "crop")
        y, _ = module.step(x[:, 6:9], state)
        close(y, module(x[:, :9])[:, 6:], "after a crop was written to")


@law("L21", needs="streaming", pipeline=True)
@torch.no_grad()
def cache_limits(s: Subject) -> None:
    """A full cache refuses; a layer that looks back W tokens keeps no more, before W, at W and far beyond."""
    T = s.length
    module, x = s.build(causal=True), s.tokens(length=40)
    _, state = module.step(x[:, :T], module.init_state(s.batch, T))
    if state.window is None:
        with refused(ValueError, f"1 new token exceeds capacity {T}", what="one token more than the capacity"):
            try:
                module.step(x[:, T : T + 1], state)
            except ValueError as error:
                says(error, f"capacity >= {T + 1}")
                raise
        return
    window = max(1, module.receptive_field().reach - 1 + module._halo())
    hold(state.window == window, f"the cache keeps {state.window} tokens, expected {window}")
    want, state = module(x), module.init_state(s.batch, 1)
    for n in range(x.shape[1]):
        y, state = module.step(x[:, n : n + 1], state)
        close(y, want[:, n : n + 1], f"token {n}")
        room = min(n + 1, window)
        hold(state.kept == room, f"after {n + 1} tokens the cache keeps {state.kept}, expected {room}")
        hold(all(b.shape[-2] == room for b in state.buffers.values()), f"a buffer holds no {room} tokens")


def paged(module: Any, batch: int, capacity: int, page_size: int = 3) -> tuple[Any, PagePool]:
    """A state in pages that lie in no order, in a pool that holds NaN wherever nothing was written."""
    if "pool" not in inspect.signature(module.init_state).parameters:
        does_not_apply("its state can't be kept in pages")
    pool = PagePool(8 * batch * (capacity // page_size + 1), page_size=page_size)
    state = module.init_state(batch, capacity, pool=pool)
    for b in pool.buffers.values():
        b.fill_(torch.nan if b.is_floating_point() else -1)
    order = torch.randperm(pool.num_pages, generator=torch.Generator().manual_seed(0))
    pool.take(pool.num_pages)
    pool.free(order)
    return state, pool


def alike(got: Tensor, want: Tensor, what: str) -> None:
    """To 1e-12: the same numbers, from elsewhere."""
    hold(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    off = (got - want).abs().max() if got.numel() else torch.tensor(0.0)
    hold(off <= 1e-12 * (1 + want.abs().max()), f"{what} differs by up to {off:.3g}")


@law("L21", needs="streaming", pipeline=True)
@torch.no_grad()
def pages_are_one_piece(s: Subject) -> None:
    """A state in shuffled pages gives what one in one piece gives, after forks, orders and crops too; behind a window
    pages are free, and all are when the states are gone."""
    module, x, other = s.build(causal=True), s.tokens(), s.tokens(seed=11)
    (state, pool), plain = paged(module, s.batch, s.length), module.init_state(s.batch, s.length)
    for a, b in itertools.pairwise((0, 4, 5, 6)):
        y, state = module.step(x[:, a:b], state)
        want, plain = module.step(x[:, a:b], plain)
        alike(y, want, f"tokens {a} to {b}")
    hold(state.length == 6 and state.kept == plain.kept, f"it says {state.length} tokens, {state.kept} of them kept")
    index = torch.tensor([1, 0, 1])
    beams, one = state.reorder(index), plain.reorder(index)
    for n in (6, 7):
        y, beams = module.step(x[index, n : n + 1], beams)
        want, one = module.step(x[index, n : n + 1], one)
        alike(y, want, f"reorder, token {n}")
    alike(module.step(other[:, 6:9], state.fork())[0], module.step(other[:, 6:9], plain.fork())[0], "fork")
    alike(module.step(x[:, 6:7], state)[0], module.step(x[:, 6:7], plain)[0], "beside the fork")
    if state.window is None:
        alike(module.step(other[:, 4:6], state.crop(4))[0], module.step(other[:, 4:6], plain.crop(4))[0], "crop")
        alike(module.step(x[:, 6:9], state)[0], module.step(x[:, 6:9], plain)[0], "after a crop was written to")
    else:
        del beams
        for _ in range(2 * state.window):
            _, state = module.step(x[:, :1], state)
        most = s.batch * (1 + -(-(state.window + 1) // pool.page_size))
        hold(pool.used_pages <= most, f"{pool.used_pages} pages are in use for {state.window} tokens, expected {most}")
    state = beams = None
    hold(pool.used_pages == 0, f"{pool.used_pages} pages are in use, and no state is left")


@law("L21", needs="streaming padding", pipeline=True)
@torch.no_grad()
def sequences_of_unequal_lengths(s: Subject) -> None:
    """Sequences of different lengths that are joined into one batch go on as each does alone."""
    module, x = s.build(causal=True), s.tokens()
    if not takes(module, "positions") or module.selector is not None or placed(module):
        does_not_apply("it can't be told positions, or chooses by places in the batch")
    state, _ = paged(module, 1, s.length)
    alone = [module.step(x[b : b + 1, :n], state)[1] for b, n in ((0, 7), (1, 3))]
    both = alone[0].join(alone[1])
    for t in (1, 2, 1):
        new = torch.stack([x[b, n : n + t] for b, n in enumerate(both.lengths)])
        got, both = module.step(new, both)
        for b in range(2):
            want, alone[b] = module.step(new[b : b + 1], alone[b])
            close(got[b : b + 1], want, f"the sequence of {alone[b].length} tokens")


@law("L21", needs="streaming", pipeline=True)
@torch.no_grad()
def cache_refusals(s: Subject) -> None:
    """A state of another batch or dtype, of another type, or without room is refused, by name."""
    module, x = s.build(causal=True), s.tokens()
    state = module.init_state(s.batch, s.length)
    with refused(ValueError, "must match", what="another batch than the state's"):
        module.step(s.tokens(s.batch + 1, 1), state)
    with refused(ValueError, "float32", what="a state of another dtype"):
        try:
            module.step(x[:, :1], module.init_state(s.batch, s.length, dtype=torch.float32))
        except ValueError as error:
            says(error, "float64")
            raise
    with refused(TypeError, "state has the wrong type", what="None for a state"):
        try:
            module.step(x[:, :1], None)
        except TypeError as error:
            says(error, "expected the KVCache")
            raise
    with refused(ValueError, "capacity is too small", what="a capacity of 0"):
        try:
            module.init_state(s.batch, 0)
        except ValueError as error:
            says(error, "expected an int >= 1")
            raise
    if "bidirectional" in module.supports:
        with refused(ValueError, "causal=True", what="a state of a layer that is not causal"):
            s.build(causal=False).init_state(s.batch, s.length)
    hold(s.heads % module.num_kv_heads == 0, f"{module.num_kv_heads} key heads for {s.heads} query heads")

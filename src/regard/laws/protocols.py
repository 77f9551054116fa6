"""What each protocol of `regard.kinds` promises beyond its signature, for those that are no plain mixers.

Every function takes the thing and what it is run on, and raises AssertionError where the promise is broken.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.kinds import CachePolicy, Distributed, Kept, Steer, Training


def equal(got: Any, want: Any, what: str) -> None:
    """Bit for bit, through tuples and lists."""
    if isinstance(want, Tensor):
        assert torch.equal(got, want), f"{what}: differs by up to {(got - want).abs().max():.3g}"
        return
    assert len(got) == len(want), f"{what}: {len(got)} results, expected {len(want)}"
    for one, other in zip(got, want, strict=True):
        equal(one, other, what)


# --- PyramidMixer -------------------------------------------------------------------------------------------


def maps_keep_their_sizes(module: nn.Module, maps: Sequence[Tensor]) -> None:
    """As many maps come out, each of its own size and width, and those handed in are left alone."""
    before = [m.clone() for m in maps]
    out = module(list(maps))
    assert [tuple(m.shape) for m in out] == [tuple(m.shape) for m in maps], "maps change in number or size"
    equal(list(maps), before, "the maps that were handed in")


def maps_of_a_batch_are_independent(module: nn.Module, maps: Sequence[Tensor]) -> None:
    """What stands in one entry of the batch changes no other."""
    changed = [torch.cat([m[:1], m[1:] + 1.0]) for m in maps]
    equal([m[:1] for m in module(changed)], [m[:1] for m in module(list(maps))], "the first entry of the batch")


def maps_reach_each_other(module: nn.Module, maps: Sequence[Tensor]) -> None:
    """Every map counts for the result, and every parameter is trained."""
    leaves = [m.clone().requires_grad_() for m in maps]
    loss = torch.stack([(m * torch.linspace(-1, 1, m.numel(), dtype=m.dtype).view_as(m)).sum() for m in module(leaves)])
    wanted = [*leaves, *module.parameters()]
    grads = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
    assert all(g is not None and g.isfinite().all() and bool(g.any()) for g in grads), "something gets no gradient"


# --- Model --------------------------------------------------------------------------------------------------


def model_repeats_itself(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """In eval mode twice the same, and a copy with its state_dict too."""
    module.eval()
    with torch.no_grad():
        want = module(*inputs)
        equal(module(*inputs), want, "the same call again")
        twin = copy.deepcopy(module)
        for p in twin.parameters():
            nn.init.constant_(p, 0.5)
        twin.load_state_dict(module.state_dict())
        equal(twin(*inputs), want, "a copy with its state_dict")


def model_shows_its_mixers(module: Any) -> None:
    """`mixers` are modules of the model, each once: what other mechanisms may take the place of."""
    mixers = list(module.mixers)
    inside = {id(part) for part in module.modules()}
    assert mixers, "mixers is empty"
    assert len({id(mixer) for mixer in mixers}) == len(mixers), "a mixer is listed twice"
    assert all(id(mixer) in inside for mixer in mixers), "a mixer is no module of the model"


# --- CachePolicy --------------------------------------------------------------------------------------------


def attend(q: Tensor, kept: Kept) -> Tensor:
    """Plain attention of one query a head over what a policy gives: (B, H, 1, D) -> (B, H, 1, V)."""
    repeat = q.shape[1] // kept.k.shape[1]
    k, v = (z.repeat_interleave(repeat, 1) for z in (kept.k, kept.v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if kept.bias is not None:
        scores = scores + kept.bias.repeat_interleave(repeat, 1)[:, :, None]
    empty = (kept.positions < 0).repeat_interleave(repeat, 1)[:, :, None]
    return scores.masked_fill(empty, -torch.inf).softmax(-1) @ v


def policy_with_room_is_exact(policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor) -> None:
    """With a budget for all tokens, attention over what it keeps is attention over everything."""
    state = policy.init_state(k.shape[0], k.shape[1], k.shape[3], value_dim=v.shape[3])
    for t in range(k.shape[2]):
        at = slice(t, t + 1)
        kept, state = policy.update(state, k[:, :, at], v[:, :, at], q[:, :, at])
        every = Kept(k[:, :, : t + 1], v[:, :, : t + 1], torch.arange(t + 1).expand(k.shape[0], k.shape[1], -1))
        torch.testing.assert_close(attend(q[:, :, at], kept), attend(q[:, :, at], every))


def policy_keeps_its_budget(policy: CachePolicy, budget: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Never more than `budget` keys a head, on the average over heads; each place holds a position that was seen, and
    the newest is there."""
    state = policy.init_state(k.shape[0], k.shape[1], k.shape[3], value_dim=v.shape[3])
    for t in range(k.shape[2]):
        at = slice(t, t + 1)
        kept, state = policy.update(state, k[:, :, at], v[:, :, at], q[:, :, at])
        most = int((kept.positions >= 0).sum((1, 2)).max())
        assert most <= budget * k.shape[1], (
            f"{most} keys of {k.shape[1]} heads are kept after {t + 1} tokens, the budget is {budget}"
        )
        assert not kept.full or int(kept.positions.min()) >= 0, "places are empty, and it says that none is"
        assert kept.k.shape[:3] == kept.v.shape[:3] == kept.positions.shape, "keys, values and positions don't match"
        assert int(kept.positions.max()) == t, "a query can't see its own token"
        assert int(kept.positions.min()) >= -1, "a position before the first"


def policy_state_is_a_value(policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Going on twice from one state gives the same twice: nothing is written into it, nothing hidden."""
    state = policy.init_state(k.shape[0], k.shape[1], k.shape[3], value_dim=v.shape[3])
    half = k.shape[2] // 2
    for t in range(half):
        at = slice(t, t + 1)
        _, state = policy.update(state, k[:, :, at], v[:, :, at], q[:, :, at])
    at = slice(half, half + 1)
    first, _ = policy.update(state, k[:, :, at], v[:, :, at], q[:, :, at])
    before = [z.clone() for z in first if isinstance(z, Tensor)]
    policy.update(state, -k[:, :, at], -v[:, :, at], q[:, :, at])
    again, _ = policy.update(state, k[:, :, at], v[:, :, at], q[:, :, at])
    equal([z for z in again if isinstance(z, Tensor)], before, "the second branch")
    equal([z for z in first if isinstance(z, Tensor)], before, "what the first branch was given")


def policy_takes_a_prompt(policy: CachePolicy, budget: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The queries of a prompt get all of it; what is kept then is within the budget, of the prompt, in order."""
    state, n = policy.init_state(k.shape[0], k.shape[1], k.shape[3], value_dim=v.shape[3]), k.shape[2] - 1
    kept, state = policy.update(state, k[:, :, :n], v[:, :, :n], q[:, :, :n])
    equal([kept.k, kept.v], [k[:, :, :n], v[:, :, :n]], "what a prompt's queries get")
    kept, _ = policy.update(state, k[:, :, n:], v[:, :, n:], q[:, :, n:])
    real = kept.positions >= 0
    assert int(real.sum((1, 2)).max()) <= budget * k.shape[1], "more is kept than the budget"
    places = kept.positions.long().clamp(min=0)[..., None]
    for name, z, held in (("keys", k, kept.k), ("values", v, kept.v)):
        want = z.gather(2, places.expand(-1, -1, -1, z.shape[3]))
        equal(held[real], want[real], f"{name} that stood at these positions")
    steps = kept.positions.long().diff(dim=2)
    assert bool((steps > 0)[real[:, :, :-1]].all()), "positions are not in order"


def policy_follows_beams(policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Rows that are reordered go on as they would have, where they stood."""
    at, n = torch.arange(len(k)).flip(0).repeat_interleave(2), k.shape[2] // 2
    state = policy.init_state(k.shape[0], k.shape[1], k.shape[3], value_dim=v.shape[3])
    _, state = policy.update(state, k[:, :, :n], v[:, :, :n], q[:, :, :n])
    beams = policy.reorder(state, at)
    for t in range(n, k.shape[2]):
        new = [z[:, :, t : t + 1] for z in (k, v, q)]
        one, state = policy.update(state, *new)
        two, beams = policy.update(beams, *(z[at] for z in new))
        torch.testing.assert_close(attend(new[2][at], two), attend(new[2], one)[at])


def policy_leaves_padding_out(policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor) -> None:
    """A row gets what it would alone, whatever stands before its first token."""
    pads, n, rows = 2, k.shape[2] // 2 + 2, []
    keep = torch.ones(len(k), k.shape[2], dtype=torch.bool)
    keep[1:, :pads] = False
    for row, start in [(slice(None), 0), (slice(0, 1), 0), *((slice(b, b + 1), pads) for b in range(1, len(k)))]:
        state = policy.init_state(len(k[row]), k.shape[1], k.shape[3], value_dim=v.shape[3])
        told, found = (keep if start == 0 and row == slice(None) else None), []
        for at in (slice(start, n), *(slice(t, t + 1) for t in range(n, k.shape[2]))):
            new = [z[row][:, :, at] for z in (k, v, q)]
            kept, state = policy.update(state, *new, keep=None if told is None else told[:, at])
            found.append(attend(new[2][:, :, -1:], kept))
        rows.append(torch.cat(found, 2))
    torch.testing.assert_close(rows[0], torch.cat(rows[1:]))


# --- Steer and Training -------------------------------------------------------------------------------------


class Stopped(Exception):
    """What the laws raise inside a context."""


def steering_ends(steer: Steer, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Inside, outputs change; afterwards, also after an error, they are bit for bit what they were."""
    model.eval()
    with torch.no_grad():
        want, keys = model(*inputs), list(model.state_dict())
        with steer.attach(model):
            assert not _same(model(*inputs), want), "steering changes nothing"
        equal(model(*inputs), want, "after the context")
        try:
            with steer.attach(model):
                raise Stopped
        except Stopped:
            pass
        equal(model(*inputs), want, "after an error in the context")
        with steer.attach(model), steer.attach(model):
            pass
        equal(model(*inputs), want, "after nested contexts")
        assert list(model.state_dict()) == keys, "the state_dict has other keys"


def neutral_steering_changes_nothing(neutral: Steer, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """At strength 0 (or whatever leaves things as they are) the output is bit for bit the plain one."""
    model.eval()
    with torch.no_grad():
        want = model(*inputs)
        with neutral.attach(model):
            equal(model(*inputs), want, "neutral steering")


def training_leaves_the_model(training: Training, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """The losses are finite scalars with gradients; afterwards the model's keys and function are its own again."""
    keys = list(model.state_dict())
    with training.attach(model):
        for step in range(3):
            loss = training.loss(_first(model(*inputs)).square().mean(), step)
            assert loss.shape == (), f"the loss has shape {tuple(loss.shape)}"
            assert bool(loss.isfinite()), f"the loss is {loss}"
            grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
            assert any(g is not None and bool(g.any()) for g in grads), "no parameter gets a gradient"
        inside = copy.deepcopy(dict(model.named_parameters()))
    assert list(model.state_dict()) == keys, "the state_dict has other keys"
    equal(list(model.parameters()), list(inside.values()), "parameters after the context")
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        equal(model.eval()(*inputs), plain(*inputs), "the model after the context")


def neutral_training_is_training(neutral: Training, make: Callable[[], nn.Module], inputs: tuple[Any, ...]) -> None:
    """At strength 0 a run of training is bit for bit the plain one."""
    plain, other = _trained(None, make, inputs), _trained(neutral, make, inputs)
    equal(other, plain, "parameters after three steps")


def _trained(training: Training | None, make: Callable[[], nn.Module], inputs: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def descend(step: int) -> None:
        loss = _first(model(*inputs)).square().mean()
        loss = loss if training is None else training.loss(loss, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if training is None:
        for step in range(3):
            descend(step)
    else:
        with training.attach(model):
            for step in range(3):
                descend(step)
    return [p.detach() for p in model.parameters()]


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _same(got: Any, want: Any) -> bool:
    try:
        equal(got, want, "")
    except AssertionError:
        return False
    return True


# --- Distributed --------------------------------------------------------------------------------------------


def shares_make_the_whole(
    attend: Distributed, q: Tensor, k: Tensor, v: Tensor, whole: Callable[..., Tensor], **options: Any
) -> None:
    """On this rank: the outputs and gradients for its share of the sequence are those of one process with all of it.

    Every rank calls this with the same q, k and v, inside an initialised process group (or without one, alone).
    """
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
    mine = [z.tensor_split(world, 2)[rank].clone().requires_grad_() for z in (q, k, v)]
    every = [z.clone().requires_grad_() for z in (q, k, v)]
    got, want = attend(*mine, **options), whole(*every, **options)
    weight = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    torch.testing.assert_close(got, want.tensor_split(world, 2)[rank])
    grads = torch.autograd.grad((got * weight.tensor_split(world, 2)[rank]).sum(), mine)
    wanted = torch.autograd.grad((want * weight).sum(), every)
    for name, one, other in zip("qkv", grads, wanted, strict=True):
        part = other.tensor_split(world, 2)[rank]
        off = float((one - part).abs().max())
        assert off <= 1e-7, f"the gradient of {name} is off by {off:.3g}"

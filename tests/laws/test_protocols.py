"""The laws of the protocols that are no plain mixers: over every card of theirs, and over small ones made here.

The small ones come in pairs, one right and one wrong in just one way: a law that lets the wrong one pass is no law.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import catalog, kinds, masks
from regard.cards import Protocols
from regard.kinds import Kept
from regard.laws import protocols as law
from regard.laws.subject import of, tokens


def names(protocol: str) -> list[str]:
    """Cards that follow it."""
    return [name for name in regard.mechanisms() if regard.card(name).protocol == protocol]


def test_every_protocol_is_decided() -> None:
    """Each has a description in `kinds`, but for an Analysis, which is any function."""
    for name in set(get_args(Protocols)) - {"Analysis"}:
        assert getattr(kinds, name).__doc__


# --- PyramidMixer -------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Every map plus the mean of all the others' means."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, maps):
        mean = torch.stack([m.mean((1, 2, 3), keepdim=True) for m in maps]).mean(0)
        return [m + self.weight * mean.square() for m in maps]


class OverTheBatch(Pyramid):
    def forward(self, maps):
        return [m - self.weight * m.mean(0, keepdim=True) for m in maps]


class Coarser(Pyramid):
    def forward(self, maps):
        return [self.weight * m[..., ::2, ::2] for m in maps]


class Alone(Pyramid):
    def forward(self, maps):
        return [self.weight * maps[0], *(m.detach() for m in maps[1:])]


class InPlace(Pyramid):
    def forward(self, maps):
        return [m.add_(1) for m in maps]


def maps() -> list[Tensor]:
    return [torch.randn(2, c, n, n).double() for c, n in ((4, 8), (6, 4))]


PYRAMID = [law.maps_keep_their_sizes, law.maps_of_a_batch_are_independent, law.maps_reach_each_other]


@pytest.mark.parametrize("holds", PYRAMID, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*names("PyramidMixer"), "right"])
def test_pyramids(name: str, holds) -> None:
    module = Pyramid().double() if name == "right" else of(name).build()
    holds(module, maps() if name == "right" else of(name).inputs()[0])


@pytest.mark.parametrize(
    ("wrong", "holds"), [(Coarser, PYRAMID[0]), (InPlace, PYRAMID[0]), (OverTheBatch, PYRAMID[1]), (Alone, PYRAMID[2])]
)
def test_wrong_pyramids(wrong, holds) -> None:
    with pytest.raises(AssertionError):
        holds(wrong().double(), maps())


# --- Model --------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A model of one layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(regard.Attention(24, 6) for _ in range(2))
        self.head = nn.Linear(24, 3)

    @property
    def mixers(self):
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


class Forgetful(Small):
    """Its scale is no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Hiding(Small):
    @property
    def mixers(self):
        return [regard.Attention(24, 6)]


@pytest.mark.parametrize("name", [*names("Model"), "right"])
def test_models(name: str) -> None:
    module = Small().double() if name == "right" else of(name).build()
    law.model_repeats_itself(module, (tokens(),) if name == "right" else of(name).inputs())
    law.model_shows_its_mixers(module)


def test_wrong_models() -> None:
    with pytest.raises(AssertionError, match="the same call again"):
        law.model_repeats_itself(Forgetful().double(), (tokens(),))
    with pytest.raises(AssertionError, match="no module of the model"):
        law.model_shows_its_mixers(Hiding())


# --- CachePolicy --------------------------------------------------------------------------------------------


class Newest:
    """The last `budget` tokens."""

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def init_state(self, batch_size, num_kv_heads, head_dim, *, value_dim=None):
        shape = (batch_size, num_kv_heads, 0)
        at = torch.zeros(shape, dtype=torch.long)
        return torch.zeros(*shape, head_dim).double(), torch.zeros(*shape, value_dim or head_dim).double(), at, 0

    def update(self, state, k, v, q=None):
        seen = state[3] + k.shape[2]
        at = torch.arange(state[3], seen).expand(*k.shape[:2], -1)
        held = [torch.cat([a, b], 2)[:, :, -self.budget :] for a, b in zip(state[:3], (k, v, at), strict=True)]
        return Kept(*held), (*held, seen)


class Growing(Newest):
    """Forgets its budget."""

    def update(self, state, k, v, q=None):
        self.budget += 1
        return super().update(state, k, v, q)


class Hidden(Newest):
    """Keeps its state on itself."""

    def update(self, state, k, v, q=None):
        kept, self.state = super().update(getattr(self, "state", state), k, v, q)
        return kept, self.state


class Shuffled(Newest):
    """Its values come from other keys."""

    def update(self, state, k, v, q=None):
        kept, state = super().update(state, k, v, q)
        return kept._replace(v=kept.v.flip(2)), state


def qkv(n: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, h, n, d).double() for h, d in ((4, 3), (2, 3), (2, 5)))


@pytest.mark.parametrize("name", [*names("CachePolicy"), "right"])
def test_cache_policies(name: str) -> None:
    def make(budget: int):
        return Newest(budget) if name == "right" else of(name).build(budget=budget)

    law.policy_with_room_is_exact(make(64), *qkv())
    law.policy_keeps_its_budget(make(4), 4, *qkv())
    law.policy_state_is_a_value(make(4), *qkv())
    if name != "right":  # which is no more than the laws above need
        law.policy_takes_a_prompt(make(4), 4, *qkv())
        law.policy_follows_beams(make(4), *qkv())
        law.policy_leaves_padding_out(make(4), *qkv())


def test_wrong_cache_policies() -> None:
    with pytest.raises(AssertionError):
        law.policy_with_room_is_exact(Shuffled(64), *qkv())
    with pytest.raises(AssertionError, match="the budget is 4"):
        law.policy_keeps_its_budget(Growing(4), 4, *qkv())
    with pytest.raises(AssertionError):
        law.policy_state_is_a_value(Hidden(4), *qkv())


# --- Steer and Training -------------------------------------------------------------------------------------


class Louder:
    """Outputs of every mixer times a factor."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    @contextlib.contextmanager
    def attach(self, model):
        hooks = [m.register_forward_hook(lambda module, args, out: out * self.factor) for m in model.mixers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Stays(Louder):
    """Does not clean up after an error."""

    @contextlib.contextmanager
    def attach(self, model):
        hooks = [m.register_forward_hook(lambda module, args, out: out * self.factor) for m in model.mixers]
        yield
        for hook in hooks:
            hook.remove()


class Scaled(Louder):
    """Multiplies weights and divides again: not bit for bit."""

    @contextlib.contextmanager
    def attach(self, model):
        for p in model.parameters():
            p.data.mul_(1.1)
        yield
        for p in model.parameters():
            p.data.div_(1.1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().double()


@pytest.mark.parametrize("name", [*names("Steer"), "right"])
def test_steering(name: str) -> None:
    steer = Louder() if name == "right" else of(name).build()
    law.steering_ends(steer, model(), (tokens(),))
    law.neutral_steering_changes_nothing(
        Louder(1.0) if name == "right" else of(name).build(strength=0), model(), (tokens(),)
    )


@pytest.mark.parametrize("wrong", [Stays(), Scaled(), Louder(1.0)], ids=["stays", "scaled", "does nothing"])
def test_wrong_steering(wrong) -> None:
    with pytest.raises(AssertionError):
        law.steering_ends(wrong, model(), (tokens(),))


class Decay:
    """A loss on the size of the mixers' parameters."""

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    @contextlib.contextmanager
    def attach(self, model):
        self.model = model
        yield

    def loss(self, loss: Tensor, step: int) -> Tensor:
        return loss + self.strength * sum(p.square().sum() for p in self.model.parameters())


class Adds(Decay):
    """Leaves something behind in the model."""

    @contextlib.contextmanager
    def attach(self, model):
        self.model = model
        model.extra = nn.Parameter(torch.zeros(1).double())
        yield


@pytest.mark.parametrize("name", [*names("Training"), "right"])
def test_trainings(name: str) -> None:
    law.training_leaves_the_model(Decay() if name == "right" else of(name).build(), model(), (tokens(),))
    law.neutral_training_is_training(Decay(0.0) if name == "right" else of(name).build(strength=0), model, (tokens(),))


def test_wrong_trainings() -> None:
    with pytest.raises(AssertionError, match="other keys"):
        law.training_leaves_the_model(Adds(), model(), (tokens(),))
    with pytest.raises(AssertionError, match="parameters after three steps"):
        law.neutral_training_is_training(Decay(0.1), model, (tokens(),))


# --- Distributed --------------------------------------------------------------------------------------------


class AllGather(torch.autograd.Function):
    """Every rank's share, one after another; backward adds up what all ranks say of this share."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, z.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.contiguous()
        torch.distributed.all_reduce(total)
        return total.tensor_split(torch.distributed.get_world_size(), 2)[torch.distributed.get_rank()]


def gathered(q: Tensor, k: Tensor, v: Tensor, *, group=None) -> Tensor:
    """The simplest right one: every rank gathers all keys and values."""
    if not torch.distributed.is_initialized():
        return regard.attention(q, k, v, mask=masks.causal())
    k, v = AllGather.apply(k), AllGather.apply(v)
    rank, T = torch.distributed.get_rank(group), q.shape[2]
    allowed = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()[rank * T : (rank + 1) * T]
    return regard.attention(q, k, v, mask=allowed[None, None])


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return regard.attention(q, k, v, mask=masks.causal())


def lonely(q: Tensor, k: Tensor, v: Tensor, *, group=None) -> Tensor:
    """Forgets the other ranks."""
    return causal(q, k, v)


def functions() -> dict:
    found = {
        name: catalog.card(name).builder for name in catalog.names() if catalog.card(name).protocol == "Distributed"
    }
    return {**found, "right": gathered}


@pytest.mark.parametrize("name", functions())
def test_distributed_alone(name: str) -> None:
    torch.manual_seed(0)
    law.shares_make_the_whole(functions()[name], *torch.randn(3, 2, 4, 8, 3).double(), whole=causal)


def _rank(rank: int, world: int, file: str, name: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(0)
    attend = lonely if name == "lonely" else functions()[name]
    law.shares_make_the_whole(attend, *torch.randn(3, 2, 4, 8, 3).double(), whole=causal)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", functions())
def test_distributed_over_two(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (2, str(Path(folder) / "store"), name), nprocs=2)


@pytest.mark.slow
def test_wrong_distribution() -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(torch.multiprocessing.ProcessRaisedException):
        torch.multiprocessing.spawn(_rank, (2, str(Path(folder) / "store"), "lonely"), nprocs=2)

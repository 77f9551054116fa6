"""Protocols: what the modules of each kind take and give. A card names its own in `protocol`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@runtime_checkable
class TokenMixer(Protocol):
    """(B, T, M)[, context (B, S, M)][, mask] -> (B, T, M)."""

    def forward(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class StreamingMixer(TokenMixer, Protocol):
    """A TokenMixer that can also run token by token. The state is a value: handed in, handed back, never hidden."""

    def init_state(self, batch_size: int, capacity: int) -> object: ...

    def step(self, x: Tensor, state: object) -> tuple[Tensor, object]: ...


@runtime_checkable
class CrossMixer(Protocol):
    """(B, T, M), context (B, S, M)[, where things stand] -> (B, T, M)."""

    def forward(self, x: Tensor, context: Tensor, /) -> Tensor: ...


@runtime_checkable
class FeatureMixer(Protocol):
    """(B, C, *sizes) -> (B, C, *sizes), mostly (B, C, Y, X)."""

    def forward(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class GraphMixer(Protocol):
    """nodes (N, M), edge_index (2, E) of sources and targets -> nodes (N, M)."""

    def forward(self, nodes: Tensor, edge_index: Tensor, /) -> Tensor: ...


class EdgeWeights(NamedTuple):
    """Which weight belongs to which edge of a graph layer."""

    edge_index: Int[Tensor, "2 F"]
    """Sources and targets: the caller's edges in the caller's order, then those that the layer adds by itself."""
    weights: Float[Tensor, "F H"]
    """Of each edge, per head, or per channel where the mechanism has one for each; 0 for an edge that doesn't count."""
    given: int
    """E: how many of them, the first ones, are the caller's."""


@runtime_checkable
class EdgeWeigher(GraphMixer, Protocol):
    """A GraphMixer that can also tell the weight of each edge, for the arguments that its forward takes.

    They are those of evaluation, before any dropout, and may take gradients.
    """

    def edge_weights(self, nodes: Tensor, edge_index: Tensor, /) -> EdgeWeights: ...


@runtime_checkable
class Pooler(Protocol):
    """(B, T, M) -> (B, M)."""

    def forward(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class Pointer(Protocol):
    """(B, T, M), context (B, S, M) -> log-probabilities (B, T, S) of pointing at each token of the context."""

    def forward(self, x: Tensor, context: Tensor, /) -> Tensor: ...


@runtime_checkable
class Loss(Protocol):
    """Tensors -> a scalar to be minimised, or added to what is."""

    def forward(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class PyramidMixer(Protocol):
    """A list of feature maps (B, C_l, Y_l, X_l), fine to coarse -> as many maps, each of its own size and width."""

    def forward(self, maps: Sequence[Tensor], /) -> list[Tensor]: ...


@runtime_checkable
class Model(Protocol):
    """A whole model of an application: inputs as its task gives them -> a tensor, or a named tuple of tensors.

    Its card's `inputs` make a small example. `mixers` are the modules that could be others: what `swap` and `compare`
    put other mechanisms in place of.
    """

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]: ...

    @property
    def mixers(self) -> Sequence[nn.Module]: ...


class Kept(NamedTuple):
    """What a cache policy gives queries to attend to."""

    k: Float[Tensor, "B G n D"]
    v: Float[Tensor, "B G n V"]
    positions: Int[Tensor, "B G n"]
    """Where each key stood in its own sequence, padding not counted; -1 = an empty place, not to be attended to."""
    bias: Float[Tensor, "B G n"] | None = None
    """What is added to the scores of each key, e.g. the logarithm of how many keys it stands for."""
    full: bool = False
    """True: no place is empty, so that nobody need look for them."""


@runtime_checkable
class CachePolicy(Protocol):
    """What is kept of past keys and values. The state is a value: handed in, handed back, never hidden.

    By convention its option `budget` is how many keys are kept: the most a head, on the average over a layer's heads,
    or as a float the share of those seen; with room for all it is exact. `regard.cache.Evicting` is one to start from.
    """

    def init_state(self, batch_size: int, num_kv_heads: int, head_dim: int, *, value_dim: int | None = None) -> Any: ...

    def update(
        self,
        state: Any,
        k: Float[Tensor, "B G t D"],
        v: Float[Tensor, "B G t V"],
        q: Float[Tensor, "B H t D"] | None = None,
        *,
        keep: Bool[Tensor, "B t"] | None = None,
        scale: float | None = None,
        turn: "Turn | None" = None,
    ) -> tuple[Kept, Any]:
        """Take in t tokens: what their queries attend to (they among it), and the state after them.

        One token attends to what is kept with it. Several (a prompt) attend to all that was kept before and to one
        another, which stand last, in their order; only then is the state brought to its budget.

        Args:
            q: their queries, for policies that judge keys by what is asked of them.
            keep: which are tokens; padding is never kept, and counts for nothing.
            scale: of scores, 1 / sqrt(D) by default.
            turn: what rotates queries and keys by their positions, for policies that look at them before rotation.
        """
        ...

    def reorder(self, state: Any, index: Int[Tensor, " B2"]) -> Any:
        """The state of batch rows `index`, such as beams."""
        ...

    def at_layer(self, n: int, layers: int) -> "CachePolicy":
        """The policy of the n-th of a model's layers, for budgets that differ between them."""
        ...


class Turn(Protocol):
    """Rotates heads (B, H, T, D) that stand at positions (T,) or (B, T); negative ones turn them back."""

    def __call__(self, z: Float[Tensor, "B H T D"], at: Int[Tensor, "*b T"], /) -> Float[Tensor, "B H T D"]: ...


@runtime_checkable
class Training(Protocol):
    """What changes how a model is trained. The model's state_dict keys stay as they are.

    By convention its option `strength` is how much; 0 trains bit for bit as without it.
    """

    def attach(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Work on this model until the context ends."""
        ...

    def loss(self, loss: Tensor, step: int) -> Tensor:
        """The loss to descend at this step (from 0), given the task's."""
        ...


@runtime_checkable
class Steer(Protocol):
    """Changes attention in a running model while its context lasts; afterwards the model is bit for bit as before.

    By convention its option `strength` is how much; 0 changes nothing.
    """

    def attach(self, model: nn.Module) -> AbstractContextManager[Any]: ...


@runtime_checkable
class Distributed(Protocol):
    """Exact attention whose sequence is spread over a process group: each rank's share of queries, keys and values
    -> its share of the outputs. `group` None is the default group; one process alone gives plain attention."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, *, group: Any = None, **options: Any) -> Tensor: ...

"""What location-relative alignments share: where to look follows from where one looked last."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Paper
from regard.kernels.sums import over_keys
from regard.recurrent._aligner import Aligner, Padding

LOCATION_PAPER = Paper(
    "Location-Relative Attention Mechanisms For Robust Long-Form Speech Synthesis",
    "Battenberg et al.",
    2019,
    "1910.10288",
)
"""Behind dynamic convolution and Gaussian mixture attention, whose cards say what was read."""


class LocationState(NamedTuple):
    """What a step hands to the next: the context, and where the alignment stands."""

    context: Float[Tensor, "B S C"]
    keep: Bool[Tensor, "B S"] | None
    at: Tensor
    """The last weights (B, S), or the means (B, K)."""


class LocationAligner(Aligner):
    """An alignment that is a function of the last one and of the decoder state."""

    remembers = True

    def start(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], *, mask: Padding = None
    ) -> LocationState:
        """The state before the first step; x only tells batch and width, and may have no steps."""
        context, keep = self.source(x, context, mask)
        return LocationState(context, keep, self.origin(x, context, keep))

    def step(self, x: Float[Tensor, "B t M"], state: LocationState) -> tuple[Float[Tensor, "B t C"], LocationState]:
        """The next t decoder steps: context vectors and the state after them."""
        weights, at = self.advance(x, state.context, state.keep, state.at)
        return over_keys(weights, state.context), state._replace(at=at)

    def align(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], keep: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B T C"]:
        return self.step(x, LocationState(context, keep, self.origin(x, context, keep)))[0]

    def weights(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], *, mask: Padding = None
    ) -> Float[Tensor, "B T S"]:
        """alpha of all steps."""
        state = self.start(x, context, mask=mask)
        return self.advance(x, state.context, state.keep, state.at)[0]

    def origin(self, x: Tensor, context: Tensor, keep: Tensor | None) -> Tensor:
        """Where the alignment stands before the first step."""
        raise NotImplementedError

    def advance(
        self, x: Tensor, context: Tensor, keep: Tensor | None, at: Tensor
    ) -> tuple[Float[Tensor, "B t S"], Tensor]:
        """The weights of the next steps, and where the alignment then stands."""
        raise NotImplementedError

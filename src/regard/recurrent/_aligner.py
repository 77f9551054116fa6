"""What the alignments of recurrent decoders share: checked inputs, hidden padding, honest NaN."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import checked, whole
from regard.masks import Mask
from regard.normalizers.softmax import softmax
from regard.pipeline.tokens import key_padding, quarantine, spoil

Padding = Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None
"""`regard.masks.padding(...)`, or bool with True = a real token of the context."""


def normalise(scores: Float[Tensor, "B t S"], keep: Bool[Tensor, " B #t S"] | None) -> Float[Tensor, "B t S"]:
    """Softmax over the kept keys of each row; a row without any gets weights 0."""
    return softmax(scores[:, None], None if keep is None else keep.expand(scores.shape)[:, None])[:, 0]


class Aligner(nn.Module):
    """Decoder vectors x (B, T, dim) look at a context (B, S, context_dim). A mechanism overrides `align`."""

    remembers: bool = False
    """Whether a step depends on earlier steps, so that a NaN spoils what follows too."""

    def __init__(self, dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        whole(self, dim=dim, context_dim=context_dim)
        self.dim, self.context_dim = dim, context_dim

    def align(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], keep: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B T N"]:
        """The mechanism. All is finite, hidden tokens are 0; `keep` is True at real ones."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], *, mask: Padding = None
    ) -> Float[Tensor, "B T N"]:
        """All decoder steps at once. `mask` hides tokens of the context."""
        context, keep = self.source(x, context, mask)
        x, bad = quarantine(x)
        context, bad_source = quarantine(context)
        out = self.align(x, context, keep)
        if bad is not None and self.remembers:
            bad = bad.cummax(1).values
        return spoil(out, bad, bad_source, None)

    @checked(M="dim", C="context_dim")
    def source(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], mask: Padding
    ) -> tuple[Float[Tensor, "B S C"], Bool[Tensor, "B S"] | None]:
        """The context with hidden tokens set to 0, and which are real; raises where shapes don't fit."""
        keep = key_padding(self, mask, context)
        return (context if keep is None else context.masked_fill(~keep[..., None], 0)), keep

    def extra_repr(self) -> str:
        return f"{self.dim}, context_dim={self.context_dim}"


def uniform_(module: nn.Module, bound: float) -> None:
    """All parameters uniform in [-bound, bound], as these papers do."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-bound, bound)

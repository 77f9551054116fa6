"""Luong's local attention: a decoder state looks at a window of encoder states around one place.

The Gaussian is applied after the softmax, without normalising again; p_t learns through it alone.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import choice, refuse, whole
from regard.pipeline.tokens import quarantine
from regard.recurrent._aligner import Padding, normalise
from regard.recurrent.luong import PAPERS, LuongAttention, Score
from regard.tracing import exporting

CARD = Card(
    "luong_local",
    equation="""local-m   p_t = t;                            a_t = softmax over |s - t| <= D
local-p   p_t = S sigmoid(v_p . tanh(W_p h_t));  a_t(s) = softmax over |s - floor(p_t)| <= D of the score,
          times exp(-(s - p_t)^2 / (2 (D/2)^2))
c_t = sum_s a_t(s) H_s        h~_t = tanh(W_c [c_t; h_t])        D = half_width""",
    papers=PAPERS,
    protocol="CrossMixer",
    supports={"bidirectional", "padding", "compile"},
    cost=Cost("2*B*T*(2*half_width + 1)*M + B*(S + T)*M*M", ""),
    claim="Only the window is read: what stands outside it changes no bit: "
    "tests/recurrent/test_luong_local.py::test_only_the_window_is_read.",
    differs=("With padding, places are counted among the real tokens; nothing else is known to differ.",),
    verified="reconstructed",
    example={"half_width": 2},
    defaults={
        "context_dim": "ours, as wide as dim",
        "alignment": "paper",
        "half_width": "code",
        "score": "code",
        "hidden": "code",
    },
    exceptions={"L59": "a predicted place among 100,000 is a float32 number: sigmoid's own rounding moves it by 0.006"},
)


@CARD.module
class LocalLuongAttention(LuongAttention):
    """Attention to the 2 `half_width` + 1 places around one; nothing else of the context is read.

    Args:
        alignment: where the window stands: "monotonic" (local-m: at the decoder's step) or "predictive" (local-p).
        half_width: D; 10 in the authors' code.
        dim, context_dim, hidden: as of `LuongAttention`.
        score: "dot", "general" or "concat".
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        alignment: Literal["monotonic", "predictive"] = "predictive",
        half_width: int = 10,
        score: Score = "general",
        hidden: int | None = None,
    ) -> None:
        choice("LocalLuongAttention", ("monotonic", "predictive"), alignment=alignment)
        whole("LocalLuongAttention", half_width=half_width)
        if score == "location":
            refuse("LocalLuongAttention", "score", "is global only", repr(score), "'dot', 'general' or 'concat'")
        super().__init__(dim, context_dim=context_dim, score=score, hidden=hidden)
        self.alignment, self.half_width = alignment, half_width
        if alignment == "predictive":
            self.p_proj = nn.Linear(dim, dim, bias=False)
            self.p_vector = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"],
        *,
        mask: Padding = None,
        first: int = 0,
    ) -> Float[Tensor, "B T M"]:
        """All decoder steps at once. `first` is the number of the step that x starts with (for local-m)."""
        context, keep = self.source(x, context, mask)
        x, bad = quarantine(x)
        context, bad_source = quarantine(context)
        if keep is not None:  # real tokens first, in their order
            order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)
            context = context.gather(1, order[..., None].expand_as(context))
            bad_source = None if bad_source is None else bad_source.gather(1, order)
            lengths = keep.sum(1)
        else:
            lengths = torch.full(context.shape[:1], context.shape[1], device=x.device)
        p = self.places(x, lengths, first)
        places = self.window(p, lengths, self.half_width if exporting() else min(self.half_width, context.shape[1]))
        out = self.combine(self.read(x, context, p, places, lengths), x)
        if bad is None and bad_source is None:
            return out
        bad = out.new_zeros(out.shape[:2], dtype=torch.bool) if bad is None else bad
        if bad_source is not None and context.shape[1]:
            inside = (places >= 0) & (places < lengths[:, None, None])
            bad = bad | (self._at(bad_source[..., None], places)[..., 0] & inside).any(-1)
        return out.masked_fill(bad[..., None], torch.nan)

    def places(self, x: Float[Tensor, "B T M"], lengths: Int[Tensor, " B"], first: int = 0) -> Float[Tensor, "B T"]:
        """p_t: real-valued where it is predicted."""
        work = torch.promote_types(x.dtype, torch.float32)
        if self.alignment == "predictive":
            z = torch.tanh(self.p_proj(x)) @ self.p_vector
            return lengths[:, None] * z.to(work).sigmoid()
        t = torch.arange(first, first + x.shape[1], device=x.device, dtype=work)
        return torch.minimum(t, lengths[:, None] - 1)

    def window(self, p: Float[Tensor, "B T"], lengths: Int[Tensor, " B"], reach: int) -> Int[Tensor, "B T W"]:
        """The places within `reach` of floor(p); some may lie outside the context."""
        offsets = torch.arange(-reach, reach + 1, device=p.device)
        centre = torch.minimum(p.detach().floor().long(), lengths[:, None] - 1)
        return centre[..., None] + offsets

    def read(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"],
        p: Float[Tensor, "B T"],
        places: Int[Tensor, "B T W"],
        lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, "B T C"]:
        """c_t, from the window alone."""
        if context.shape[1] == 0:
            return context.new_zeros(*x.shape[:2], context.shape[2])
        inside = (places >= 0) & (places < lengths[:, None, None])
        weights = normalise(self.score(x, self._at(self.score.keys(context), places)), inside)
        if self.alignment == "predictive":
            away = (places - p[..., None]) / (self.half_width / 2)
            weights = weights * torch.exp(-0.5 * away**2).to(weights.dtype)
        return (weights[:, :, None] @ self._at(context, places))[:, :, 0]

    @staticmethod
    def _at(z: Shaped[Tensor, "B S C"], places: Int[Tensor, "B T W"]) -> Shaped[Tensor, "B T W C"]:
        """z at each place; at the nearest end where a place lies outside."""
        index = places.clamp(0, z.shape[1] - 1)
        return z[torch.arange(len(z), device=z.device)[:, None, None], index]

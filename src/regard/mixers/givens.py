"""Rotations between neighbouring tokens, one after another: a T x T unitary matrix that is applied in linear time.

    up      y = G_0 G_1 .. G_{T-2} x     from the last pair of tokens to the first
    down    y = G_{T-2} .. G_1 G_0 x     from the first to the last
    G_i     [[e^{-iA} cos C, -e^{iB} sin C], [e^{-iB} sin C, e^{iA} cos C]] on tokens i and i + 1,
            A = pi (alpha + beta), B = pi (alpha - beta), C = pi gamma

What one rotation leaves to the next is a recurrence h_t = x_t + b_t h_{t-1}, whose factors are complex and may be 0, so
that no logarithms of them can be summed. Within blocks of 64 tokens it is a matrix; from block to block it is summed
over 1, 2, 4, ... blocks.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Inexact, Int
from torch import Tensor

from regard.checks import checked
from regard.kernels.blocks import from_blocks, in_blocks
from regard.mixers.exponential import BLOCK, FAR
from regard.tracing import exporting


class Rotations(NamedTuple):
    """What makes Phi = Diag(e^{2 pi i theta}) L U P: angles alpha, beta, gamma of the lower and the upper rotations."""

    lower: Float[Tensor, "B T 3"]
    upper: Float[Tensor, "B T 3"]
    theta: Float[Tensor, "B T"]
    order: Int[Tensor, "#B T"] | None = None
    """P: which token goes where."""


@checked()
def givens_sweep(
    x: Inexact[Tensor, "B T M"],
    alpha: Float[Tensor, "B T"],
    beta: Float[Tensor, "B T"],
    gamma: Float[Tensor, "B T"],
    *,
    up: bool,
) -> Complex[Tensor, "B T M"]:
    """All rotations of neighbours, up or down the sequence; the last angles have no neighbour and count for nothing.

    It keeps the norm of every feature.
    """
    last = torch.arange(x.shape[1], device=x.device) == x.shape[1] - 1
    alpha, beta, gamma = (z.masked_fill(last, 0) for z in (alpha, beta, gamma))
    turn, other, mix = math.pi * (alpha + beta), math.pi * (alpha - beta), math.pi * gamma
    ones = torch.ones_like(turn)
    ii, jj = (torch.polar(ones, z) * mix.cos() for z in (-turn, turn))
    ij, ji = torch.polar(ones, other) * -mix.sin(), torch.polar(ones, -other) * mix.sin()
    x, none = x.to(ii.dtype), ii.new_zeros(len(x), 1)
    jj = _later(jj, torch.ones_like(none))
    if up:
        h = recurrence((ii[..., None] * x).flip(1), ij.flip(1)).flip(1)
        return _later(ji[..., None] * x, torch.zeros_like(x[:, :1])) + jj[..., None] * h
    h = recurrence(jj[..., None] * x, _later(ji, none))
    return ii[..., None] * h + ij[..., None] * earlier(x)


def _later(z: Inexact[Tensor, "B T *M"], first: Inexact[Tensor, "B 1 *M"]) -> Inexact[Tensor, "B T *M"]:
    """What stood at the token before."""
    return torch.cat([first, z], 1)[:, :-1]


def earlier(z: Inexact[Tensor, "B T *M"]) -> Inexact[Tensor, "B T *M"]:
    """What stands at the token behind; 0 at the last."""
    return torch.cat([z, z.new_zeros(len(z), 1, *z.shape[2:])], 1)[:, 1:]


def digraph_fourier(x: Inexact[Tensor, "B T M"], rotations: Rotations) -> Complex[Tensor, "B T M"]:
    """Phi x."""
    lower, upper, theta, order = rotations
    x = givens_sweep(_placed(x, order), *upper.unbind(-1), up=True)
    x = givens_sweep(x, *lower.unbind(-1), up=False)
    return torch.polar(torch.ones_like(theta), 2 * math.pi * theta)[..., None] * x


def inverse_digraph_fourier(x: Inexact[Tensor, "B T M"], rotations: Rotations) -> Complex[Tensor, "B T M"]:
    """Phi^H x: every step undone, the last one first. A rotation's adjoint has angles -beta, -alpha, -gamma."""
    lower, upper, theta, order = rotations
    x = torch.polar(torch.ones_like(theta), -2 * math.pi * theta)[..., None] * x
    for (alpha, beta, gamma), up in ((lower.unbind(-1), True), (upper.unbind(-1), False)):
        x = givens_sweep(x, -beta, -alpha, -gamma, up=up)
    return _placed(x, None if order is None else order.argsort(1))


def _placed(x: Inexact[Tensor, "B T M"], order: Int[Tensor, "#B T"] | None) -> Inexact[Tensor, "B T M"]:
    return x if order is None else x.gather(1, order[..., None].expand_as(x))


def recurrence(x: Inexact[Tensor, "B T M"], b: Inexact[Tensor, "B T"]) -> Inexact[Tensor, "B T M"]:
    """h_t = x_t + b_t h_{t-1}, from 0; b_0 does not count."""
    T = x.shape[1]
    # A compiled graph holds the block's size for good, so that it must not follow the length of the first input.
    size = BLOCK
    while not torch.compiler.is_compiling() and size >= max(2 * T, 2):
        size //= 2
    reach, fade = transfers(in_blocks(b, size, 1))
    h = reach @ in_blocks(x, size, 1)
    ends = _ends(h[:, :, -1], fade[:, :, -1])
    before = _later(ends, torch.zeros_like(ends[:, :1]))
    return from_blocks(h + fade[..., None] * before[:, :, None], T, 1)


def transfers(b: Inexact[Tensor, "*n C"]) -> tuple[Inexact[Tensor, "*n C C"], Inexact[Tensor, "*n C"]]:
    """Within a block of C = 2^k tokens: how much of each is in every later h, and how much of what came before."""
    reach, fade = torch.ones_like(b)[..., None, None], b[..., None]
    while fade.shape[-2] > 1:
        (first, then), (faded, fades) = (z.unflatten(d, (-1, 2)).unbind(d) for z, d in ((reach, -3), (fade, -2)))
        across = fades[..., None] * first[..., -1:, :]
        reach = torch.cat([torch.cat([first, torch.zeros_like(first)], -1), torch.cat([across, then], -1)], -2)
        fade = torch.cat([faded, fades * faded[..., -1:]], -1)
    return reach[..., 0, :, :], fade[..., 0, :]


def _ends(h: Inexact[Tensor, "B c M"], fade: Inexact[Tensor, "B c"]) -> Inexact[Tensor, "B c M"]:
    """h at the end of each block, summed over 1, 2, 4, ... blocks."""
    reach = 1
    if exporting():
        at = torch.arange(h.shape[1], device=h.device)
        while reach < FAR // BLOCK:
            there, gone = (at - reach).clamp(min=0), (at < reach)[:, None]
            h = h + fade[..., None] * h.index_select(1, there).masked_fill(gone, 0)
            fade, reach = fade * fade.index_select(1, there).masked_fill(gone[:, 0], 0), 2 * reach
        return h
    while reach < h.shape[1]:
        h = torch.cat([h[:, :reach], h[:, reach:] + fade[:, reach:, None] * h[:, :-reach]], 1)
        fade, reach = torch.cat([fade[:, :reach], fade[:, reach:] * fade[:, :-reach]], 1), 2 * reach
    return h

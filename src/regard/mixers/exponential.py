"""Sums over the past whose weights fade exponentially: moving averages, diagonal state spaces.

    h_t = decay h_{t-1} + x_t,   y_t = sum_n weight_n h_{t,n}            (step by step)
    y_t = sum_{l=0..t} K_l x_{t-l},   K_l = sum_n weight_n decay_n^l      (all at once)

Papers compute the second form by one FFT over the whole length, which mixes rounding errors of the future into every
output. Here blocks of 64 tokens are multiplied by the Toeplitz matrix of K, and only states pass from block to block,
by doubling: h over 1, 2, 4, ... blocks. Time O(T) but for these log2(T / 64) additions of T / 64 states, and no output
or gradient holds anything of a later token.
All sums are taken in float32, or float64 for float64 inputs; a complex decay gives the real part of y.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.blocks import from_blocks, in_blocks
from regard.tracing import as_it_is, exporting

BLOCK = 64
"""Most tokens whose sums are taken directly."""
FAR = 2**24
"""Blocks up to which an exported graph adds up, as its loop can't end where the blocks do."""


def work_dtype(x: Tensor) -> torch.dtype:
    """The real dtype of states and sums: never less than float32, as complex numbers come in no less."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lags(x: Inexact[Tensor, "B T M"]) -> Inexact[Tensor, " C1"]:
    """The exponents 0 .. C that `exponential_sum` wants powers of, for an input of T tokens."""
    # A compiled graph holds the block's size for good, so that it must not follow the length of the first input.
    size = BLOCK if torch.compiler.is_compiling() else min(BLOCK, x.shape[1])
    return torch.arange(size + 1, device=x.device, dtype=work_dtype(x))


def exponential_sum(
    x: Inexact[Tensor, "B T M"],
    powers: Inexact[Tensor, "#M N C1"],
    weight: Inexact[Tensor, "M N"],
    state: Inexact[Tensor, "B M N"] | None = None,
) -> tuple[Inexact[Tensor, "B T M"], Inexact[Tensor, "B M N"]]:
    """y and the state after the last token.

    Args:
        powers: decay^0 .. decay^C (see `lags`); channels may share one row. Real or complex.
        weight: of each state in the output.
        state: h before the first token; default 0.
    """
    B, T, M = x.shape
    if state is None:
        state = powers.new_zeros(B, M, powers.shape[1])
    if T == 0:
        return x, state
    with as_it_is(x.device):
        size = powers.shape[-1] - 1
        blocks = in_blocks(x.to(work_dtype(x)), size, 1)
        count, at = blocks.shape[1], -2 if exporting() else -1  # the last block that holds a token
        blocks = blocks.permute(3, 0, 1, 2).flatten(1, 2).contiguous()  # else each product copies it anew
        kernel = _real_product(weight[:, None], powers[..., :size])[:, 0]
        y = blocks @ F.pad(kernel, (size - 1, 0)).unfold(-1, size, 1).flip(-2)  # [m, s, t] = K[m, t - s], 0 for s > t
        added = _added(blocks, powers[..., :size].flip(-1)).unflatten(1, (B, count))
        h = _starts(added, powers[..., -1], state)
        y = y + _real_product((h * weight[:, None, None]).flatten(1, 2), powers[..., 1:])
        rest = (T - 1) % size + 1  # tokens of the last block
        ages = (rest - 1 - torch.arange(size, device=x.device)).clamp(min=0)
        late = _added(blocks.unflatten(1, (B, count))[:, :, at], powers[..., ages])
        state = (h[:, :, at] * powers.narrow(-1, rest, 1).mT + late).transpose(0, 1)
        return from_blocks(y.unflatten(1, (B, count)).permute(1, 2, 3, 0), T, 1).to(x.dtype), state


def _added(x: Inexact[Tensor, "M b t"], factors: Inexact[Tensor, "#M N t"]) -> Inexact[Tensor, "M b N"]:
    """What t tokens add to the state: sum_s factor_s x_s."""
    factors = factors.mT.contiguous()
    if not factors.is_complex():
        return x @ _shared(factors)
    real, imaginary = (x @ _shared(torch.cat([factors.real, factors.imag], -1))).chunk(2, -1)
    return torch.complex(real, imaginary)


def _real_product(z: Inexact[Tensor, "M b N"], powers: Inexact[Tensor, "#M N l"]) -> Inexact[Tensor, "M b l"]:
    """The real part of z @ powers, as one real product."""
    if not powers.is_complex():
        return z @ _shared(powers)
    return torch.cat([z.real, -z.imag], -1) @ _shared(torch.cat([powers.real, powers.imag], -2))


def _shared(factors: Inexact[Tensor, "#M N l"]) -> Tensor:
    """Without the channel axis where all channels share one matrix: then one large product is taken, not M small."""
    return factors[0] if factors.shape[0] == 1 else factors


def _starts(
    added: Inexact[Tensor, "M B c N"], fade: Inexact[Tensor, "#M N"], state: Inexact[Tensor, "B M N"]
) -> Inexact[Tensor, "M B c N"]:
    """The states before each block, h_c = fade h_{c-1} + added_{c-1}, summed over 1, 2, 4, ... blocks."""
    fade, reach = fade[:, None, None], 1
    if exporting():
        h = torch.cat([state.transpose(0, 1)[:, :, None], added], 2)[:, :, :-1]
        at = torch.arange(added.shape[2], device=added.device)
        while reach < FAR:
            earlier = h.index_select(2, (at - reach).clamp(min=0)).masked_fill((at < reach)[:, None], 0)
            h, fade, reach = torch.addcmul(h, earlier, fade), fade * fade, 2 * reach
        return h
    h = torch.cat([state.transpose(0, 1)[:, :, None], added[:, :, :-1]], 2)
    while reach < h.shape[2]:
        h = torch.cat([h[:, :, :reach], torch.addcmul(h[:, :, reach:], h[:, :, :-reach], fade)], 2)
        fade, reach = fade * fade, 2 * reach
    return h

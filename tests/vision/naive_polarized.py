"""Polarized self-attention (arXiv 2107.00782), written out pixel by pixel in its three published forms."""

import torch
from torch import Tensor

Affine = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out) or None of a 1x1 convolution."""


def _conv(affine: Affine, vector: Tensor) -> Tensor:
    """A 1x1 convolution at one pixel: (in) -> (out)."""
    weight, bias = affine
    out = torch.stack([torch.einsum("c,c->", row, vector) for row in weight])
    return out if bias is None else out + bias


def _layer_norm(affine: Affine, vector: Tensor) -> Tensor:
    centred = vector - vector.mean()
    weight, bias = affine
    assert bias is not None
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * weight + bias


def _softmax(logits: list[Tensor]) -> list[Tensor]:
    largest = max(one.item() for one in logits)
    e = [torch.exp(z - largest) for z in logits]
    return [one / sum(e) for one in e]


def naive_polarized(
    x: Tensor,
    channel_q: Affine,
    channel_v: Affine,
    up: list[Affine],
    spatial_q: Affine,
    spatial_v: Affine,
    form: str,
    layout: str,
) -> Tensor:
    """x (B, M, Y, X) -> the same shape; C = M / 2.

    channel_q (1, M) and channel_v (C, M) are conv_q, conv_v of the channel gate; spatial_q and spatial_v (C, M) are
    conv_q', conv_v' of the spatial gate. `up` by form: "A" [conv C -> M, LayerNorm over M]; "P" [conv C -> M];
    "S" [conv C -> C/4, LayerNorm over C/4, (ReLU), conv C/4 -> M].
    The spatial score is, by form: "A" a softmax over the C channels of the pooled query, times v; "P" a softmax over
    the positions of q.v; "S" q times the softmax over the positions of each value channel.
    layout "parallel": Ch(x) + Sp(x); "sequential": Sp(Ch(x)).
    """
    out = torch.zeros_like(x)
    pixels = [(y, w) for y in range(x.shape[2]) for w in range(x.shape[3])]
    for b in range(x.shape[0]):

        def channel(at: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor]:
            a = _softmax([_conv(channel_q, at[p])[0] for p in pixels])
            c = sum(one * _conv(channel_v, at[p]) for one, p in zip(a, pixels, strict=True))
            z = _conv(up[0], c)
            if form in "AS":
                z = _layer_norm(up[1], z)
            if form == "S":
                z = _conv(up[2], z.clamp_min(0))
            return {p: torch.sigmoid(z) * at[p] for p in pixels}

        def spatial(at: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor]:
            q = sum(_conv(spatial_q, at[p]) for p in pixels) / len(pixels)
            v = [_conv(spatial_v, at[p]) for p in pixels]
            if form == "A":
                weights = torch.stack(_softmax(list(q)))
                s = [torch.einsum("c,c->", weights, one) for one in v]
            elif form == "P":
                s = _softmax([torch.einsum("c,c->", q, one) for one in v])
            else:
                by_channel = [torch.stack(_softmax([one[c] for one in v])) for c in range(len(q))]
                s = [sum(q[c] * by_channel[c][n] for c in range(len(q))) for n in range(len(pixels))]
            return {p: torch.sigmoid(one) * at[p] for one, p in zip(s, pixels, strict=True)}

        here = {(y, w): x[b, :, y, w] for y, w in pixels}
        if layout == "parallel":
            first, second = channel(here), spatial(here)
            whole = {p: first[p] + second[p] for p in pixels}
        else:
            whole = spatial(channel(here))
        for y, w in pixels:
            out[b, :, y, w] = whole[y, w]
    return out

"""Nystrom attention against nystrom-attention and torch's dense kernel, with the same weights.

python -m benchmarks.landmarks
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

import regard
from benchmarks.harness import Benchmark, Run, able, agree, command, compared, forward_backward, race
from regard.linear.nystrom import NystromAttention


def package(ours: NystromAttention) -> nn.Module:
    """Its layer with our weights. It starts the inverse from one number for the whole batch: our "original"."""
    import nystrom_attention

    assert ours.conv is not None
    theirs = nystrom_attention.NystromAttention(
        ours.dim,
        dim_head=ours.head_dim,
        heads=ours.num_heads,
        num_landmarks=ours.num_landmarks,
        residual_conv_kernel=ours.conv.kernel_size[0],
    )
    with torch.no_grad():
        theirs.to_qkv.weight.copy_(torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.to_out[0].weight.copy_(ours.o_proj.weight)
        theirs.to_out[0].bias.zero_()
        theirs.res_conv.weight.copy_(ours.conv.weight)
    return theirs.eval()


def measure(
    *, repeats: int, lengths: Sequence[int] = (2048, 8192), dim: int = 256, heads: int = 4, landmarks: int = 64
) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": heads, "T": list(lengths), "M": dim, "landmarks": landmarks, "dtype": "fp32"}
    result = Benchmark("landmarks", "Nystrom attention against nystrom-attention and dense attention", shape=shape)
    ours = NystromAttention(dim, heads, num_landmarks=landmarks, conv_width=33, coefficient="original")
    dense = regard.Attention(dim, heads)
    for length in lengths:
        x = torch.randn(1, length, dim)
        contenders: dict[str, Run] = {"regard": partial(ours, x), "dense": partial(dense, x)}
        with torch.no_grad():
            others, why = able({"package": lambda x=x: partial(package(ours), x)})
            for run in others.values():
                agree(run(), contenders["regard"](), within=1e-4)
            times = race(contenders | others, repeats=repeats, seconds=6)
        what = f"T = {length}: times faster than nystrom-attention"
        result.add(compared(what, times, "regard", "package", why=why, better="higher"))
        result.add(compared(f"T = {length}: times faster than dense", times, "regard", "dense", better="higher"))
        z = x.clone().requires_grad_()
        training: dict[str, Run] = {"regard": forward_backward(partial(ours, z), z)}
        others, why = able({"package": lambda z=z: forward_backward(partial(package(ours), z), z)})
        for run in others.values():
            agree(run()[0], training["regard"]()[0])
        times = race(training | others, repeats=min(3, repeats), seconds=6)
        what += ", forward and backward"
        result.add(compared(what, times, "regard", "package", why=why, better="higher"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

"""Layers of regard against x-transformers', with the same weights: plain causal attention and ALiBi.

    python -m benchmarks.layers

x-transformers runs on torch's fused kernel (`flash=True`), and keeps its bias between calls.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import regard
from benchmarks.harness import Benchmark, Run, able, agree, command, compared, forward_backward, race
from regard.positions import Alibi


def package(ours: regard.Attention) -> nn.Module:
    """Its layer with our weights, bias included."""
    from x_transformers.x_transformers import AlibiPositionalBias, Attention

    theirs = Attention(ours.dim, dim_head=ours.head_dim, heads=ours.num_heads, causal=True, flash=True)
    for proj in ("q", "k", "v"):
        getattr(theirs, f"to_{proj}").load_state_dict(getattr(ours, f"{proj}_proj").state_dict())
    theirs.to_out.load_state_dict(ours.o_proj.state_dict())
    bias = AlibiPositionalBias(ours.num_heads) if isinstance(ours.position, Alibi) else None

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = theirs, bias

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x, rel_pos=self.bias)
            return out[0] if isinstance(out, tuple) else out

    return Bound()


def measure(*, repeats: int, lengths: Sequence[int] = (1024, 4096), dim: int = 512, heads: int = 8) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": heads, "T": list(lengths), "M": dim, "dtype": "fp32"}
    result = Benchmark("layers", "Causal layers against x-transformers", shape=shape)
    for words, position in (("plain", None), ("ALiBi", Alibi(heads))):
        ours = regard.Attention(dim, heads, causal=True, position=position)
        for length in lengths:
            x = torch.randn(1, length, dim)
            given = [x.clone().requires_grad_(), *ours.parameters()]
            contenders: dict[str, Run] = {"regard": partial(ours, x)}
            training: dict[str, Run] = {"regard": forward_backward(partial(ours, given[0]), *given)}

            def trained(given=given, ours=ours) -> Run:
                theirs = package(ours)
                return forward_backward(partial(theirs, given[0]), given[0], *theirs.parameters())

            with torch.no_grad():
                others, why = able({"x-transformers": lambda x=x, ours=ours: partial(package(ours), x)})
                for run in others.values():
                    agree(run(), contenders["regard"](), within=1e-4)
                times = race(contenders | others, repeats=repeats, seconds=6)
            what = f"{words}, T = {length}: times faster than x-transformers"
            result.add(compared(what, times, "regard", "x-transformers", why=why, better="higher"))
            others, why = able({"x-transformers": trained})
            for run in others.values():
                agree(run()[0], training["regard"]()[0], within=1e-3)
            times = race(training | others, repeats=min(3, repeats), seconds=6)
            what += ", forward and backward"
            result.add(compared(what, times, "regard", "x-transformers", why=why, better="higher"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

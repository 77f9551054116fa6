"""A step of decoding where a policy keeps a tenth of S tokens, or all in few bits, against the cache that keeps all.

python -m benchmarks.kept
"""

import torch
from torch import Tensor

import regard
from benchmarks.harness import Benchmark, Figure, Run, command, compared, race
from regard.positions import Rotary

HEADS, GROUPS, WIDTH = 16, 4, 64
SHARE = 10
"""A budget of S over this."""
POLICIES = ("streaming_llm", "snapkv", "tova", "adakv", "tova(every=1)", "kivi(bits=4)")


def going_on(layer: regard.Attention, x: Tensor, new: Tensor, policy: str | None, room: int) -> tuple[Run, int]:
    """Steps that follow one another after the tokens x, and the bytes held before the first."""
    length = x.shape[1]
    if policy is None:
        empty = layer.init_state(1, length + room)
    else:
        budget = {} if policy.startswith("kivi") else {"budget": max(1, length // SHARE)}
        empty = layer.init_state(1, length + room, policy=regard.create(policy, **budget))
    states = [layer.step(x, empty)[1]]

    def run() -> Tensor:
        y, states[0] = layer.step(new, states[0])
        return y

    return run, states[0].nbytes


def measure(*, repeats: int, length: int = 8192, number: int = 16) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "T": 1, "S": length, "H": HEADS, "G": GROUPS, "D": WIDTH, "budget": max(1, length // SHARE)}
    result = Benchmark("kept", "A step of decoding over what a policy keeps of S tokens", shape=shape)
    layer = regard.Attention(HEADS * WIDTH, HEADS, num_kv_heads=GROUPS, causal=True, position=Rotary(WIDTH)).eval()
    x, new = torch.randn(1, length, layer.dim), torch.randn(1, 1, layer.dim)
    with torch.inference_mode():
        made = {name or "all": going_on(layer, x, new, name, (repeats + 1) * number + 1) for name in (None, *POLICIES)}
        times = race({name: run for name, (run, _) in made.items()}, repeats=repeats, number=number)
    for name in POLICIES:
        result.add(compared(f"{name}: a step / one over all tokens", times, name, "all"))
        result.add(Figure(f"{name}: bytes after the prompt, over those of all", made[name][1] / made["all"][1]))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

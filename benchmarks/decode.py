"""One step of decoding (T = 1) over a cache, against torch's kernel on the same cache and transformers' Llama layer.

    python -m benchmarks.decode

Caches are taken in rotation, more than fit into a processor's own memory. Besides the shapes that stand here, three are
drawn by a seed that is printed.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Run, able, agree, command, compared, race
from regard import KVCache
from regard.masks import causal

HEADS, WIDTH = 8, 64
HEADED = ((32, 8, 128), (8, 8, 64))
"""Query heads, key heads, width."""
SHORT, LONG = 1024, 4096
MOST = 256
"""Caches in rotation at most."""
AHEAD = 64
"""Steps that follow one another before they begin anew."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return regard.attention(q, k, v, mask=causal())


def heads(proj: nn.Module, x: Tensor) -> Tensor:
    return proj(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def filled(layer: regard.Attention, x: Tensor) -> KVCache:
    """The state after the tokens x, with room for one more."""
    state = layer.init_state(x.shape[0], x.shape[1] + 1)
    return state.append(k=heads(layer.k_proj, x), v=heads(layer.v_proj, x))[1]


def step(layer: regard.Attention, x: Tensor, new: Tensor) -> Run:
    """One token after the tokens x; every call writes over the last one's."""
    state = filled(layer, x)

    def run() -> Tensor:
        state.written[0] = state.length
        return layer.step(new, state)[0]

    return run


def by_hand(layer: regard.Attention, x: Tensor, new: Tensor) -> Run:
    """The same step written out for this one case: projections, a write, torch's kernel."""
    S, state = x.shape[1], filled(layer, x).fork()
    k, v = state.buffers["k"], state.buffers["v"]

    def run() -> Tensor:
        q, k[:, :, S:], v[:, :, S:] = (heads(proj, new) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        return layer.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return run


def llama(layer: regard.Attention, x: Tensor, new: Tensor) -> Run:
    """transformers' layer with its growing cache and our weights, its rotation by the angle 0."""
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = LlamaConfig(
        hidden_size=layer.dim,
        num_attention_heads=layer.num_heads,
        num_key_value_heads=layer.num_kv_heads,
        attn_implementation="sdpa",
    )
    theirs, held = LlamaAttention(config, 0).eval(), filled(layer, x)
    theirs.load_state_dict(layer.state_dict())
    k, v = (held.buffers[name][:, :, : held.length] for name in "kv")
    still = (torch.ones(1, 1, WIDTH), torch.zeros(1, 1, WIDTH))

    def run() -> Tensor:
        cache = DynamicCache()
        cache.layers.append(_layer(k, v))
        return theirs(new, position_embeddings=still, attention_mask=None, past_key_values=cache)[0]

    return run


def _layer(k: Tensor, v: Tensor):
    """A layer's cache that holds these without having copied them."""
    from transformers.cache_utils import DynamicLayer

    made = DynamicLayer()
    made.lazy_initialization(k, v)
    made.keys, made.values = k, v
    return made


def steps(result: Benchmark, length: int, repeats: int) -> None:
    """A layer, one new token after `length`."""
    layer = regard.Attention(HEADS * WIDTH, HEADS, causal=True)
    x, new = torch.randn(1, length, layer.dim), torch.randn(1, 1, layer.dim)
    contenders = {"step": step(layer, x, new), "by hand": by_hand(layer, x, new)}
    others, why = able({"Llama": lambda: llama(layer, x, new)})
    for run in (contenders | others).values():
        agree(run(), contenders["by hand"](), within=1e-5)
    times = race(contenders | others, repeats=repeats, number=often(length), seconds=4)
    result.add(compared(f"{length} tokens: Attention.step / the step written out", times, "step", "by hand"))
    what = f"{length} tokens: times faster than transformers' LlamaAttention"
    result.add(compared(what, times, "step", "Llama", why=why, better="higher"))


@dataclass(frozen=True)
class Case:
    """One shape of decoding."""

    H: int
    G: int
    S: int
    D: int

    def __str__(self) -> str:
        return f"{self.H}/{self.G} heads of {self.D}, S = {self.S}"

    def caches(self, dtype: torch.dtype, least: int) -> list[tuple[Tensor, Tensor]]:
        """So many keys and values that memory is what is measured, at most `MOST` pairs of them."""
        each = 2 * self.G * self.S * self.D * dtype.itemsize
        n = max(1, min(MOST, -(-least // each)))
        return [tuple(torch.randn(2, 1, self.G, self.S, self.D).to(dtype)) for _ in range(n)]  # type: ignore[misc]


def in_rotation(run: Callable[..., Tensor], q: Tensor, caches: Sequence[tuple[Tensor, Tensor]]) -> Run:
    """Each call on the next cache."""
    turn = cycle(caches)
    return lambda: run(q, *next(turn))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def kernels(result: Benchmark, case: Case, threads: int, repeats: int, least: int) -> None:
    """fp32 against torch's kernel, bf16 against torch's in bf16 and ours in fp32."""
    q = torch.randn(1, case.H, 1, case.D)
    full = case.caches(torch.float32, least)
    runs = {"fp32": in_rotation(attend, q, full), "SDPA": in_rotation(fused, q, full)}
    agree(attend(q, *full[0]), fused(q, *full[0]), within=1e-5)
    half = case.caches(torch.bfloat16, least)
    agree(attend(q.bfloat16(), *half[0]).float(), fused(q.bfloat16(), *half[0]).float(), within=2e-2)
    runs["bf16"], runs["SDPA bf16"] = (in_rotation(run, q.bfloat16(), half) for run in (attend, fused))
    if case.S >= LONG:
        del runs["SDPA bf16"]
    times = race(runs, repeats=repeats, number=max(1, 2**17 // max(1024, case.G * case.S)), seconds=3)
    what, allowed = f"{case}, {threads} threads", 1 + 8e-6 / statistics.median(times["SDPA"])
    figures = [(f"{what}: regard / SDPA", "fp32", "SDPA", goal("decode") | {"goal": allowed})]
    if case.S <= SHORT:
        figures.append((f"{what}: bf16, regard / SDPA", "bf16", "SDPA bf16", goal("decode bf16")))
    if case.S >= LONG:
        figures.append((f"{what}: regard, bf16 / fp32", "bf16", "fp32", goal("decode bf16 long")))
    for words, ours, theirs, about in figures:
        result.add(compared(words, times, ours, theirs, **about))


def layer_step(result: Benchmark, name: str, length: int, threads: int, repeats: int) -> None:
    """A step that goes on from the last one, against projections and the kernel alone."""
    options = {"window": length} if name == "window" else {}
    layer = regard.create(name, dim=HEADS * WIDTH, num_heads=HEADS, causal=True, **options)
    state, new = layer.init_state(1, length + AHEAD), torch.randn(1, 1, layer.dim)
    held = layer.step(torch.randn(1, length - 1, layer.dim), state)[1]
    k, v = torch.randn(2, 1, HEADS, length, WIDTH)
    states = [held]

    def ours() -> Tensor:
        y, after = layer.step(new, states[0])
        states[0] = held if after.length == length + AHEAD - 1 else after
        if states[0] is held:
            held.written[0] = held.end if held.window is not None else held.length
        return y

    def bare() -> Tensor:
        q, _, _ = (heads(proj, new) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        return layer.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))

    times = race({"step": ours, "bare": bare}, repeats=3 * repeats, number=AHEAD // 4, seconds=4)
    what = f"{name}, {length} tokens, {threads} threads: step / projections and kernel"
    result.add(compared(what, times, "step", "bare", **goal("step")))


def drawn(seed: int, lengths: Sequence[int], n: int = 3) -> list[Case]:
    """Shapes that nothing was tuned to."""
    r = random.Random(seed)
    found = []
    for _ in range(n):
        G = r.randint(1, 12)
        S = round(min(lengths) * (max(lengths) / min(lengths)) ** r.random())
        found.append(Case(G * r.randint(1, 8), G, S, r.choice((64, 96, 128, 192))))
    return found


def often(length: int) -> int:
    """Calls that are timed together: short ones more often."""
    return max(1, 2**16 // max(length, 256))


def measure(
    *,
    repeats: int,
    lengths: Sequence[int] = (16, 256, 1024, 4096, 16384, 65536),
    least: int = 128 * 2**20,
    seed: int | None = None,
) -> Benchmark:
    torch.manual_seed(0)
    seed = random.randrange(10**6) if seed is None else seed
    shape = {"B": 1, "T": 1, "S": list(lengths), "heads and widths": str(HEADED), "seed of the other shapes": seed}
    result = Benchmark("decode", "One step of decoding over a cache of S tokens", shape=shape)
    print(f"seed of the other shapes: {seed}")
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            for threads in sorted({1, before}):
                torch.set_num_threads(threads)
                for S in lengths:
                    for H, G, D in HEADED:
                        kernels(result, Case(H, G, S, D), threads, repeats, least)
                for case in drawn(seed, lengths):
                    kernels(result, case, threads, repeats, least)
                for name in ("softmax", "rotary", "kerple", "window"):
                    layer_step(result, name, min(1024, max(lengths)), threads, repeats)
            steps(result, min(1024, max(lengths)), repeats)
    finally:
        torch.set_num_threads(before)
    return result


if __name__ == "__main__":
    command(measure, __doc__)

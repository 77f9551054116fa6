"""One step of decoding (T = 1) over a cache, against torch's kernel on the same cache and transformers' Llama layer.

    python -m benchmarks.decode

Grouped queries are compared with torch's own grouping and with keys and values repeated for every query head.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from benchmarks.harness import Benchmark, Run, able, agree, command, compared, race
from regard import KVCache
from regard.masks import causal

HEADS, WIDTH, GROUPED = 8, 64, (32, 8)


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
    """A kernel and a layer, one new token after `length`."""
    q, k, v = (torch.randn(1, HEADS, n, WIDTH) for n in (1, length, length))
    contenders = {"regard": lambda: attend(q, k, v), "SDPA": lambda: F.scaled_dot_product_attention(q, k, v)}
    agree(contenders["regard"](), contenders["SDPA"](), within=1e-5)
    times = race(contenders, repeats=repeats, number=often(length), seconds=4)
    result.add(compared(f"{length} tokens: regard.attention / SDPA", times, "regard", "SDPA"))

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


def grouped(result: Benchmark, length: int, repeats: int) -> None:
    """H query heads over G of keys."""
    H, G = GROUPED
    q, k, v = (torch.randn(1, h, n, WIDTH) for h, n in ((H, 1), (G, length), (G, length)))
    contenders = {
        "regard": lambda: attend(q, k, v),
        "grouped": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "repeated": lambda: F.scaled_dot_product_attention(
            q, k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        ),
    }
    for run in contenders.values():
        agree(run(), contenders["repeated"](), within=1e-5)
    times = race(contenders, repeats=repeats, number=often(4 * length), seconds=4)
    what = f"H = {H}, G = {G}, {length} tokens: regard.attention / SDPA"
    result.add(compared(f"{what}, enable_gqa", times, "regard", "grouped"))
    result.add(compared(f"{what}, keys repeated", times, "regard", "repeated"))


def halved(result: Benchmark, length: int, repeats: int) -> None:
    """bf16 against fp32."""
    x = [torch.randn(1, HEADS, n, WIDTH) for n in (1, length, length)]
    half = [z.bfloat16() for z in x]
    contenders = {
        "fp32": partial(attend, *x),
        "bf16": partial(attend, *half),
        "SDPA": partial(F.scaled_dot_product_attention, *half),
    }
    agree(contenders["bf16"]().float(), contenders["fp32"](), within=2e-2)
    agree(contenders["bf16"]().float(), contenders["SDPA"]().float(), within=2e-2)
    times = race(contenders, repeats=repeats, number=often(length), seconds=4)
    result.add(compared(f"{length} tokens: regard bf16 / fp32", times, "bf16", "fp32"))
    result.add(compared(f"{length} tokens: regard bf16 / SDPA bf16", times, "bf16", "SDPA"))


def often(length: int) -> int:
    """Calls that are timed together: short ones more often."""
    return max(1, 2**16 // max(length, 256))


def measure(*, repeats: int, lengths: Sequence[int] = (1024, 4096, 16384, 32768)) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": HEADS, "T": 1, "S": list(lengths), "D": WIDTH, "dtype": "fp32"}
    result = Benchmark("decode", "One step of decoding over a cache of S tokens", shape=shape)
    with torch.no_grad():
        for length in lengths:
            steps(result, length, repeats)
        for length in lengths[::2]:
            grouped(result, length, repeats)
            halved(result, length, repeats)
    return result


if __name__ == "__main__":
    command(measure, __doc__)

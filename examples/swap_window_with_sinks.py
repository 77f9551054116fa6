"""Swap a GPT-2's attention for a window with attention sinks: what a long prompt costs, and what the model loses.

    pip install "regard[transformers]"
    python examples/swap_window_with_sinks.py

Each token sees the last WINDOW tokens and the first SINKS (Xiao et al. 2023, "Efficient Streaming Language Models with
Attention Sinks"). The model is small and learns the standard library's sources for some seconds, so that there is
something to lose.
"""

# %% A GPT-2 that reads bytes
import ctypes
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import regard
from regard import masks
from regard.bench.memory import PeakMemory
from regard.inspect.page.render import render
from regard.tasks.text import load

STEPS = 250
LENGTH = 256  # of the text it learns from
EAGER = 4096  # the longest prompt whose scores are formed all at once
LONG = 16384
WINDOW = 32  # tokens back, with its own
SINKS = 4  # first tokens that all see

torch.manual_seed(0)
plain: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
sizes: dict[str, Any] = {"vocab_size": 256, "n_positions": LONG, "n_embd": 96, "n_layer": 2, "n_head": 4}
config = GPT2Config(**sizes, **plain, initializer_range=0.1)
model = GPT2LMHeadModel(config)
# Learning what each position means takes longer than some seconds: they stay the sines of the first Transformer.
angles = torch.arange(LONG)[:, None] * 10_000 ** (-torch.arange(config.n_embd // 2) / (config.n_embd // 2))
model.transformer.wpe.weight.requires_grad_(False).copy_(0.1 * torch.cat([angles.sin(), angles.cos()], 1))
text = load(length=LENGTH)
console = Console(width=100, highlight=False)

# %% Train it
started = time.process_time()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS, pct_start=0.1)
for _, ids in zip(range(STEPS), text.batches(8, LENGTH, seed=0)):
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
model.eval()
seconds = time.process_time() - started
console.print(f"trained for {STEPS} steps, {seconds:.0f} CPU seconds: {loss.item() / 0.6931:.2f} bits per byte")

# %% What the model loses, on held-out text at the length it learned
held = text.heldout_windows(LENGTH, 32 * LENGTH)


@torch.no_grad()
def predicted() -> Tensor:
    """Log-probabilities of the next byte, where there is more than a window to look back on: (B, t, 256)."""
    return model(held[:, :-1]).logits[:, WINDOW:].log_softmax(-1)


def bits(log_probabilities: Tensor) -> float:
    return float(F.nll_loss(log_probabilities.flatten(0, 1), held[:, 1 + WINDOW :].flatten())) / 0.6931


full = predicted()
window, sinks = masks.window(WINDOW), masks.global_tokens(SINKS)
table = Table(title=f"predictions of bytes {WINDOW} to {LENGTH} of {len(held)} held-out stretches")
for heading in ("attention", "bits per byte", "KL to full, bits", "same first guess", "density", "kept mass"):
    table.add_column(heading, justify="left" if heading == "attention" else "right")
table.add_row("full", f"{bits(full):.3f}", "0", "100%", "100%", "100%")
reports = {}
for name, mask in {f"window {WINDOW}": window, f"window {WINDOW}, {SINKS} sinks": window | sinks}.items():
    with regard.swap(model, mask, measure="mass") as swapped:  # causality stays the model's own
        found = predicted()
        reports[name] = swapped.report()
    divergence = float((full.exp() * (full - found)).sum(-1).mean()) / 0.6931
    same = float((full.argmax(-1) == found.argmax(-1)).float().mean())
    density, mass = (
        sum(getattr(row, what) for row in reports[name].rows) / len(reports[name].rows)
        for what in ("density", "kept_mass")
    )
    table.add_row(name, f"{bits(found):.3f}", f"{divergence:.4f}", f"{same:.1%}", f"{density:.1%}", f"{mass:.1%}")
console.print(table)
console.print("layer by layer, with sinks:", str(reports[name]), sep="\n")

# %% What a long prompt costs
prompt = torch.frombuffer(bytearray(text.heldout[:LONG]), dtype=torch.uint8).long()[None]


@torch.no_grad()
def cost(length: int) -> tuple[float, float, float]:
    """CPU seconds, peak MB beyond the model, and MB of keys and values kept for the tokens to come."""
    model(prompt[:, :64])
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # or memory that the last measurement freed would be used again, unseen
    memory, started = PeakMemory(torch.device("cpu")), time.process_time()
    cache = model(prompt[:, :length], logits_to_keep=1).past_key_values
    seconds, peak = time.process_time() - started, memory.bytes()
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return seconds, peak / 2**20, kept / 2**20


def add(length: int, name: str, share: float) -> None:
    seconds, peak, kept = cost(length)
    costs.add_row(str(length), name, f"{seconds:.2f}", f"{peak:.0f}", f"{kept:.1f}", f"{kept * share:.1f}")


costs = Table(title="one prompt, up to its last token")
for heading in ("tokens", "attention", "CPU s", "peak MB", "cache MB", "read by the next token, MB"):
    costs.add_column(heading, justify="left" if heading == "attention" else "right")
for length in (EAGER, LONG):
    with regard.swap(model, window | sinks):
        add(length, f"window {WINDOW}, {SINKS} sinks", min(1.0, (WINDOW + SINKS) / length))
    add(length, f"full ({model.config._attn_implementation})", 1.0)
    if length == EAGER:
        model.set_attn_implementation("eager")
        add(length, "full (eager)", 1.0)
        model.set_attn_implementation("sdpa")
console.print(costs)
console.print("sdpa forms no score matrix either: against it a window saves time, against eager attention memory too.")
console.print("The swap changes what is read; transformers' cache still keeps all keys and values.")

# %% Both, side by side, on a page
line = text.heldout[:96]
shown = torch.tensor([list(line)])
letters = (tuple(chr(byte) if byte < 128 else "?" for byte in line),)


@torch.no_grad()
def traced() -> regard.inspect.trace.Trace:
    return replace(regard.trace(model, shown), tokens=letters)


before = traced()
with regard.swap(model, masks.window(16) | sinks):
    after = traced()
page = Path("runs/examples/swap_window_with_sinks.html")
page.parent.mkdir(parents=True, exist_ok=True)
page.write_text(render(before, other=after, names=("full", f"window 16, {SINKS} sinks")), encoding="utf-8")
console.print(f"page: {page}")

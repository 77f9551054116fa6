"""Train a small rotary language model, and find the heads that look a fixed number of tokens back.

    pip install regard
    python examples/offset_heads_of_a_rotary_model.py

Rotation lets a score depend on how far back a key lies, whatever stands there. A head that makes use of that does the
same on random bytes as on text; so each head is looked at twice.
"""

# %% The model and its text
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import regard
from regard.inspect.analyses.head_behaviour import head_behaviour
from regard.inspect.analyses.offset_heads import offset_heads
from regard.models.lm import LMConfig, language_model
from regard.tasks.text import load

STEPS = 500
LENGTH = 64
REACH = 8  # how many tokens back an offset may lie

torch.manual_seed(0)
config = LMConfig("rotary", dim=96, depth=2, num_heads=4, mlp_dim=384, length=LENGTH)
model = language_model(config)
text = load(length=LENGTH)  # the sources of Python's standard library, as bytes
console = Console(width=100, highlight=False)

# %% Train it
started = time.process_time()
optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=STEPS, pct_start=0.1)
for step, ids in zip(range(STEPS), text.batches(16, LENGTH, seed=0)):
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if (step + 1) % 100 == 0:
        console.print(f"step {step + 1}: {loss.item() / 0.6931:.2f} bits per byte")
model.eval()
console.print(f"trained for {time.process_time() - started:.0f} CPU seconds")

# %% Trace it on held-out text, and on random bytes
held = text.heldout_windows(LENGTH, 32 * LENGTH)[:, :-1]
noise = torch.randint(256, held.shape, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    on_text, on_noise = (regard.trace(model, ids).maps() for ids in (held, noise))  # for each layer (B, H, T, T)
heads, again = (offset_heads(maps, reach=REACH) for maps in (on_text, on_noise))
behaviour = head_behaviour(on_text)

# %% Each head, the most positional first
table = Table(title=f"heads by the offset, at most {REACH}, at which they look most")
for heading in ("layer", "head", "offset", "share of attention", "on random bytes", "entropy, nats", "offset head"):
    table.add_column(heading, justify="right")
order = heads.share.flatten().argsort(descending=True)
for layer, head in ((int(n) // config.num_heads, int(n) % config.num_heads) for n in order):
    offset, other = (int(found.offset[layer, head, 1]) for found in (heads, again))
    share, noisy = (float(found.share[layer, head]) for found in (heads, again))
    table.add_row(
        str(layer),
        str(head),
        f"{offset:+d}" if offset else "itself",
        f"{share:.0%}",
        f"{noisy:.0%}" + ("" if other == offset else f" at {other:+d}"),
        f"{behaviour.entropy[layer, head]:.2f}",
        "yes" if heads.found[layer, head] else "",
    )
console.print(table)
console.print(
    "offset head: on average more than half of a query's attention goes to one neighbour at a fixed offset, not itself."
    f" Even attention has {behaviour.uniform:.2f} nats without causality."
)

# %% The page: maps, lines and statistics of every head
page = Path("runs/examples/offset_heads_of_a_rotary_model.html")
page.parent.mkdir(parents=True, exist_ok=True)
with torch.no_grad():
    regard.trace(model, held[:1]).save(page, title="Offset heads of a rotary model")
console.print(f"page: {page}")

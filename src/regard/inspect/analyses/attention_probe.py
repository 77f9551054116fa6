"""Attention probes: how much of a sentence's syntax its attention maps hold.

Only the probe is trained; words' vectors stay fixed. Words are what has one token each: join word pieces first, weights
on a word summed, weights of a word averaged.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, number, refuse, whole
from regard.inspect.analyses._maps import all_heads, marks

CARD = Card(
    "attention_probe",
    equation="""p(head of i is j) = softmax_j score(i, j), j over the words and the root
attention only         score(i, j) = sum_k w_k A^k_ij + u_k A^k_ji        k over all heads of all layers
attention and words    w and u are linear in the words' vectors: W (v_i + v_j) + b, + for joining
root                   A^k_(i, root) = s A^k_(i, [CLS]) + e A^k_(i, [SEP])""",
    papers=(
        Paper(
            "What Does BERT Look At? An Analysis of BERT's Attention",
            "Clark, Khandelwal, Levy, Manning",
            2019,
            "1906.04341",
            "abstract; the authors' code of sections 4 and 5 (Syntax_Analysis.ipynb)",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("2*B*H*T**2", ""),
    claim="Attention maps hold much of the syntax: planted heads are found by the probe, and words tell which of them "
    "to trust: tests/inspect/analyses/test_attention_probe.py::test_finds_the_head_that_knows, "
    "tests/inspect/analyses/test_attention_probe.py::test_words_tell_which_head_to_trust.",
    differs=(
        "The zeros that stand for the root's vector are in the root's column; in the authors' notebook the scores have "
        "the root first and the vectors have it last, so that each word is scored with the next one's vector.",
    ),
    verified="reconstructed",
)

NO_WORD = -100
"""The label of a token that has no head to find: padding, delimiters, words left out."""


class ProbeBatch(NamedTuple):
    """Sentences with their heads. Every sentence's first and last valid token are its delimiters."""

    attention: Sequence[Float[Tensor, "B H T T"]]
    labels: Int[Tensor, "B T"]
    """0 for the root, 1 + j where token j is the head; NO_WORD where there is none to find."""
    words: Float[Tensor, "B T E"] | None = None
    valid: Bool[Tensor, "B T"] | None = None


class AttentionProbe(nn.Module):
    """Scores of all words as the head of each, from attention maps alone or with the words' vectors.

    Args:
        num_layers, num_heads: of the maps.
        word_dim: E, the width of the words' vectors; None for attention only.
    """

    def __init__(self, num_layers: int, num_heads: int, *, word_dim: int | None = None) -> None:
        super().__init__()
        whole(self, num_layers=num_layers, num_heads=num_heads)
        if word_dim is not None:
            whole(self, word_dim=word_dim)
        self.maps, self.word_dim = 2 * num_layers * num_heads, word_dim
        self.root = nn.Parameter(torch.empty(2))
        if word_dim is None:
            self.weight = nn.Parameter(torch.empty(self.maps))
        else:
            self.words = nn.Linear(2 * word_dim, self.maps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As small random weights, so that no head is favoured."""
        nn.init.normal_(self.root, std=0.1)
        if self.word_dim is None:
            nn.init.normal_(self.weight, std=0.1)
        else:
            nn.init.xavier_uniform_(self.words.weight)
            nn.init.zeros_(self.words.bias)

    def forward(
        self,
        attention: Sequence[Float[Tensor, "B H T T"]],
        *,
        words: Float[Tensor, "B T E"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T T+1"]:
        """Scores for each token: of the root, then of every token; -inf for delimiters and padding."""
        maps = all_heads(self, attention, "B H T T").transpose(0, 1).flatten(1, 2).to(self.root.dtype)
        B, N, T, _ = maps.shape
        if self.maps != 2 * N:
            refuse(self, "attention", "has another number of heads in all layers together", N, f"{self.maps // 2}")
        if self.word_dim is not None:
            fits(self, "B T E", {"B": B, "T": T, "E": self.word_dim}, words=words)
        elif words is not None:
            refuse(self, "words", "are not taken by a probe without word_dim", tuple(words.shape), "none")
        keep = marks(self, "valid", valid, B, T, maps)
        first, last, inner = _delimiters(keep)
        maps = torch.cat([maps, maps.mT], 1)
        ends = [maps.gather(3, at[:, None, None, None].expand(B, 2 * N, T, 1)) for at in (first, last)]
        features = torch.cat([self.root[0] * ends[0] + self.root[1] * ends[1], maps], 3)
        if words is None:
            scores = torch.einsum("bnij,n->bij", features, self.weight)
        else:
            scores = self._with_words(features, words)
        candidates = torch.cat([inner.new_ones(B, 1), inner], 1)
        return scores.masked_fill(~candidates[:, None], -torch.inf)

    def _with_words(self, features: Float[Tensor, "B N T T+1"], words: Float[Tensor, "B T E"]) -> Tensor:
        """Weights of a pair are linear in both words, so that no joined vectors are formed; for the root they are b."""
        own, other = self.words.weight.split(words.shape[-1], 1)
        whole = torch.einsum("bnij,n->bij", features, self.words.bias)
        by_own = torch.einsum("bnij,bin->bij", features[..., 1:], words @ own.T)
        by_other = torch.einsum("bnij,bjn->bij", features[..., 1:], words @ other.T)
        return whole + F.pad(by_own + by_other, (1, 0))


@CARD.function
def fit_probe(
    probe: AttentionProbe, batches: Iterable[ProbeBatch], *, epochs: int = 1, lr: float = 0.002
) -> list[float]:
    """Train with Adam on the summed cross-entropy of the labelled words, as the paper does; the losses of all steps.

    Args:
        probe: what is trained, in place.
        batches: sentences with the heads of their words.
        epochs: times that all batches are seen.
        lr: of Adam.
    """
    whole("fit_probe", epochs=epochs)
    number("fit_probe", above=0, lr=lr)
    data, adam, losses = list(batches), torch.optim.Adam(probe.parameters(), lr=lr), []
    for _ in range(epochs):
        for batch in data:
            adam.zero_grad()
            scores = probe(batch.attention, words=batch.words, valid=batch.valid)
            loss = F.cross_entropy(scores.flatten(0, 1), batch.labels.flatten(), ignore_index=NO_WORD, reduction="sum")
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
    return losses


def probe_accuracy(probe: AttentionProbe, batch: ProbeBatch) -> float:
    """Share of the labelled words whose best-scored head is right."""
    with torch.no_grad():
        best = probe(batch.attention, words=batch.words, valid=batch.valid).argmax(-1)
    return float((best == batch.labels)[batch.labels != NO_WORD].float().mean())


def head_accuracy(batch: ProbeBatch, *, direction: Literal["dependent", "head"] = "dependent") -> Float[Tensor, "L H"]:
    """Each attention head by itself: share of the labelled words whose most attended other word is their head.

    Args:
        direction: "dependent": the word attends to its head; "head": its head is what attends to it most.
    """
    maps = all_heads("head_accuracy", batch.attention, "B H T T")
    choice("head_accuracy", ("dependent", "head"), direction=direction)
    _, B, _, T, _ = maps.shape
    inner = _delimiters(marks("head_accuracy", "valid", batch.valid, B, T, maps))[2]
    if direction == "head":
        maps = maps.mT
    itself = torch.eye(T, dtype=torch.bool, device=maps.device)
    best = maps.masked_fill(itself, 0).masked_fill(~inner[:, None, None], -1).argmax(-1)
    asked = batch.labels != NO_WORD
    hits = (best + 1 == batch.labels[:, None]) & asked[:, None]
    return hits.sum((1, 3)) / asked.sum()


def _delimiters(keep: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Bool[Tensor, "B T"]]:
    """Where the first and the last valid tokens stand, and which are between."""
    place = torch.arange(keep.shape[-1], device=keep.device)
    first = torch.where(keep, place, keep.shape[-1]).amin(-1)
    last = torch.where(keep, place, -1).amax(-1)
    if bool((last - first < 2).any()):
        got = f"{int((last - first).min()) - 1} between its ends"
        refuse("attention_probe", "valid", "leaves a sentence no word", got, "one word at least between its delimiters")
    return first, last, keep & (place > first[:, None]) & (place < last[:, None])

"""InfiniRetri: the last layer's attention from a question to a text says which sentences to keep.

A text that is too long is read in chunks: what was kept so far, the next sentences, and the question. Sentences that
hold one of the tokens which the question looks at most are kept, as text, and the answer is made of what is left.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import flag, refuse, whole
from regard.inspect.analyses._maps import each_layer
from regard.inspect.trace import trace

CARD = Card(
    "infini_retri",
    equation="""A: the last layer's weights, summed over heads; rows r of the question, context tokens t
u_r = sum over the question's tokens j of A_rj, of the first chunk
score_t = sum over r of u_r^2 times the sum of A_rt' over the w tokens t' around t
kept: every sentence that holds one of the k highest scores, in their order""",
    papers=(
        Paper(
            "Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing",
            "Ye, Wang, Wang",
            2025,
            "2502.12962",
            "abstract; the authors' package",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H*T*S", ""),
    claim="A sentence that is asked for is carried through any number of chunks, which a last chunk alone has lost: "
    "tests/inspect/analyses/test_infini_retri.py::test_a_needle_is_carried_through_chunks.",
    differs=(
        "Sentences are carried as token ids; the authors decode them, and cut and tokenize anew.",
        "A sentence longer than a chunk is cut every so many tokens; the authors cut at blanks.",
        "The context's place is known; the authors search for its first sentence in the text.",
        "Left out: keeping keys and values in place of text, which their code has, by default off.",
    ),
    verified="third-party",
    defaults={"window": "code", "weight": "code"},
)

ENDS = re.compile("(\n\n)|([。！？.?!])")
MARKS = {"", "。", "！", "？", ".", "?", "!"}


class TokenScores(NamedTuple):
    """How much a question looks at each token of a context, and at itself."""

    scores: Float[Tensor, "B C"]
    weight: Float[Tensor, "B Q"]
    """u: what the first chunk hands to those after it."""


@CARD.function
def token_scores(
    attention: Sequence[Float[Tensor, "B H _T S"]],
    *,
    question: tuple[int, int],
    context: tuple[int, int],
    window: int = 8,
    weight: Float[Tensor, "B Q"] | None = None,
) -> TokenScores:
    """How much the last of these layers looks from the question at each token of the context.

    Args:
        attention: maps, a layer each; of the last the question's rows alone will do.
        question: its first token, and the one after its last.
        context: likewise.
        window: w, the tokens over which weights are added up; of an even number one more before than after.
        weight: u of each row of the question; default its attention to the question itself.

    Raises:
        ValueError, TypeError: maps that are none, places that aren't in them, a weight that does not fit.
    """
    name = "token_scores"
    maps = each_layer(name, attention, "B H _T S")[-1]
    whole(name, window=window)
    for told, (first, last) in (("question", question), ("context", context)):
        if not 0 <= first < last <= maps.shape[3]:
            refuse(name, told, "is no stretch of the tokens", (first, last), f"0 <= first < last <= {maps.shape[3]}")
    (first, last), (start, stop) = question, context
    if maps.shape[2] not in (last - first, maps.shape[3]):
        refuse(name, "attention", "has other rows", maps.shape[2], f"all {maps.shape[3]}, or the question's")
    rows = maps.sum(1)
    if maps.shape[2] == maps.shape[3]:
        rows = rows[:, first:last]
    u = rows[..., first:last].sum(2) if weight is None else weight.to(rows)
    if u.shape != rows.shape[:2]:
        refuse(name, "weight", "does not fit", tuple(u.shape), f"(B, Q) = {tuple(rows.shape[:2])}")
    seen = (u.square()[:, None] @ rows[..., start:stop])[:, 0]
    after = (window - 1) // 2
    box = nn.functional.pad(seen, (window - 1 - after, after)).unfold(1, window, 1).sum(2)
    return TokenScores(box, u)


def pick_sentences(
    scores: Float[Tensor, " C"], k: int, sentences: Sequence[tuple[int, int]]
) -> tuple[list[int], Int[Tensor, " k"]]:
    """Which sentences hold one of the k highest scores, of equals the first, and these tokens in order."""
    best = scores.argsort(dim=0, descending=True, stable=True)[:k].sort().values
    held = [n for n, (first, last) in enumerate(sentences) if bool(((best >= first) & (best < last)).any())]
    return held, best


def split_sentences(text: str, *, short: int = 10) -> list[str]:
    """Sentences, each with its mark; a fragment of at most `short` letters behind a full stop stays with it."""
    sentences, current = [], ""
    for piece in filter(None, ENDS.split(text)):
        bare = piece.strip()
        if not current.strip() or bare in MARKS or (current[-1] == "." and len(bare) <= short):
            current += piece
        else:
            sentences.append(current)
            current = piece
    return [*sentences, current] if current.strip() else sentences


def fill_chunks(sentences: Sequence[list[int]], size: int, *, joint: int = 1) -> list[list[list[int]]]:
    """Whole sentences, as token ids, in chunks of at most `size`; each joint counts as `joint` tokens more."""
    chunks: list[list[list[int]]] = []
    total = 0
    for sentence in (s[at : at + size] for s in sentences for at in range(0, len(s), size)):
        if chunks and total + len(sentence) + joint <= size:
            chunks[-1].append(sentence)
            total += len(sentence) + joint
        else:
            chunks.append([sentence])
            total = len(sentence)
    return chunks


@dataclass(frozen=True)
class Retrieved:
    """What was said, and what was kept of the text after each chunk."""

    answer: str
    kept: tuple[tuple[str, ...], ...]
    longest: int
    """Tokens of the longest input that the model was given."""


class InfiniteRetrieval:
    """Answers a question about a text of any length by a transformers model.

    Args:
        model, tokenizer: a causal language model, in whose last layer `trace` can look.
        chunk: tokens of the text that are read at once, besides those kept.
        topk: k.
        window: w of `token_scores`; about the length of an answer.
        frozen: whether the question's weight is that of the first chunk; else it is 1 from the second on.
        template: what stands around {context} and, behind it, {question}.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        chunk: int = 1024,
        topk: int = 300,
        window: int = 8,
        frozen: bool = True,
        template: str = "{context}\n\n{question}",
    ) -> None:
        whole(self, chunk=chunk, topk=topk, window=window)
        flag(self, frozen=frozen)
        parts = re.split(r"\{context\}|\{question\}", template)
        if len(parts) != 3 or template.index("{context}") > template.index("{question}"):
            refuse(self, "template", "lacks its places", template, "{context} and behind it {question}, once each")
        self.model, self.tokenizer, self.parts = model, tokenizer, parts
        self.chunk, self.topk, self.window, self.frozen = chunk, topk, window, frozen

    @torch.no_grad()
    def answer(self, context: str, question: str, *, max_new_tokens: int = 32) -> Retrieved:
        """Read the text chunk by chunk, and answer from what is kept; greedily."""
        before, between, after = self.parts
        prefix = list(self.tokenizer(before).input_ids)
        rest = [self._ids(between), self._ids(question) + self._ids(after)]
        kept: list[list[int]] = []
        weight, history, longest = None, [], 0
        for chunk in fill_chunks([self._ids(s) for s in split_sentences(context)], self.chunk):
            read = kept + chunk
            scores, count = self._scores(prefix, read, rest, weight)
            weight, longest = scores.weight if self.frozen else torch.ones_like(scores.weight), max(longest, count)
            ends = [0]
            for sentence in read:
                ends.append(ends[-1] + len(sentence))
            kept = [read[n] for n in pick_sentences(scores.scores[0], self.topk, list(pairwise(ends)))[0]]
            history.append(tuple(self.tokenizer.decode(s) for s in kept))
        ids = torch.tensor([[*prefix, *chain(*kept, *rest)]], device=next(self.model.parameters()).device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        said = self.model.generate(ids, **options)  # type: ignore[operator]
        told = self.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        return Retrieved(told, tuple(history), max(longest, ids.shape[1]))

    def look(self, ids: list[int], question: tuple[int, int]) -> Float[Tensor, "1 H Q N"]:
        """The last layer's weights of the question's rows."""
        inputs = torch.tensor([ids], device=next(self.model.parameters()).device)
        return trace(self.model, {"input_ids": inputs, "use_cache": False}).weights(-1, rows=range(*question))

    def _scores(
        self, prefix: list[int], read: list[list[int]], rest: list[list[int]], weight: Tensor | None
    ) -> tuple[TokenScores, int]:
        ids = [*prefix, *chain(*read)]
        start, stop = len(prefix), len(ids)
        ids += chain(*rest)
        where = {"question": (stop + len(rest[0]), len(ids)), "context": (start, stop)}
        rows = self.look(ids, where["question"])
        return token_scores([rows], **where, window=self.window, weight=weight), len(ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

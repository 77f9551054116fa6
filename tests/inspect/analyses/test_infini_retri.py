"""InfiniRetri: against the authors' numbers (B197), against plain loops, and a needle in many chunks.

The loops of naive_infini_retri.py are by an author who saw only the paper's account, neither code nor test.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.inspect.analyses import naive_infini_retri as naive

from regard.inspect.analyses.infini_retri import (
    InfiniteRetrieval,
    fill_chunks,
    pick_sentences,
    split_sentences,
    token_scores,
)
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[2] / "vectors" / "B197.npz"


@pytest.mark.parametrize("case", ["odd", "even"])
def test_gives_the_authors_numbers(case):
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    at = {name: int(z[name]) for name in ("prefix", "context_end", "question_start", "question_end", "window", "topk")}
    where = {
        "question": (at["question_start"], at["question_end"]),
        "context": (at["prefix"], at["context_end"]),
        "window": at["window"],
    }
    got = token_scores([z["attn"]], **where)
    close(got.scores[0], z["scores"])
    close(got.weight[0, :, None], z["question_weight"])
    close(token_scores([z["attn"]], **where, weight=torch.ones_like(got.weight)).scores[0], z["scores_unit_weight"])
    rows = z["attn"][:, :, slice(*where["question"])]
    close(token_scores([rows], **where).scores[0], z["scores"])
    sentences = list(pairwise((z["cuts"] - at["prefix"]).tolist()))
    held, best = pick_sentences(got.scores[0], at["topk"], sentences)
    assert (best + at["prefix"]).tolist() == z["picked"].tolist()
    assert [t + at["prefix"] for n in held for t in range(*sentences[n])] == z["kept"].tolist()


@pytest.mark.parametrize("window", [1, 2, 5])
def test_plain_loops(window):
    generator = torch.Generator().manual_seed(window)
    maps = torch.randn(2, 3, 14, 14, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    where = {"question": (9, 14), "context": (2, 8), "window": window}
    own = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    for weight in (None, own):
        got = token_scores([maps[:, :, :, :].detach() * 0, maps], **where, weight=weight)
        for b in range(2):
            told = None if weight is None else weight[b, :, None]
            scores, u = naive.token_scores(maps[b], (9, 14), (2, 8), window, told)
            close(got.scores[b], scores)
            close(got.weight[b], u[:, 0])
            ours, theirs = (
                torch.autograd.grad(z.square().sum(), maps, retain_graph=True)[0] for z in (got.scores[b], scores)
            )
            close(ours, theirs)
            for k in (1, 3, 9):
                sentences = [(0, 2), (2, 3), (3, 6)]
                held, _ = pick_sentences(got.scores[b], k, sentences)
                assert [sentences[n] for n in held] == naive.pick(scores, k, sentences)


def test_sentences_and_chunks():
    text = "A. B. This is a longer one. Next one here!\n\nLast, with 3.14 in it. 你好。再见！\n\n  \n\nEnd"
    assert split_sentences(text) == naive.split_sentences(text)
    assert "".join(split_sentences(text)) == text
    sentences = [list(range(n)) for n in (3, 2, 9, 1, 1, 4, 5)]
    for size in (1, 4, 6, 20):
        for joint in (0, 1):
            assert fill_chunks(sentences, size, joint=joint) == naive.fill_chunks(sentences, size, joint)
    assert fill_chunks([], 4) == []
    assert split_sentences("") == []


class Said:
    """What a tokenizer gives."""

    def __init__(self, ids):
        self.input_ids = ids


class Bytes:
    """A byte is a token, as for the small model."""

    def __call__(self, text, add_special_tokens=True):
        return Said([256] * add_special_tokens + list(text.encode()))

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i for i in list(ids) if i < 256).decode(errors="replace")


TEMPLATE = "{context}\n{question}"


class Copies(torch.nn.Module):
    """Says what once followed the last three bytes, or nothing it knows."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))

    def generate(self, ids, max_new_tokens, **_):
        text = ids[0].tolist()
        found = [i for i in range(len(text) - 3) if text[i : i + 3] == text[-3:]]
        said = text[found[0] + 3 : found[0] + 3 + max_new_tokens] if found else [63] * max_new_tokens
        return torch.tensor([text + said])


class Matching(InfiniteRetrieval):
    """By hand, half of each row's weight is on equal bytes before it, half on the question."""

    def look(self, ids, question):
        ids = torch.tensor(ids)
        rows = torch.arange(*question)
        same = (ids[rows, None] == ids) & (torch.arange(len(ids)) < question[0])
        own = (torch.arange(len(ids)) >= question[0]) & (torch.arange(len(ids)) <= rows[:, None])
        halves = [z.double() / z.sum(1, keepdim=True).clamp(min=1) for z in (same, own)]
        return (sum(halves) / 2)[None, None]


def test_a_needle_is_carried_through_chunks():
    """One sentence is asked for; it is near the beginning, and chunks hold few."""
    lines = [f"{chr(97 + n)}{chr(98 + n)}=no.\n\n" for n in range(15)]
    lines[3] = "qz=lm.\n\n"
    reader = Matching(Copies(), Bytes(), chunk=30, topk=3, window=1, template=TEMPLATE)
    found = reader.answer("".join(lines), "qz=", max_new_tokens=2)
    assert found.answer == "lm"
    assert len(found.kept) > 4
    assert "qz=lm" in "".join(found.kept[-1])
    assert found.longest < 70 < len("".join(lines))
    assert reader.answer("".join(lines[-4:]), "qz=", max_new_tokens=2).answer == "??", "not in a last chunk alone"


def test_the_loop_is_that_of_the_account():
    """Chunks, what is kept after each, and the frozen weight, of the same model's weights in plain loops."""
    tr = pytest.importorskip("transformers")
    model = tr.AutoModelForCausalLM.from_pretrained("models/small", attn_implementation="eager")
    text, question = "One two. Three four five six. Seven! Eight nine? Ten eleven twelve.", "Which is four?"

    def last_layer(ids):
        with torch.no_grad():
            return model(torch.tensor([ids]), output_attentions=True).attentions[-1][0].double()

    for frozen in (True, False):
        options = {"chunk": 20, "topk": 4, "window": 2, "template": TEMPLATE, "frozen": frozen}
        got = InfiniteRetrieval(model, Bytes(), **options).answer(text, question, max_new_tokens=1)
        sentences = [list(s.encode()) for s in naive.split_sentences(text)]
        rest = list(f"\n{question}".encode())
        _, _, history = naive.infinite_retrieval(
            sentences,
            [256],
            rest,
            last_layer,
            chunk=20,
            topk=4,
            window=2,
            use_question_weight=frozen,
            question=(1, len(rest)),
        )
        assert [[list(s.encode()) for s in kept] for kept in got.kept] == history


def test_what_it_refuses():
    maps = [torch.ones(1, 1, 6, 6)]
    with pytest.raises(ValueError, match="token_scores: question is no stretch of the tokens"):
        token_scores(maps, question=(5, 7), context=(0, 3))
    with pytest.raises(ValueError, match="token_scores: weight does not fit"):
        token_scores(maps, question=(4, 6), context=(0, 3), weight=torch.ones(1, 3))
    with pytest.raises(ValueError, match="token_scores: attention has other rows"):
        token_scores([maps[0][:, :, :3]], question=(4, 6), context=(0, 3))
    with pytest.raises(ValueError, match="InfiniteRetrieval: template lacks its places"):
        InfiniteRetrieval(torch.nn.Linear(1, 1), Bytes(), template="{question} {context}")

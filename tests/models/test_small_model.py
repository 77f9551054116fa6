"""The small language model of models/small does what caches, audits and reports of heads need it for."""

import pytest
import torch
from tools import small_model
from tools.small_model import BOS, HOME, IGNORED

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(HOME, use_safetensors=True).eval()


def test_it_is_small():
    assert sum(path.stat().st_size for path in HOME.iterdir()) < 2_000_000


def test_it_copies_and_recalls(model):
    found = small_model.skills(model, rows=16)
    assert all(found[name] > 0.9 for name in ("induction", "copies", "recall of 2", "recall of 8")), found
    assert found["bits a byte of text"] < 4


def test_it_has_heads_of_both_kinds(model):
    found = small_model.heads(model, rows=4)
    assert found["induction"].max() > 0.8, "one looks at what followed the present token earlier"
    assert found["previous"].max() > 0.25, "one looks at the token before, more than at any other"
    assert found["previous"].argmax() < found["induction"].argmax(), "the latter builds on the former"


def test_bytes_are_its_tokens(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(HOME)
    text = "def f(x):\n\treturn 'é'  # 日\x00\x7f"
    ids = tokenizer(text)["input_ids"]
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_it_answers_in_words(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(HOME)
    said = tokenizer("ab=xy\nqr=lm\ntz=kf\nqr=", return_tensors="pt")
    out = model.generate(**said, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).endswith("qr=lm")


def test_labels_are_what_can_be_known():
    draw = torch.Generator().manual_seed(0)
    tokens, labels = small_model.copies(8, draw, 64)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        n = row.index(ord("\n"))
        assert row[0] == BOS
        assert asked == [IGNORED] * (n + 1) + row[n + 1 :]
        assert all(row[t] == row[t - n] for t in range(n + 1, 64))
    tokens, labels = small_model.recalls(8, draw, 64)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        lines = [bytes(row[t : t + 6]).decode() for t in range(1, 61, 6)]
        known: dict[str, str] = {}
        for line, start in zip(lines, range(1, 61, 6), strict=True):
            key, value = line[:-1].split("=")
            again = key in known
            assert known.setdefault(key, value) == value
            assert asked[start : start + 6] == [IGNORED] * 3 + (
                row[start + 3 : start + 5] if again else [IGNORED] * 2
            ) + [IGNORED]

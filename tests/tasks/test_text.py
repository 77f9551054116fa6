"""Text is read whole, split without overlap, and refused in one line where it cannot serve."""

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from regard import catalog
from regard.models.lm import LanguageModel
from regard.models.mixer import parse
from regard.tasks import text
from regard.tasks.text import NextByte, Text, TextError, load, needed_bytes, with_positions

PROSE = "".join(f"line {n} of a text that nobody wrote\n" for n in range(2000)).encode()


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(PROSE)
    return path


def test_both_parts_together_are_the_text(book):
    text = load([book], length=32)
    assert text.train + text.heldout == PROSE
    assert len(text.heldout) == len(PROSE) - len(text.train) == pytest.approx(len(PROSE) / 10, abs=1)


def test_the_heldout_end_holds_a_stretch_of_four_lengths(book):
    book.write_bytes(PROSE[: needed_bytes(128)])
    text = load([book], length=128)
    assert len(text.heldout) == len(text.train) == 4 * 128 + 1
    assert text.heldout_windows(4 * 128, 1000).shape == (1, 4 * 128 + 1)


def test_batches_depend_on_the_seed_alone(book):
    text = load([book], length=16)
    first, again, other = (next(text.batches(4, 16, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 17)
    assert all(bytes(row.tolist()) in text.train for row in first)


def test_heldout_windows_predict_each_byte_once(book):
    text = load([book], length=16)
    windows = text.heldout_windows(64, 640)
    assert windows.shape == (10, 65)
    starts = [text.heldout.find(bytes(w.tolist())) for w in windows]
    assert all(b - a >= 64 for a, b in pairwise(starts))


def test_every_length_predicts_the_same_bytes():
    """A model without any past gives the same loss at each length only then."""

    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    task = NextByte(length=16, text=Text("test", PROSE[:2000], PROSE[2000:2400]))
    model = LanguageModel([Nothing()], dim=16, mlp_dim=16)
    losses, notes = task.measure(model, 4, torch.device("cpu"))
    assert losses["1x"] == pytest.approx(losses["2x"], rel=1e-6) == pytest.approx(losses["4x"], rel=1e-6)
    assert notes == []
    nn.init.zeros_(model.embedding.weight)
    assert task.measure(model, 4, torch.device("cpu"))[0]["1x"] == pytest.approx(8.0)


def test_a_fingerprint_tells_texts_apart(book):
    before = load([book], length=16).fingerprint
    assert before == load([book], length=16).fingerprint
    book.write_bytes(PROSE[:-1] + b"!")
    assert load([book], length=16).fingerprint != before


def test_a_folder_is_read_in_an_order_of_its_own_without_binaries_copies_and_hidden_files(tmp_path):
    for n in range(20):
        (tmp_path / f"{n:02}.txt").write_bytes(b"%02d " % n * 300)
    (tmp_path / "copy.txt").write_bytes(b"07 " * 300)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0" * 300)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"hidden " * 300)
    text = load([tmp_path], length=16)
    whole = text.train + text.heldout
    assert sorted(whole.split(b"\n")) == [b"%02d " % n * 300 for n in range(20)]
    assert whole.split(b"\n") != sorted(whole.split(b"\n")), "the end would be the last names only"


def test_the_default_text_is_the_standard_library_and_always_the_same():
    text = load(length=64)
    assert 2_000_000 < len(text.train) < 8_000_000
    assert b"def " in text.train
    assert b"def " in text.heldout
    assert text.fingerprint == load(length=64).fingerprint


def test_old_eight_bit_text_is_text(book):
    book.write_bytes("Ein Männlein steht im Walde ganz still und stumm.\n".encode("latin-1") * 50)
    assert len(load([book], length=16).train) > 1000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n" * 3000, "is empty"),
        (b"too short", rf"too short \(9 bytes\).*at least {needed_bytes(64)} bytes"),
        (b"text\0text" * 500, "NUL bytes"),
        (bytes(range(128, 256)) * 100, "not UTF-8"),
    ],
)
def test_text_that_cannot_serve_is_refused(book, content, said):
    book.write_bytes(content)
    with pytest.raises(TextError, match=said) as caught:
        load([book], length=64)
    assert "\n" not in str(caught.value)


def test_exactly_enough_is_enough(book):
    book.write_bytes(PROSE[: needed_bytes(64) - 1])
    with pytest.raises(TextError, match="too short"):
        load([book], length=64)
    book.write_bytes(PROSE[: needed_bytes(64)])
    load([book], length=64)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"nowhere\.txt does not exist"):
        load([tmp_path / "nowhere.txt"], length=64)
    with pytest.raises(TextError, match="no text files"):
        load([tmp_path], length=64)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(book):
    book.chmod(0)
    with pytest.raises(TextError, match="Permission denied"):
        load([book], length=64)


def test_what_was_read_and_what_was_not_is_told(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    for n in range(5):
        (folder / "sub" / f"t{n}.txt").write_text(f"the text number {n}, of its own\n" * 20)
    (folder / "copy.txt").write_text((folder / "sub" / "t1.txt").read_text())
    (folder / "empty.txt").write_text(" \n")
    (folder / "image.bin").write_bytes(b"\0" * 100)
    (folder / ".hidden").write_text("x")
    (folder / "link.txt").symlink_to(folder / "sub" / "t2.txt")
    text = load([folder], length=8)
    short, read, *left, held = text.told
    total = len(text.train) + len(text.heldout)
    assert short.startswith(
        f"read 5 files, {total:,} bytes, and left out 5; held out: the last {len(text.heldout)} bytes"
    )
    assert read.startswith("read: 5 files (")
    assert read.endswith(" and 2 more)")
    reasons = {line.split("not read, ")[1].split(": ")[0]: line for line in left}
    assert reasons.keys() == {"hidden, or links", "copies", "empty", "no text"}
    assert "2 files (" in reasons["hidden, or links"]
    assert "image.bin" in reasons["no text"]
    found = re.fullmatch(r"held out: the last (\d+) bytes \(10.\d%\), from (?:byte (\d+) of )?(\S+) on", held)
    assert found is not None
    assert int(found[1]) == len(text.heldout)
    assert Path(found[3]).read_bytes()[int(found[2] or 0) :].startswith(text.heldout.partition(b"\n\n")[0])


def test_the_default_text_tells_what_it_is():
    told = load(length=8).told
    assert re.match(r"read [\d,]+ files, [\d,]+ bytes, and left out [\d,]+; held out: the last [\d,]+ bytes", told[0])
    assert re.match(r"read: [\d,]+ files \(.* and [\d,]+ more\)", told[1])
    assert any(line.startswith("not read, beyond the limit of ") for line in told)
    assert told[-1].startswith("held out: the last ")


def test_everything_in_the_default_comparison_has_positions():
    for mechanism in NextByte.mechanisms():
        families = {catalog.card(name).family for name in parse(mechanism).names}
        assert "positions" in families, mechanism


@pytest.mark.parametrize(
    ("mechanism", "compared"),
    [
        ("softmax", "rotary"),
        ("gated", "gated+rotary"),
        ("window(window=64)", "window(window=64)+rotary"),
        ("kerple", "kerple"),
        ("gated+alibi", "gated+alibi"),
        ("mega", "mega"),
    ],
)
def test_positions_are_joined_where_there_are_none(mechanism, compared):
    assert with_positions(mechanism) == compared


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(TextError, match="is no plain file"):
            load([path], length=4)


def test_long_files_are_not_read_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LIMIT", 1000)
    (tmp_path / "long.txt").write_bytes(b"0123456789" * 150)
    made = load([tmp_path / "long.txt"], length=4)
    assert made.train + made.heldout == b"0123456789" * 100
    assert f"not read, beyond the limit of 1,000 bytes: 1 file ({tmp_path / 'long.txt'} from there on)" in made.told
    (tmp_path / "short.txt").write_bytes(b"abcdefghij" * 30)
    made = load([tmp_path], length=4)
    assert made.train + made.heldout == b"abcdefghij" * 30, "one file that is too long hinders no other"
    assert f"not read, beyond the limit of 1,000 bytes: 1 file ({tmp_path / 'long.txt'})" in made.told


def test_binaries_are_not_read_to_their_end(tmp_path, monkeypatch):
    """A folder may hold weights of many GB beside its texts."""
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(2**36)  # all holes
    (tmp_path / "short.txt").write_bytes(b"abcdefghij" * 30)
    made = load([tmp_path], length=4)
    assert f"not read, no text: 1 file ({tmp_path / 'weights'})" in made.told


def test_text_is_told_by_all_of_its_bytes():
    """Pieces are cut anywhere, within a letter too."""
    letters = "aé€😀" * 300_000
    for shift in range(4):
        assert text._binary(b"x" * shift + letters.encode()) == ""
    data = b"x" * (2**20 - 1) + "é".encode() + b"\xff" * 300_000
    assert text._binary(data).startswith("300000 of its")

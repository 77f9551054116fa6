"""What `regard list` prints: a table for terminals, one for Markdown; and the letters and words in them."""

from collections.abc import Mapping, Sequence
from typing import Any

from regard import terminal
from regard.index import Entry

MARKS = {
    "causal": "c",
    "bidirectional": "b",
    "cross": "x",
    "padding": "p",
    "packed": "k",
    "mask": "m",
    "gqa": "g",
    "streaming": "s",
    "dropout": "d",
    "compile": "t",
}
"""One letter for each feature, in the order of the table."""

KINDS = {
    "TokenMixer": ("T", "tokens", "tokens (B, T, M) -> (B, T, M)"),
    "CrossMixer": ("X", "across", "tokens (B, T, M) and what they look at (B, S, M) -> (B, T, M)"),
    "FeatureMixer": ("F", "feature maps", "feature maps (B, C, Y, X) -> (B, C, Y, X)"),
    "PyramidMixer": ("Y", "pyramids", "feature maps (B, C_l, Y_l, X_l) of several sizes, in a list -> as many"),
    "GraphMixer": ("G", "graphs", "nodes (N, M) and edges (2, E) -> nodes (N, M)"),
    "Pooler": ("P", "pooling", "tokens (B, T, M) -> one vector each (B, M)"),
    "Pointer": ("N", "pointing", "tokens (B, T, M) and what they point at (B, S, M) -> log-probabilities (B, T, S)"),
    "Loss": ("L", "losses", "tensors -> a scalar to train on"),
    "Model": ("M", "models", "the inputs of its task -> a tensor, or several by name"),
    "CachePolicy": ("C", "caches", "the state and new keys and values -> those to attend to, and the state after them"),
    "Training": ("R", "training", "attached to a model, it changes how that trains: its loss, and what its layers do"),
    "Steer": ("S", "steering", "attached to a model, it changes its attention while a `with` block lasts"),
    "Distributed": ("D", "devices", "each rank's share of q, k, v (B, H, T, D) -> its share of the outputs"),
    "Analysis": ("A", "analyses", "a model's attention maps (B, H, T, S), one a layer -> what they tell"),
}
"""One letter for each protocol, a word for the legend, and what a mechanism of that kind takes and gives."""

VERIFIED = {
    "equation": ("E", "the paper's equations", "against the paper's equations, written out in a test"),
    "third-party": (
        "T",
        "code of others",
        "against the formula, written out in a test, and the code or numbers of others",
    ),
    "reconstructed": (
        "R",
        "a reconstruction",
        "against a reconstruction: the paper's own text could not be read",
    ),
}
"""One letter for what a mechanism was checked against, words for the legend, and a sentence."""


def legend(entries: Sequence[Entry]) -> tuple[str, ...]:
    """What the letters mean, as far as they occur."""
    here = {entry["protocol"] for entry in entries}
    meant = {
        "supports": MARKS.items(),
        "k, kind": ((word, letter) for name, (letter, word, _) in KINDS.items() if name in here),
        "v, verified against": ((word, letter) for letter, word, _ in VERIFIED.values()),
    }
    return tuple(
        f"{what}: " + ", ".join(f"{x}\N{NO-BREAK SPACE}{word}" for word, x in of) for what, of in meant.items()
    )


def marks(supports: Mapping[str, bool]) -> str:
    """'cbxpmgsdt' with '-' for what is not supported."""
    return "".join(mark if supports[name] else "-" for name, mark in MARKS.items())


def table(entries: Sequence[Entry]) -> list[str]:
    """Lines of name, family, kind, marks and gist, one a mechanism, as wide as the terminal."""
    rows = [
        (
            entry["name"],
            entry["family"],
            KINDS[entry["protocol"]][0],
            marks(entry["supports"]),
            VERIFIED[entry["verified"]][0],
            entry["gist"],
        )
        for entry in entries
    ]
    columns = (
        terminal.Column("name"),
        terminal.Column("family", rank=4),
        terminal.Column("k", rank=2),
        terminal.Column("supports", rank=1),
        terminal.Column("v", rank=3),
        terminal.Column("what it does", least=24),
    )
    return terminal.joined(terminal.fitted(columns, rows))


def count(entries: Sequence[Entry], *, families: bool) -> str:
    """'3 mechanisms, 1 analysis, 2 families'."""
    analyses = sum(entry["protocol"] == "Analysis" for entry in entries)
    functions = sum(entry["form"] == "function" for entry in entries) - analyses
    counted = [
        (len(entries) - analyses - functions, "mechanism", "mechanisms"),
        (functions, "function", "functions"),
        (analyses, "analysis", "analyses"),
        (len({entry["family"] for entry in entries}) if families else 0, "family", "families"),
    ]
    return ", ".join(f"{number} {one if number == 1 else many}" for number, one, many in counted if number)


def markdown(entries: Sequence[Entry]) -> str:
    """The table as GitHub shows it."""
    lines = ["| name | family | k | what it does | papers | supports | v |", "|---|---|---|---|---|---|---|"]
    for entry in entries:
        cells = (
            f"`{entry['name']}`",
            entry["family"],
            KINDS[entry["protocol"]][0],
            entry["gist"],
            "; ".join(cited(paper) for paper in entry["papers"]),
            f"`{marks(entry['supports'])}`",
            VERIFIED[entry["verified"]][0],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"{text}<br>".replace("\N{NO-BREAK SPACE}", " ") for text in legend(entries))])


def cited(paper: Mapping[str, Any]) -> str:
    """'[Press, Smith, Lewis 2021](https://arxiv.org/abs/2108.12409)'."""
    who = f"{paper['authors']} {paper['year']}"
    return f"[{who}]({paper['url']})" if paper["url"] else f"{who}, {paper['ref']}"

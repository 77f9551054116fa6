"""What `regard show` prints: all that a card says, in sections, for terminals and as Markdown."""

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from regard import index, terminal
from regard.cards import Card
from regard.cli.table import KINDS, MARKS, VERIFIED, cited

MEANING = {
    "causal": "causal=True: no query sees a later key",
    "bidirectional": "causal=False: queries see keys on both sides",
    "cross": "attends to another sequence: forward(x, context)",
    "padding": "hidden padding keys change nothing",
    "packed": "documents in one row are what they are one by one: mask=masks.packed(cu_seqlens)",
    "mask": "takes any mask",
    "gqa": "fewer key heads than query heads: num_kv_heads",
    "streaming": "token by token: init_state and step",
    "dropout": "dropout of weights in training",
    "compile": "torch.compile(fullgraph=True)",
}
"""What a feature means for who calls."""


def meaning(card: Card, feature: str) -> str:
    """What it means, and why the card doesn't claim it, where that is said."""
    why = card.lacks.get(feature)
    return MEANING[feature] + (f" (not here: {why})" if why else "")


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    lines: Sequence[str]
    form: Literal["text", "list", "rows", "code", "picture"] = "text"
    """`rows` are lined up in columns; `code` may be wrapped, a `picture` is cut."""
    markdown: Sequence[str] = ()
    """The lines as Markdown has them, where that is not the same."""


def sections(card: Card, own: Mapping[str, Any], cost: Mapping[str, Any], drawing: Sequence[str]) -> Iterator[Section]:
    """All there is, in the order in which it is shown."""
    entry = index.data(card)
    yield Section("equation", card.equation.splitlines(), "code")
    yield Section(
        "paper" + "s" * (len(card.papers) > 1),
        [line for paper in entry["papers"] for line in _paper(paper)],
        markdown=["- " + ", ".join([paper["title"], cited(paper), *_read(paper)]) for paper in entry["papers"]],
    )
    if card.differs:
        yield Section("differs", card.differs, "list")
    yield Section("verified", [VERIFIED[card.verified][2]])
    yield Section("kind", [_kind(entry)])
    if card.base is not None:
        yield Section("variant", [f"of {card.base.name}, with {_settings(card.preset)}"])
    if others := [other for other in index.entries() if other["variant_of"] == card.name]:
        yield Section("variants", [f"{other['name']}: {other['gist']}" for other in others], "list")
    if entry["tied"]:
        words = f"{', '.join(entry['tied'])}: the paper has one for all layers; regard.share(*layers) makes it so"
        yield Section("tied", [words])
    if not card.is_function:
        marked = [f"{'yes' if name in card.supports else 'no ':3} {name:13}  {meaning(card, name)}" for name in MARKS]
        yield Section("supports", marked, "rows")
        yield Section("traits", [", ".join(sorted(card.traits)) or "none claimed"])
    options = [_option(card, name, default, own) for name, default in card.options.items()]
    yield Section("arguments" if card.is_function else "options", options or ["none"], "code" if options else "text")
    if card.auxiliary:
        yield Section("loss", [f"{card.auxiliary}(...) gives a loss to add to the task's, times auxiliary_weight"])
    yield Section("cost", list(_cost(card, cost)), "rows")
    if card.claim:
        yield Section("claim", [card.claim])
    if card.tasks:
        yield Section("tasks", [_shown_by(card, task) for task in card.tasks], "code")
    if card.exceptions:
        yield Section("exceptions", [f"{law}: {why}" for law, why in card.exceptions.items()], "list")
    if drawing:
        yield Section("picture", drawing, "picture")


def _shown_by(card: Card, task: str) -> str:
    """The command behind 'text', or 'text(window=32)': a task, and the options that the mechanism has there."""
    name, bracket, options = task.partition("(")
    command = "regard profile" if name == "profile" else f"regard compare --task {name}"
    return f"{command} --mechanisms '{card.name}({options}'" if bracket else command


def _paper(paper: Mapping[str, Any]) -> list[str]:
    source = f"{paper['authors']} {paper['year']}, {paper['url'] or paper['ref']}"
    return [paper["title"], *(f"  {line}" for line in (source, *_read(paper)))]


def _read(paper: Mapping[str, Any]) -> list[str]:
    return [f"read: {paper['read']}"] if paper["read"] else []


def _kind(entry: Mapping[str, Any]) -> str:
    """'regard.positions.alibi.ALiBi fills the slot position'."""
    where, slots = entry["where"], entry["fills"]
    module, _, made_by = where.rpartition(".")
    where = module if made_by.startswith("_") else where
    if slots:
        return f"{where} fills the slot{'s' * (len(slots) > 1)} {', '.join(slots)}"
    form = "function" if entry["form"] == "function" else entry["protocol"]
    article = "an" if form[0] in "AEIOU" else "a"
    return f"{where}, {article} {form}: {KINDS[entry['protocol']][2]}"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in settings.items())


def _option(card: Card, name: str, default: object, own: Mapping[str, Any]) -> str:
    """'window = 128  (here 3)  (default: ours)'; with the other values that it may have, where these are words."""
    words = f"{name} (required)" if default is inspect.Parameter.empty else f"{name} = {default!r}"
    assert card.made is not None
    others = [repr(value) for value in values(card.made.signature.parameters[name].annotation) if value != default]
    words += f"  or {', '.join(others)}" if others else ""
    words += f"  (here {own[name]!r})" if name in own else ""
    return words + (f"  (default: {card.defaults[name]})" if name in card.defaults else "")


def values(annotation: object) -> list[object]:
    """What a `Literal`, or a union with one, allows."""
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [value for member in typing.get_args(annotation) for value in values(member)]


def _cost(card: Card, cost: Mapping[str, Any]) -> Iterator[str]:
    for name, unit in (("time", "multiply-adds"), ("state", "numbers a sequence")):
        formula, number = getattr(card.cost, name), cost[name]
        if not formula:
            yield f"{name:5}  none: it does not stream"
            continue
        yield f"{name:5}  {formula}"
        unset = [option for option, value in card.options.items() if value is None and option in str(number)]
        if unset:
            yield f"       a number needs {unset[0]}: regard show '{card.name}({unset[0]}=...)'"
        else:
            words = number if isinstance(number, str) else f"{amount(number)} {unit}"
            yield f"       = {words} at {cost['at']}"


def amount(number: float) -> str:
    """1234567 -> '1.23 million'."""
    for size, word in ((1e15, "quadrillion"), (1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def show(card: Card, found: Sequence[Section]) -> None:
    """Print the sections on the terminal."""
    from rich.text import Text

    terminal.show(Text(card.name, "bold cyan") + Text(f"  ({card.family})", "dim"), terminal.indented(card.gist, 0))
    for section in found:
        terminal.show("", Text(section.heading, "bold"))
        if section.form == "picture":
            terminal.show(*(f"  {line}" for line in section.lines), cut=True)
            continue
        bullet = "- " if section.form == "list" else ""
        print(*(terminal.indented(bullet + line, hang=_HANG.get(section.form)) for line in section.lines), sep="\n")


_HANG = {"code": 4, "rows": 9}
"""How far lines that are wrapped go on behind where they began."""


def markdown(card: Card, found: Sequence[Section]) -> str:
    """The sections as Markdown."""
    parts = [f"# {card.name}", card.gist, f"Family: {card.family}"]
    for section in found:
        lines = [*section.markdown, *([] if section.markdown else section.lines)]
        if section.form in ("code", "rows", "picture"):
            lines = ["```text", *lines, "```"]
        elif section.form == "list":
            lines = [f"- {line}" for line in lines]
        parts += [f"## {section.heading}", "\n".join(lines)]
    return "\n\n".join(parts)

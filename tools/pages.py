"""Pages of the site, and tables in them, that are made from the code: one page for each mechanism, laws, analyses.

In a page, `<!-- run: COMMAND -->` and `<!-- end -->` stand around what the command puts out, and `<!-- make: NAME -->`
where a table goes. The site has all this; the repository keeps nothing of it.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import choose, draw, readme
from tools.choose import plain, table

from regard import catalog, index
from regard.cards import Card
from regard.cli.page import amount, meaning, sections, values
from regard.cli.table import KINDS, MARKS
from regard.cost import costs

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Address below docs/ -> the file of the repository that stands there."""
MADE = re.compile(r"<!-- make: (\w+) -->")
SIZE = {"batch": 1, "heads": 8, "length": 1024, "width": 64}
HEADINGS = {"differs": "Departures"}
TEST = re.compile(r"(?<!`)\btests/[\w/]+\.py(?:::\w+)?")
LOADING = re.compile(r"<(script|img|iframe|source|video|audio|link|object|embed)\b[^>]*>", re.IGNORECASE)


def all_pages() -> dict[str, str]:
    """Address below docs/ -> Markdown, of every page that does not lie there."""
    made = {to: (ROOT / path).read_text(encoding="utf-8") for to, path in FROM_ROOT.items()}
    made["mechanisms/index.md"] = overview()
    return made | {f"mechanisms/{name}.md": mechanism(card) for name, card in catalog.cards().items()}


def filled(markdown: str, run: Callable[[str], str]) -> str:
    """A page with all that is to be made; `run` gives a command's output."""
    return MADE.sub(lambda asked: TABLES[asked[1]](), readme.filled(markdown, run))


def loaded(html: str) -> list[str]:
    """What a page fetches from another host when it is opened: its tags. Links that are followed by hand are none."""
    tags = [found[0] for found in LOADING.finditer(html)]
    away = [tag for tag in tags if re.search(r"\b(?:src|srcset|href|data)\s*=\s*[\"']?\s*(?:https?:)?//", tag)]
    followed = re.compile(r"\brel=[\"']?(?:canonical|next|prev|alternate|edit)\b")
    styles = re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", html)
    return [tag for tag in away if not followed.search(tag)] + styles


def by_family() -> dict[str, list[str]]:
    """Family -> the names of its mechanisms and analyses, in the catalogue's order."""
    found: dict[str, list[str]] = {}
    for entry in index.entries():
        found.setdefault(entry["family"], []).append(entry["name"])
    return found


def overview() -> str:
    """The list of all pages."""
    parts = [
        "# Mechanisms",
        "One page each, made from its card. [Choose](../choose.md) has them as a table of properties.",
    ]
    for family, names in by_family().items():
        lines = [f"- [{name}]({name}.md): {plain(catalog.card(name).gist)}" for name in names]
        parts.append(f"## {family}\n\n{choose.said(family)}.\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


# --- one mechanism ------------------------------------------------------------------------------------------


def mechanism(card: Card) -> str:
    """All that its card says, a picture, and its file."""
    cost = costs(card, {}, **SIZE)
    entry = index.data(card)
    drawn, added = draw.pictures(card), draw.bias(card)
    parts = [f"# {card.name}", plain(card.gist), _facts(entry)]
    told = {section.heading: section for section in sections(card, {}, cost, ())}
    parts.append(_code("text", told.pop("equation").lines))
    parts += ["## Picture"] * bool(drawn or added) + [drawn] * bool(drawn)
    if added:
        parts.append(_code("text", added))
    if drawn:
        parts.append("A small instance with random parameters; the stronger the colour, the more.")
    if snippet := example(card):
        parts += ["## Try it", snippet]
    for heading, section in told.items():
        made: Sequence[str] = _OWN[heading](card, cost) if heading in _OWN else ()
        if made:
            body = "\n".join(made)
        elif section.form in ("code", "rows"):
            body = _code("text", section.lines)
        elif section.form == "list":
            body = "\n".join(f"- {_text(line)}" for line in section.lines)
        else:  # what is Markdown already stays as it is
            body = "\n".join([*section.markdown] or map(_text, section.lines))
        parts.append(f"## {HEADINGS.get(section.heading, section.heading.capitalize())}\n\n{body}")
    return "\n\n".join([*parts, *_source(card)])


def _facts(entry: Mapping[str, Any]) -> str:
    """The line below the title: what it takes, how it grows, what it keeps."""
    facts = [f"Family **{entry['family']}**"]
    if entry["form"] != "function":
        facts.append(f"kind **{KINDS[entry['protocol']][1]}**")
        facts.append(f"cost **{choose.growth(entry, 'time')}**")
        if state := choose.state(entry):
            facts.append(f"state **{state}**")
        facts.append(f"**{choose.exactness(entry)}**")
    return " · ".join(facts) + "\n{ .facts }"


def example(card: Card) -> str:
    """Python that builds a small instance and calls it; '' where its protocol alone doesn't say how."""
    if card.is_function or card.protocol not in CALLED or card.inputs is not None:
        return ""
    options = dict(card.example)
    if "causal" in card.supports:
        options = {"causal": True, **options}
    said = "".join(f", {name}={value!r}" for name, value in options.items())
    lines = [
        "import torch",
        "",
        "import regard",
        "",
        f'layer = regard.create("{card.name}", dim=24, num_heads=6{said})',
    ]
    return _code("python", [*lines, *CALLED[card.protocol]])


CALLED = {
    "TokenMixer": ("y = layer(torch.randn(2, 12, 24))  # (B, T, M) -> (B, T, M)",),
    "CrossMixer": ("y = layer(torch.randn(2, 5, 24), torch.randn(2, 7, 24))  # (B, T, M), (B, S, M) -> (B, T, M)",),
    "FeatureMixer": ("y = layer(torch.randn(2, 24, 8, 8))  # (B, C, Y, X) -> the same",),
    "GraphMixer": (
        "edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])  # from, to",
        "y = layer(torch.randn(4, 24), edges)  # nodes (N, M) -> (N, M)",
    ),
    "Pooler": ("y = layer(torch.randn(2, 12, 24))  # (B, T, M) -> (B, M)",),
    "Pointer": ("y = layer(torch.randn(2, 5, 24), torch.randn(2, 7, 24))  # log-probabilities (B, T, S)",),
}
"""Protocol -> the lines that call a small instance."""


def _supports(card: Card, cost: Mapping[str, Any]) -> list[str]:
    rows = [(name, "yes" if name in card.supports else "no", meaning(card, name)) for name in MARKS]
    return table(("feature", "", "meaning"), [(n, yes, plain(what)) for n, yes, what in rows]).splitlines()


def _options(card: Card, cost: Mapping[str, Any]) -> list[str]:
    assert card.made is not None
    rows = []
    for name, default in card.options.items():
        required = default is inspect.Parameter.empty
        others = [value for value in values(card.made.signature.parameters[name].annotation) if value != default]
        told = "required" if required else f"`{default!r}`"
        rows.append((f"`{name}`", told, ", ".join(f"`{x!r}`" for x in others), card.defaults.get(name, "")))
    if not rows:
        return ["None."]
    head = ["option", "default", "or", "whose default"]
    keep = [n for n in range(4) if n < 2 or any(row[n] for row in rows)]
    return table([head[n] for n in keep], [[plain(row[n]) for n in keep] for row in rows]).splitlines()


def _costs(card: Card, cost: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, unit in (("time", "multiply-adds"), ("state", "numbers a sequence")):
        formula, number = getattr(card.cost, name), cost[name]
        if formula:
            rows.append((name, f"`{formula}`", number if isinstance(number, str) else f"{amount(number)} {unit}"))
    return [*table(("", "formula", f"at {cost['at']}"), rows).splitlines()]


_OWN = {"supports": _supports, "options": _options, "arguments": _options, "cost": _costs}


def _source(card: Card) -> Iterator[str]:
    """The documentation of its class or function, and the whole file."""
    builder = card.builder
    file = SRC / Path(*builder.__module__.split(".")).with_suffix(".py")
    if not builder.__name__.startswith("_"):
        yield f"## In Python\n\n::: {builder.__module__}.{builder.__name__}"
    code = "\n".join(f"    {line}".rstrip() for line in file.read_text(encoding="utf-8").splitlines())
    where = f"src/{file.relative_to(SRC)}"
    folded = f'??? abstract "{where}"\n\n    ~~~~~~python\n{code}\n    ~~~~~~'
    yield f"## Source\n\nThe file: card, function, module.\n\n{folded}"


def _text(line: str) -> str:
    """Plain text, with tests in code font."""
    return plain(TEST.sub(lambda found: f"`{found[0]}`", line))


def _code(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


# --- laws and analyses --------------------------------------------------------------------------------------


def laws() -> str:
    """Every law: its id, its name, what it says, and whom it speaks of."""
    from regard.laws import LAWS

    rows = [(law.id, plain(law.name.replace("_", " ")), plain(law.statement), law.weight) for law in LAWS]
    return table(("id", "name", "statement", "weight"), rows)


def analyses() -> str:
    """Every analysis, with the arguments that it asks for."""
    rows = []
    for name in catalog.analyses():
        card = catalog.card(name)
        asks = [f"`{option}`" for option, default in card.options.items() if default is inspect.Parameter.empty]
        rows.append((f"[{name}](mechanisms/{name}.md)", plain(card.gist), ", ".join(asks)))
    return table(("name", "what it tells", "asks for"), rows)


TABLES = {"analyses": analyses, "laws": laws, "properties": choose.whole}
"""What a page may ask for by name."""

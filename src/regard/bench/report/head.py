"""The head of the page: the answer first, then what was run, what to be careful about and what failed."""

import math
from collections.abc import Sequence

from regard.bench.record import Result
from regard.bench.report.groups import Group
from regard.bench.report.settings import collected, differing, words
from regard.bench.report.text import listing, plural, quantity, text
from regard.bench.report.wording import sentences

FACTS: dict[str, tuple[str, ...]] = {
    "Data": ("data", "text", "dataset", "source", "files", "bytes", "tokenizer", "vocab"),
    "Model": ("dim", "depth", "heads", "num_heads", "layers", "host", "match"),
    "Budget": ("steps", "batch", "batch_size", "length", "learning_rate", "lr", "budget"),
    "Device": ("device", "dtype"),
}
"""Which settings the head of the page shows, under which word. All others stand at the end."""


def headline(group: Group) -> str:
    """Which mechanism is best, by how much, and what that rests on."""
    answer, *rest = (text(sentence, 1000) for sentence in sentences(group))
    return f'<p class="answer">{answer}</p>' + (f"<p>{' '.join(rest)}</p>" if rest else "")


def facts(results: Sequence[Result]) -> str:
    """Data, model, budget, device and seeds, a line each."""
    settings = collected([r.cell.settings for r in results])
    surroundings = collected([r.environment for r in results if r.environment])
    lines = []
    for word, keys in FACTS.items():
        parts = [f"{words(k)} {text(listing(settings[k], 4), 120)}" for k in keys if k in settings]
        if word == "Device":
            parts += [text(listing(v, 3), 160) for k, v in surroundings.items() if "device" in k.lower()]
        if word == "Data":
            parts = [*(text(task, 80) for task in dict.fromkeys(r.cell.task for r in results)), *parts]
        if word == "Budget" and (tokens := _tokens(settings)):
            parts.append(f"{quantity(tokens, 'tokens')} a run")
        if parts:
            lines.append(f"<dt>{word}</dt><dd>{' · '.join(parts)}</dd>")
    seeds = sorted({r.cell.seed for r in results})
    done = sum(r.status == "done" for r in results)
    runs = f"{plural(done, 'run')} finished, {len(results) - done} failed"
    listed = ", ".join(map(str, seeds[:12])) + (" …" if len(seeds) > 12 else "")
    lines.append(f"<dt>Seeds</dt><dd>{plural(len(seeds), 'seed')} ({listed}) · {runs}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _tokens(settings: dict[str, list[str]]) -> int | None:
    """How many tokens a run trains on, where all runs agree on it."""
    factors = [
        settings.get("steps"),
        settings.get("batch", settings.get("batch_size")),
        settings.get("length"),
    ]
    numbers = [int(f[0]) for f in factors if f is not None and len(f) == 1 and f[0].isdecimal()]
    return math.prod(numbers) if len(numbers) == 3 else None


def told(groups: Sequence[Group]) -> str:
    """Of each group what was read for its data, what was not, and what was held out."""
    found = {group.title: dict.fromkeys(line for r in group.results for line in r.data) for group in groups}
    lists = [
        (f"<p>{text(title)}</p>" if len(groups) > 1 else "")
        + f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"
        for title, lines in found.items()
        if lines
    ]
    return f"<details><summary>What was read, and what was held out</summary>{''.join(lists)}</details>" * bool(lists)


def warnings(groups: Sequence[Group]) -> str:
    """A line for every difference between runs of a group that makes their numbers hard to compare."""
    lines = []
    results = [r for group in groups for r in group.results]
    for group in groups:
        settings = [r.cell.settings for r in group.results]
        keys = [words(key) for key in differing(settings) if all(key in found for found in settings)]
        if keys:
            lines.append(f"Not all runs share the same {listing(keys)}: compare with care.")
    if keys := differing([r.environment for r in results if r.status == "done"]):
        lines.append(f"The runs differ in {listing([words(k) for k in keys])}: compare speed with care.")
    if len({r.turns for r in results if r.status == "done"}) > 1:
        lines.append("Not all speeds were measured in turns with each other: compare speed with care.")
    return "".join(f'<p class="warning">{line}</p>' for line in dict.fromkeys(lines))


def traceback(said: str) -> str:
    """A traceback, folded up; nothing where there is none."""
    return f"<details><summary>Traceback</summary><pre>{text(said, 20_000)}</pre></details>" if said else ""


def failures(results: Sequence[Result]) -> str:
    """The failed runs with their reasons; seeds that failed alike share a line."""
    failed = [r for r in results if r.status != "done"]
    if not failed:
        return ""
    alike: dict[tuple[str, str, bool], list[int]] = {}
    traces: dict[tuple[str, str, bool], str] = {}
    for r in failed:
        key = (r.cell.mechanism, r.reason or "no reason recorded", r.refused)
        alike.setdefault(key, []).append(r.cell.seed)
        traces.setdefault(key, traceback(r.traceback))
    items = "".join(
        f"<li><strong>{text(name, 80)}</strong> (seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}){' is refused' * refused}: {text(reason)}{traces[name, reason, refused]}</li>"
        for (name, reason, refused), seeds in alike.items()
    )
    return f'<div class="warning"><h2>Failed: {plural(len(failed), "run")}</h2><ul>{items}</ul></div>'

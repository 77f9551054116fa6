"""The end of the page: settings, versions and every run, so that a reader can repeat them."""

import math
from collections.abc import Sequence

from regard.bench.record import Result
from regard.bench.report.groups import factor
from regard.bench.report.settings import collected, words
from regard.bench.report.table import scroll
from regard.bench.report.text import DASH, listing, text


def reproduce(results: Sequence[Result]) -> str:
    settings = _terms(collected([r.cell.settings for r in results]))
    versions = _terms(collected([r.environment for r in results if r.environment]))
    names = ("Mechanism", "Task", "Seed", "Status", "Held-out", "Took", "Checkpoint", "Key")
    head = "".join(f'<th scope="col"{" class=text" if n == "Checkpoint" else ""}>{n}</th>' for n in names)
    runs = scroll("Every run", f"<thead><tr>{head}</tr></thead>", [_run(r) for r in results])
    return (
        "<h2>How to reproduce</h2>"
        "<p>The same command with the same settings and versions gives the same cells; a cell's key is a "
        "hash of its task, mechanism, seed and settings.</p>"
        + (f"<h3>Settings</h3><dl>{settings}</dl>" if settings else "")
        + (f"<h3>Versions and machine</h3><dl>{versions}</dl>" if versions else "")
        + f"<h3>Every run</h3>{runs}"
    )


def _terms(found: dict[str, list[str]]) -> str:
    return "".join(
        f"<dt>{words(key)}</dt><dd>{'differs: ' if len(values) > 1 else ''}{text(listing(values, 12), 1000)}</dd>"
        for key, values in found.items()
    )


def _run(r: Result) -> str:
    main = r.metric.main if r.metric.main in r.heldout else min(r.heldout, key=factor, default="")
    ended = r.metric.write(r.heldout[main]) if math.isfinite(r.heldout.get(main, math.nan)) else DASH
    took = f"{r.seconds:.0f} s" if r.seconds else DASH
    cells = (text(r.cell.task, 40), r.cell.seed, text(r.status), ended, took)
    return (
        f'<tr><th scope="row">{text(r.cell.mechanism, 80)}</th>{"".join(f"<td>{c}</td>" for c in cells)}'
        f'<td class="text">{text(r.checkpoint) or DASH}</td><td><code>{r.cell.key[:12]}</code></td></tr>'
    )

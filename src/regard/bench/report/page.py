"""The page: its sections in order, its style sheet, and the scripts that draw its plots."""

import json
import secrets
from collections.abc import Sequence
from importlib import resources
from typing import Any

from regard.bench.record import Result
from regard.bench.report.cards import Cards
from regard.bench.report.curves import curves
from regard.bench.report.groups import grouped
from regard.bench.report.head import facts, failures, headline, told, warnings
from regard.bench.report.lengths import along
from regard.bench.report.pareto import tradeoffs
from regard.bench.report.reproduce import reproduce
from regard.bench.report.table import table
from regard.bench.report.text import text


def render(results: Sequence[Result], title: str, plotly: str) -> str:
    """The whole page; `plotly` is the source of plotly.js."""
    groups = grouped(results)
    plots: list[dict[str, Any]] = []
    body = [f"<header><h1>{text(title)}</h1>"]
    body += [headline(group) for group in groups]
    body += [facts(results), told(groups), warnings(groups), failures(results), "</header><main>"]
    cards = Cards(groups)
    for number, group in enumerate(groups):
        suffix = f": {text(group.title)}" if len(groups) > 1 else ""
        body.append(f"<h2>Results{suffix}</h2>{table(group, cards)}")
        if group.ranked or any(row.curve() for row in group.rows):
            # Where a task asks more and more, that is the finding; the text's lengths are a question of their own.
            sections = (curves, tradeoffs, along) if group.metric.by_length else (along, curves, tradeoffs)
            body += [section(group, number, suffix, plots) for section in sections]
    body += [cards.section(), reproduce(results), "</main>"]
    content = "\n".join(part for part in body if part)
    nonce = secrets.token_urlsafe(18)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n'
        f"<style>\n{_template('report.css')}</style>\n</head>\n"
        f"<body>\n{content}\n{_scripts(plots, plotly, nonce)}\n</body>\n</html>\n"
    )


def _scripts(plots: list[dict[str, Any]], plotly: str, nonce: str) -> str:
    if not plots:
        return ""
    # ASCII-only JSON without '<' or '&' can neither end the script element nor hold a line separator.
    data = json.dumps(plots, allow_nan=False)
    for sign, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(sign, escaped)
    return (
        f'<script type="application/json" id="plots" nonce="{nonce}">{data}</script>\n'
        f'<script nonce="{nonce}">{plotly}</script>\n'
        f'<script nonce="{nonce}">{_template("report.js")}</script>'
    )


def _template(name: str) -> str:
    return (resources.files("regard.bench.report") / "templates" / name).read_text("utf-8")

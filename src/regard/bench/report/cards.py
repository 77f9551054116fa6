"""The section on the mechanisms: what the catalogue says about each that was compared."""

from collections.abc import Sequence
from typing import Any

from regard.bench.report.groups import Group, Row
from regard.bench.report.text import text
from regard.spec import parse_stack

VERIFIED = {
    "equation": "against the paper's formula, written out on its own",
    "third-party": "against the formula and an independent implementation",
    "reconstructed": "against a reconstruction; the paper's own text could not be read",
}


class Cards:
    """The cards behind a report; a part that several composites share is told once, then linked."""

    def __init__(self, groups: Sequence[Group]) -> None:
        names = dict.fromkeys(row.mechanism for group in groups for row in group.rows)
        found = {part: _find_card(part) for name in names for part in _parts(name)}
        self.cards = {part: card for part, card in found.items() if card is not None}
        told = [name for name in names if any(part in self.cards for part in _parts(name))]
        self.ids = {name: f"mechanism-{i}" for i, name in enumerate(told)}

    def link(self, row: Row) -> str:
        """The row's label, linked to its mechanism where that is told."""
        label = text(row.label, 80)
        return f'<a href="#{self.ids[row.mechanism]}">{label}</a>' if row.mechanism in self.ids else label

    def section(self) -> str:
        if not self.ids:
            return ""
        # A part with a section of its own is told there, any other in the first section that has it.
        told = {name: identity for name, identity in self.ids.items() if name in self.cards}
        blocks = []
        for name, identity in self.ids.items():
            blocks.append(f'<section id="{identity}" aria-labelledby="{identity}-name">')
            blocks.append(f'<h3 id="{identity}-name">{text(name, 80)}</h3>')
            for part in (p for p in _parts(name) if p in self.cards):
                card = self.cards[part]
                if told.setdefault(part, identity) != identity:
                    link = f'<a href="#{told[part]}">{text(part, 80)}</a>'
                    blocks.append(f"<p>{link}: {text(card.gist)}</p>")
                else:
                    blocks.append((f"<h4>{text(part, 80)}</h4>" if part != name else "") + _told(card))
            blocks.append("</section>")
        return f"<h2>The mechanisms</h2>{''.join(blocks)}"


def _parts(mechanism: str) -> list[str]:
    """The names of the cards behind 'gated+rotary', 'kerple(log_space=True)' or 'linear*3+softmax'."""
    try:
        return parse_stack(mechanism).names
    except ValueError:  # a row of old, when more could be written
        return [part.strip() for part in mechanism.partition("(")[0].split("+")]


def _find_card(name: str) -> Any | None:
    """The card, or None: a report of old results must not fail because a mechanism was renamed since."""
    try:
        from regard import catalog

        return catalog.card(name)
    except Exception:
        return None


def _told(card: Any) -> str:
    lines = [("Paper", _source(paper)) for paper in card.papers]
    if card.claim:
        lines.append(("Claim", text(card.claim, 1000)))
    if card.differs:
        lines.append(("Differs", "<br>".join(text(d, 1000) for d in card.differs)))
    lines.append(("Verified", text(VERIFIED.get(card.verified, card.verified))))
    cost = f"time {text(card.cost.time)}" if card.cost.time else ""
    state = f"state {text(card.cost.state)}" if card.cost.state else "cannot stream"
    lines.append(("Cost", " · ".join(filter(None, (cost, state)))))
    terms = "".join(f"<dt>{word}</dt><dd>{value}</dd>" for word, value in lines)
    return f"<p>{text(card.gist)}</p><pre>{text(card.equation, 2000)}</pre><dl>{terms}</dl>"


def _source(paper: Any) -> str:
    url, title = paper.url or "", text(paper.title)
    if url.startswith("https://"):
        shown = f'<a href="{text(url)}" rel="noreferrer">{title}</a>'
    else:
        shown = f"<cite>{title}</cite>"
    equations = f" ({text(paper.read)})" if paper.read else ""
    return f"{shown}. {text(paper.authors)}, {text(paper.year)}, {text(paper.ref)}{equations}"

"""What a comparison says of its ranking, in sentences: the same ones in the terminal and in the report."""

import math

from regard.bench.report.groups import Group, Row
from regard.bench.report.text import listing, plural
from regard.bench.report.verdict import HORIZON, LEVEL, Pair, Verdict, verdict


def sentences(group: Group) -> list[str]:
    """The answer first, then what it rests on and what it does not tell."""
    where = f" on {group.title}"
    count = len({row.mechanism for row in group.rows})
    if not group.ranked:
        return [f"{plural(count, 'mechanism')} compared{where}; none finished with a usable result."]
    best = group.ranked[0]
    found = verdict(group)
    if found is None:
        lead = f"{best.label} reaches {_reached(group, best)} on held-out data{where} ({_seeds(best)})."
        alone = "No other mechanism finished, so there is nothing to compare it with."
        return [lead, alone] if count > 1 else [lead]
    place = "ahead" if found.early else "best"
    lead = f"Of {plural(count, 'mechanism')}{where}, {best.label} is {place} on held-out data: "
    lead += f"{_reached(group, best)} ({_seeds(best)})."
    return [f"Still improving: this ranks early training. {lead}" if found.early else lead, *_reasons(group, found)]


def _reasons(group: Group, found: Verdict) -> list[str]:
    """Whom the best is told apart from, whom it is not, and by which test."""
    metric, said = group.metric, []
    if found.early:
        next_row, pair = found.pairs[0]
        said.append(
            f"Its training loss still falls by {found.falls:.3f} {metric.loss} with each doubling of the steps, and "
            f"its lead in it over {next_row.label} is {pair.gap:.3f}: other steps may give another order."
        )
    apart, here, close, alone = [], [], [], []
    for row, pair in found.pairs:
        by = f"{row.label} ({metric.number(pair.lead)}{' points' * metric.percent}"
        if pair.p is None:
            alone.append(row.label)
        elif not pair.carried:
            close.append(f"{by}, p = {pair.p:.2g})")
        elif pair.apart:
            apart.append(f"{by})")
        else:
            here.append(f"{by}; {_why(pair)})")
    if apart:
        said.append(f"It is told apart from {listing(apart)}.")
    if here:
        said.append(f"After these steps, and perhaps only then, it is ahead of {listing(here)}.")
    if close:
        said.append(f"It is not told apart from {listing(close)}: the paired differences over seeds do not carry it.")
    if alone:
        said.append(f"Nothing is known of chance for {listing(alone)}: fewer than two seeds in common.")
    if len(alone) < len(found.pairs):
        said.append(
            f"Told apart means: a paired t-test over seeds gives p < {LEVEL} with Holm's correction, the lead in "
            "training loss is more than either loss falls with a doubling of the steps, and at its pace it is there "
            f"at {HORIZON} times the steps."
        )
    return said


def _why(pair: Pair) -> str:
    """Why a lead that the seeds carry tells nothing of other steps."""
    if math.isnan(pair.gap):
        return "too few steps to see whether it lasts"
    if pair.gap <= 0:
        return "no lead in training loss"
    if pair.lasts <= HORIZON:
        return f"at its pace gone at {pair.lasts:.1f} times the steps"
    return "less than a doubling of the steps brings"


def _seeds(row: Row) -> str:
    count = len(row.done)
    return "one seed" if count == 1 else f"{count} seeds"


def _reached(group: Group, row: Row) -> str:
    metric = group.metric
    at = "" if group.main == metric.main else f" at {group.main}"
    stat = row.heldout[group.main]
    reached = (
        metric.write(stat.mean) if stat.spread is None else f"{metric.number(stat.mean)} ± {metric.write(stat.spread)}"
    )
    return f"{reached} {metric.name}{at}"

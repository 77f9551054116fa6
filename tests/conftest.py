"""What holds for every test: one thread, fixed seeds, no TF32, poisoned memory, the count of exceptions."""

import gc
import os
import signal
from collections import defaultdict

import pytest
import torch

import regard

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs beside them deaf to it
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels on the CPU; read when triton is first imported


@pytest.fixture(autouse=True, scope="module")
def swept():
    """What stands when a file's tests begin is not looked through again by each garbage collection: of the millions of
    objects that the collected tests, torch and its compiler keep, every pass over all takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """Uninitialised floats are NaN, so that code which forgets to fill them is caught (L41)."""

    # torch.device as a context knows torch's own functions by identity, and looks at them when it is first used.
    with torch.device("cpu"):
        torch.empty(0)

    def poison(make):
        def poisoned(*args, **kwargs):
            made = make(*args, **kwargs)
            if isinstance(made, torch.Tensor) and made.is_floating_point() and not made.is_meta:
                with torch.no_grad():
                    made.fill_(float("nan"))
            return made

        return poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poison(getattr(owner, name)))
        yield


# --- laws: which are run over which cards, how many cells are excepted, and what they took -----------------------


def pytest_addoption(parser):
    parser.addoption("--card", action="append", default=[], metavar="NAME", help="only tests of this card's laws")
    parser.addoption("--law", action="append", default=[], metavar="ID", help="only this law, by id or name")


@pytest.fixture
def laws(request):
    """The laws that are asked for."""
    from regard.laws import LAWS
    from regard.laws.checking import chosen

    asked = request.config.getoption("law")
    return chosen(asked, long=True) if asked else list(LAWS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """With --card, what is parametrised over cards runs for those alone, slow or not, and nothing else does."""
    if cards := set(config.getoption("card")):
        if unknown := cards - set(regard.mechanisms()):
            raise pytest.UsageError(f"unknown cards {sorted(unknown)}; `regard list` shows all")
        config.option.markexpr = ""
        items[:] = [item for item in items if _card(item) in cards]


def _card(item):
    return getattr(getattr(item, "callspec", None), "params", {}).get("name")


def _cells(reporter):
    """(card, law id, law name, outcome, seconds) of all laws that were looked at."""
    reports = (r for outcome in ("passed", "failed") for r in reporter.stats.get(outcome, []))
    return [cell for r in reports for key, cell in getattr(r, "user_properties", ()) if key == "law"]


def _reason(card, id, name):
    from regard.laws import of

    return of(card).reason(id, name)


def _stale(cells):
    """(card, what it is excepted from) that no cell needs."""
    outcomes = defaultdict(set)
    for card, id, name, outcome, _ in cells:
        for key in {id, f"{id} {name}"} & regard.card(card).exceptions.keys():
            outcomes[card, key].add(outcome)
    return {key for key, found in outcomes.items() if found == {"holds"}}


def pytest_terminal_summary(terminalreporter):
    cells = _cells(terminalreporter)
    if not cells:
        return
    from regard.laws import LAWS

    weights = {law.name: law.weight for law in LAWS}
    write, took = terminalreporter.write_line, defaultdict(float)
    for _, id, name, _, seconds in cells:
        took[f"{id} {name}"] += seconds
    excepted = sorted({tuple(cell[:3]) for cell in cells if cell[3] == "excepted"})
    out, cards, spent = sum(c[3] == "excepted" for c in cells), len({c[0] for c in cells}), defaultdict(dict)
    for card, _, name, _, seconds in cells:
        spent[weights[name]][card] = spent[weights[name]].get(card, 0) + seconds
    terminalreporter.section("laws")
    write(f"{len(cells)} cells of {cards} cards, {out} excepted ({100 * out / len(cells):.1f} %)")
    for weight, each in spent.items():
        total = sum(each.values())
        write(f"{weight} laws: {total:.0f} s of CPU, {total / len(each):.2f} s for each of {len(each)} cards; most by")
        most = [(seconds, name) for name, seconds in took.items() if weights[name.split()[1]] == weight]
        for seconds, name in sorted(most, reverse=True)[:5]:
            write(f"  {seconds:6.1f} s  {name}")
    for card, id, name in excepted:
        write(f"  {card} is excepted from {id} {name}: {_reason(card, id, name)}")
    for card, key in sorted(_stale(cells)):
        write(f"  {card} is excepted from {key} without need: every cell passed")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Exceptions are strict: one that no cell needs fails a full run of the laws."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    options = session.config.option
    if exitstatus or reporter is None or options.keyword or options.law or hasattr(session.config, "workerinput"):
        return
    if options.markexpr == "slow or not slow" and _stale(_cells(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

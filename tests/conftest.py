"""What holds for every test: one thread, fixed seeds, no TF32, poisoned memory, the count of exceptions."""

import os
from collections import defaultdict

import pytest
import torch

import regard

torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels on the CPU; read when triton is first imported


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


# --- laws: which cells are excepted, and how many -----------------------------------------------------------


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "law(id): a law of the suite; a card may except itself from it by id, with a reason"
    )


def pytest_collection_modifyitems(items):
    """An excepted cell still runs, and is expected to fail; the summary names exceptions that none needs."""
    for item in items:
        marker, call = item.get_closest_marker("law"), getattr(item, "callspec", None)
        name = None if call is None else call.params.get("name")
        if marker is None or not isinstance(name, str):  # no card at all may be concerned
            continue
        law = marker.args[0]
        item.user_properties.append(("law", f"{name} {law}"))
        if reason := excepted(name, law):
            item.add_marker(pytest.mark.xfail(reason=f"{name} is excepted from {law}: {reason}", strict=False))


def excepted(name: str, law: str) -> str:
    """The reason why the card of that name is excepted from the law; '' if it is not."""
    return regard.card(name).exceptions.get(law, "")


def _cells(reporter):
    """(card and law) -> outcomes of its cells."""
    cells = defaultdict(list)
    for outcome in ("passed", "failed", "skipped", "xfailed", "xpassed", "error"):
        for report in reporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", ()):
                if key == "law":
                    cells[value].append(outcome)
    return cells


def pytest_terminal_summary(terminalreporter):
    cells = _cells(terminalreporter)
    if not cells:
        return
    excused = {cell: outcomes for cell, outcomes in cells.items() if excepted(*cell.split())}
    total, out = sum(map(len, cells.values())), sum(map(len, excused.values()))
    terminalreporter.section("laws")
    terminalreporter.write_line(f"laws: {total} cells, {out} excepted ({100 * out / total:.1f}%)")
    for cell, outcomes in sorted(excused.items()):
        stale = "  <- no longer needed: every cell passed" if set(outcomes) == {"xpassed"} else ""
        terminalreporter.write_line(f"  {cell}: {excepted(*cell.split())}{stale}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Exceptions are strict: one that no cell needs fails a full run of the laws."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    options = session.config.option
    if exitstatus or reporter is None or options.keyword or options.markexpr or hasattr(session.config, "workerinput"):
        return
    if any("::" in arg or arg.endswith(".py") for arg in session.config.args):
        return
    if any(set(o) == {"xpassed"} for o in _cells(reporter).values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

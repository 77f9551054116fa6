"""`regard check` finds what is wrong with somebody's own attention, by the right law, and nothing in a right one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import regard
from laws import own
from regard.laws import Broken, Law, Subject, suite
from regard.laws.checking import look
from regard.laws.foreign import subject

FREE = {"position_free", "shift_invariant", "normalised", "nonnegative", "linear_in_values"}
BUGS = {
    own.LooksAhead: "L4",
    own.LooksAheadLate: "L4",
    own.FiniteFill: "L8",
    own.Detached: "L23",
    own.InSingle: "L2",
    own.NoMaximum: "L25",
    own.BatchStatistics: "L10",
    own.ReadsPositions: "L12",
    own.NormOverPadding: "L5",
}


def test_a_right_module_holds() -> None:
    report = regard.check(own.Right, traits=FREE)
    assert report.ok, report
    assert sum(f.outcome == "holds" for f in report.findings) > 30
    assert {"causal", "bidirectional", "padding", "mask", "cross"} <= set(report.supports)
    assert all(f.why for f in report.findings if f.outcome == "does not apply")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_what_is_wrong_is_found_by_the_right_law(bug: type[nn.Module]) -> None:
    (found,) = {f.law.id for f in regard.check(bug, traits=FREE, laws=[BUGS[bug]]).failures}
    assert found == BUGS[bug]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_few_other_laws_are_broken_by_it(bug: type[nn.Module]) -> None:
    """A report that names everything names nothing."""
    failing = {f.law.name for f in regard.check(bug, traits=FREE).failures}
    assert 1 <= len(failing) <= 15, sorted(failing)


def test_a_function() -> None:
    report = regard.check(own.attend, traits=FREE)
    assert report.ok, report
    assert any(f.law.name == "scale" and "scale" in f.why for f in report.findings)


def test_a_built_module() -> None:
    assert regard.check(own.Right(24, 6), laws=["L3", "L10", "L31"]).ok


def fails_from_five_tokens_on(s: Subject) -> None:
    """Holds for fewer than five tokens."""
    if s.length >= 5:
        raise Broken(f"{s.length} tokens")


def test_the_smallest_input_is_found() -> None:
    made = subject(own.Right)
    finding = look(Law("L0", "five", "", lambda s: "", fails_from_five_tokens_on), made)
    assert finding.outcome == "fails"
    assert finding.sizes == {"B": 1, "T": 5, "M": 24, "H": 1}
    assert finding.why == "5 tokens"


def test_nothing_of_the_caller_is_moved() -> None:
    before = torch.get_rng_state()
    regard.check(own.Right, laws=["L10"])
    assert torch.equal(torch.get_rng_state(), before)


test_as_a_suite = suite(own.Right, traits=FREE, laws=["L3", "L4", "L5", "L8", "L10", "L12"])


@pytest.mark.parametrize(
    ("thing", "claims", "words"),
    [
        ("torch.nn:Nothing", {}, "can't be found"),
        ("nothing", {}, "unknown mechanism"),
        (nn.Bilinear, {}, "needs"),
        (3, {}, "wrong type"),
        (own.Right, {"supports": ["causl"]}, "causal"),
        (own.Right, {"traits": ["free"]}, "unknown"),
        (own.Right, {"protocol": "Mixer"}, "TokenMixer"),
        (own.Right, {"laws": ["L999"]}, "L999"),
        (own.Right, {"dim": 0}, "dim"),
        (torch.nn.functional.scaled_dot_product_attention, {}, "signature"),
        (lambda dim, num_heads, causal: 3, {}, "made a int"),
    ],
)
def test_what_cannot_be_checked_is_said_at_once(thing, claims, words) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        regard.check(thing, **claims)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "regard", "check", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "COLUMNS": "80"},
        timeout=120,
    )


def test_the_command() -> None:
    done = command("own:LooksAhead", "--law", "L4,L10", "--json")
    assert done.returncode == 1, done.stderr
    found = {one["law"]: one for one in json.loads(done.stdout)["laws"]}
    assert found["L4"]["outcome"] == "fails"
    assert found["L4"]["sizes"]["T"] < 12
    assert found["L10"]["outcome"] == "holds"
    done = command("own:Right", "--law", "L4,L12", "--traits", "position_free")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.splitlines()[-1].startswith("own:Right: 3 holds")
    done = command("own:Rihgt")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1

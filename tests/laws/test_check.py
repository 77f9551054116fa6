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


NOW = (own.LooksAhead, own.FiniteFill, own.NormOverPadding)


@pytest.mark.parametrize(
    "bug", [b if b in NOW else pytest.param(b, marks=pytest.mark.slow) for b in BUGS], ids=lambda bug: bug.__name__
)
def test_what_is_wrong_is_found_by_the_right_law_and_few_others(bug: type[nn.Module]) -> None:
    """A report that names everything names nothing."""
    failures = regard.check(bug, traits=FREE).failures
    assert BUGS[bug] in {f.law.id for f in failures}
    assert len({f.law.name for f in failures}) <= 15, [f.law.name for f in failures]


def test_a_function() -> None:
    report = regard.check(own.attend, traits=FREE)
    assert report.ok, report
    assert any(f.law.name == "scale" and "scale" in f.why for f in report.findings)


@pytest.mark.parametrize("causal", [False, True])
def test_a_built_module(causal: bool) -> None:
    """With the sizes and the causality that it was built with."""
    report = regard.check(own.Right(24, 6, causal=causal))
    assert report.ok, report
    assert ("causal" in report.supports) == causal


def test_what_a_built_module_forgets_is_found() -> None:
    class Forgets(own.Right):
        def allowed(self, x, source, mask):
            return torch.ones(x.shape[0], 1, x.shape[1], source.shape[1], dtype=torch.bool)

    assert {"L4"} <= {f.law.id for f in regard.check(Forgets(24, 6, causal=True), laws=["L4"]).failures}


def test_a_stream() -> None:
    """It is seen that it streams, and right and wrong streams are told apart."""
    assert regard.check(own.Running, laws=["L0", "L18", "L19", "L21"]).ok
    assert "streaming" in regard.check(own.Running, laws=["L18"]).supports
    assert not regard.check(own.RunningForgets, laws=["L18"]).ok


def test_arguments_that_are_no_context_get_none() -> None:
    class WithSwitch(own.Right):
        def forward(self, x, need_weights=False, mask=None):
            return super().forward(x, mask=mask), need_weights

    assert regard.check(WithSwitch, laws=["L0"]).ok


def test_causality_beside_a_mask() -> None:
    """A function that forgets one for the other is caught; one that is causal by default is told when not to be."""

    def forgets(q, k, v, mask=None, causal=False):
        return own.attend(q, k, v, mask, causal and mask is None)

    def by_default(q, k, v, mask=None, causal=True):
        return own.attend(q, k, v, mask, causal)

    assert {"L49"} == {f.law.id for f in regard.check(forgets, laws=["L49"]).failures}
    assert regard.check(by_default, traits=FREE, laws=["L3", "L12", "L17"]).ok


def test_causal_without_being_told() -> None:
    """What sees no later token when it is built plainly is held to that."""

    class Always(nn.Module):
        def __init__(self, dim, num_heads):
            super().__init__()
            self.inner_ = own.Right(dim, num_heads, causal=True)

        def forward(self, x):
            return self.inner_(x)

    report = regard.check(Always, laws=["L3", "L4", "L6"])
    assert report.ok
    assert report.supports == ("causal",)


def test_exceptions_are_said() -> None:
    """Also as an attribute of the class."""

    class Knows(own.LooksAhead):
        exceptions = {"L4": "one token ahead by design"}

    outcomes = {f.outcome for f in regard.check(Knows, laws=["L4"]).findings}
    assert outcomes == {"excepted"}
    with pytest.raises(ValueError, match="L999"):
        suite(own.Right, laws=["L999"])


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
        ("nothing", {}, "mechanism is unknown"),
        (nn.Bilinear, {}, "needs"),
        (3, {}, "wrong type"),
        (own.Right, {"supports": ["causl"]}, "causal"),
        (own.Right, {"traits": ["free"]}, "unknown"),
        (own.Right, {"protocol": "Mixer"}, "TokenMixer"),
        (own.Right, {"laws": ["L999"]}, "L999"),
        (own.Right, {"dim": 0}, "dim"),
        (torch.nn.functional.scaled_dot_product_attention, {}, "signature"),
        (lambda dim, num_heads, causal: 3, {}, "made a int"),
        ("softmax", {"traits": ["normalised"]}, "card"),
        (own.Right(24, 6), {"options": {"bias": True}}, "built"),
        (nn.MultiheadAttention, {"dim": 32}, "can't be built"),
        (nn.TransformerDecoderLayer, {"options": {"dim_feedforward": 8}}, "can't be called"),
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
    assert done.stdout.splitlines()[-1].startswith("own:Right: 4 holds")
    done = command("own:Rihgt")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1

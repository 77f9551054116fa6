"""L60: a mechanism that is not what it claims is refused at the cell's own length, and another by name is named."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from regard import card, tasks
from regard.bench.closing import closing_lines
from regard.bench.compare import execute, run
from regard.bench.config import CompareConfig, validate
from regard.bench.faults import reason
from regard.bench.match import sizes
from regard.bench.probing import Refused, another, calls, exceptions, modes, refuse_what_breaks_laws, said
from regard.bench.worker import work
from regard.laws import probe
from regard.models.mixer import parse

CPU = torch.device("cpu")
WINDOW = card("window").options["window"]


@pytest.fixture(autouse=True)
def found(monkeypatch, request):
    monkeypatch.syspath_prepend(request.path.parent)


def cell(mechanism, task="mqar(pairs=(1, 2), vocab=8, heldout=8)", **options):
    """The task, the mechanism, and the model that is trained."""
    spec = parse(task, "task")
    task, mechanism = tasks.make(spec.name, spec.options | options), parse(mechanism)
    size = replace(sizes(task), dim=16, heads=2, depth=1, mlp_dim=8)
    torch.manual_seed(0)
    return task.model(mechanism, size), task, mechanism


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "Peeks",
            r"^L4: the future changes nothing: before training, of 64 tokens, those up to 0 .* in eval",
        ),
        ("PeeksInTraining", r"^L4: .* in training with what comes after them"),
        (
            "ReadsTheBatch",
            r"^L10: other sequences of the batch change nothing: .* of 3 examples .* in training",
        ),
        ("Forgets", r"^L28: the same inputs give the same outputs: .*a second call"),
    ],
)
def test_what_breaks_a_law_is_refused_with_its_place(name, said):
    with pytest.raises(Refused, match=said) as caught:
        refuse_what_breaks_laws(*cell(f"stubs:{name}"), CPU, "before training")
    assert "stubs.py:" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Good", "ByFourier", "Diverges"])
def test_what_breaks_none_is_not(name):
    assert refuse_what_breaks_laws(*cell(f"stubs:{name}"), CPU, "before training") == []


def test_fourier_transforms_differ_by_rounding_so_float64_decides():
    (call,) = calls(*cell("stubs:ByFourier")[:2], CPU)
    future = call.given[0].clone()
    future[:, 3:] *= 100
    got, want = probe.output(replace(call, given=(future,)), "eval"), probe.output(call, "eval")
    assert probe.apart(got[:, :3], want[:, :3]) > 0


@pytest.mark.parametrize("mechanism", ["softmax", "alibi", "performer", "mega", "lightning", "gss", "window", "moba"])
def test_mechanisms_of_the_catalogue_pass(mechanism):
    assert refuse_what_breaks_laws(*cell(mechanism), CPU, "before training") == []


@pytest.mark.parametrize("task", ["digits", "nodes", "boxes", "imputation"])
def test_every_kind_of_task_is_probed(task):
    model, task, _ = cell(tasks.find(task).baseline, task)
    refuse_what_breaks_laws(model, task, parse(task.baseline), CPU, "before training")
    assert len(calls(model, task, CPU)) == len(model.mixers)


def test_an_exception_is_said():
    (note,) = refuse_what_breaks_laws(*cell("routing_transformer"), CPU, "before training")
    assert note.startswith("L4 (the future changes nothing) is not asked for: ")


def test_an_exception_from_training_is_none_from_eval():
    excepted = exceptions(parse("attention_gate"))
    (note,) = (said(law, why) for law, why in excepted.items())
    assert note.startswith("L10 (other sequences of the batch change nothing) is not asked for in training: ")
    assert modes("L10", excepted) == ["eval"]
    assert modes("L4", excepted) == ["eval", "training"]


def test_probing_leaves_nothing_behind():
    model, task, mechanism = cell("routing_transformer")
    model.train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    refuse_what_breaks_laws(model, task, mechanism, CPU, "before training")
    another(model, task, mechanism, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("mechanism", "said"),
    [
        ("window", f"window is softmax at 8 tokens: window = {WINDOW}"),
        ("window(window=8)", "window(window=8) is softmax at 8 tokens"),
        ("window(window=4)", ""),
        ("moba", "moba is softmax at 8 tokens: "),
        ("softmax", ""),
        ("alibi", ""),
        ("ssa", ""),  # in eval alone
        ("kerple", ""),
        ("stubs:Good", ""),
    ],
)
def test_another_mechanism_is_named(mechanism, said):
    got = another(*cell(mechanism, length=8), CPU)
    assert got.startswith(said)
    assert bool(got) == bool(said)


# --- in a comparison


@pytest.fixture
def config(tmp_path):
    task = "mqar(pairs=(1, 2), vocab=8, heldout=8)"
    sizes = {"steps": 3, "batch": 4, "length": 8, "dim": 16, "depth": 1, "heads": 2, "threads": 1}
    return CompareConfig(task=task, seeds=(0,), lr=1e-2, out=tmp_path / "run", **sizes)


def test_what_is_another_is_said_before_the_run(config):
    checked = validate(replace(config, mechanisms=("softmax", "window")))
    assert [said.partition(":")[0] for said in checked.others] == ["window is softmax at 8 tokens"]


def test_a_peek_is_refused_before_training_and_a_late_one_after_it(config):
    steps = []

    def train(job, **how):  # as a worker does, but here
        if "speeds" in job or "build" in job:
            return {"result": {}}
        try:
            return {"result": work(job, lambda step, loss: steps.append(job["cell"]["mechanism"]))}
        except Refused as refused:
            return {"failed": reason(refused)}
        finally:
            torch.set_flush_denormal(False)

    asked = replace(config, mechanisms=("stubs:Peeks", "stubs:PeeksLate", "window"))
    outcome = execute(asked, train=train)
    early, late, fine = outcome.results
    assert [r.refused for r in outcome.results] == [True, True, False]
    assert ", of 8 tokens" in early.reason
    assert "before training" in early.reason
    assert "after training" in late.reason
    assert "stubs.py:" in late.reason
    assert steps == ["stubs:PeeksLate"] * 3 + ["window"] * 3
    assert fine.notes[0] == f"window is softmax at 8 tokens: window = {WINDOW}"
    assert outcome.exit_code == 3
    assert any(line.startswith("refused: stubs:Peeks seed 0: L4: ") for line in closing_lines(asked, outcome, ""))


@pytest.mark.slow
def test_the_report_shows_it_refused_and_does_not_rank_it(config):
    pytest.importorskip("plotly")
    out = io.StringIO()
    run(replace(config, mechanisms=("stubs:Peeks", "window")), console=Console(file=out, width=200))
    assert "REFUSED: L4: the future changes nothing" in out.getvalue()
    assert "note: window is softmax at 8 tokens" in out.getvalue()
    page = (config.out / "report.html").read_text()
    assert "1 of 1 run refused" in page
    assert "<strong>stubs:Peeks</strong> (seed 0) is refused: L4: the future changes nothing" in page
    assert "Traceback" not in page, "the law's words say more than where they were said"
    assert "window is softmax at 8 tokens" in page

"""Comparisons of models whose layers differ, from the refusal to the report."""

import io
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from regard import tasks
from regard.bench import cells
from regard.bench.closing import table
from regard.bench.compare import execute, run
from regard.bench.config import CompareConfig, CompareError, validate
from regard.bench.decoding import state_after
from regard.bench.fitting import why_not
from regard.bench.generate import generate
from regard.bench.match import TOLERANCE, cost, matched, sizes
from regard.bench.probing import another, refuse_what_breaks_laws
from regard.bench.profile import Profile, ProfileError
from regard.bench.profile import run as profiled
from regard.bench.record import Cell, Result
from regard.bench.store import read
from regard.models.mixer import build, layers, parse, parse_stack

HERE = Path(__file__).parent
CPU = torch.device("cpu")
HYBRID = "linear*1+softmax*1"


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def config(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("a text that nobody wrote, line by line\n" * 100)
    sizes = {"steps": 2, "batch": 2, "length": 8, "dim": 8, "depth": 2, "heads": 2}
    return CompareConfig(
        mechanisms=("softmax", HYBRID), text=(book,), seeds=(0,), out=tmp_path / "run", threads=1, **sizes
    )


def mqar(**options):
    return tasks.make("mqar", {"pairs": (1, 2), "vocab": 8, "heldout": 8, **options})


# --- what cannot be done


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"mechanisms": ["linear*3+softmax"]},
            r"linear\*3\+softmax does not fit the task text: linear\*3\+softmax: depth is less than the 4 layers of "
            r"the pattern \(got 2\); expected an int >= 4",
        ),
        ({"mechanisms": ["stubs:Good*2+softmax"]}, r"depth is less than the 3 layers of the pattern"),
        ({"mechanisms": ["linear*1+softmaxx"]}, r"mechanism is unknown \(got 'softmaxx'\).*did you mean"),
        ({"mechanisms": ["linear*x"]}, r"at character 8: 'x' is no number of layers"),
        ({"mechanisms": ["(window(widnow=3)+rotary)*1+linear"]}, r"widnow.*did you mean 'window'"),
        ({"mechanisms": ["linear*1+etc*1"]}, r"linear\*1\+etc\*1 does not fit the task text: etc: cannot be causal"),
        ({"mechanisms": ["linear*1+gatv2*1"]}, r"gatv2: a GraphMixer; text takes TokenMixers"),
        ({"mechanisms": ["linear*1+nowhere:Mixer"]}, r"nowhere"),
        ({"mechanisms": ["stubs:Good*1+etc*1"]}, r"etc: cannot be causal"),
        (
            {"task": "digits", "text": (), "length": None, "mechanisms": ["softmax*1+efficient_probing*1"]},
            r"efficient_probing stands behind the layers, once, and is none of them",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(config, change, said):
    with pytest.raises(CompareError, match=said) as caught:
        validate(replace(config, **change), lambda job, **rest: {"result": {}})
    assert "\n" not in str(caught.value)


def test_a_profile_takes_one_layer(tmp_path):
    with pytest.raises(ProfileError, match=r"several layers, and a profile measures one; name each: linear,softmax"):
        profiled(Profile(mechanisms=("linear*3+softmax",), out=tmp_path))


def test_an_own_mechanism_in_a_pattern_is_built_elsewhere_first(config):
    from regard.bench.process import answer

    with pytest.raises(CompareError, match=r"ended by SIGSEGV \(faulty.py, line"):
        validate(replace(config, mechanisms=('stubs:Faulty(fault="segfaults")*1+softmax',)), answer)


# --- what decides a cell


def test_cells_of_a_pattern_have_one_name_however_it_is_written(config):
    names = ("linear*1+softmax", "linear * 1 + (softmax)*1", HYBRID, "softmax*1+linear", "softmax")
    planned = cells.plan(validate(replace(config, mechanisms=names)))
    assert [cell.mechanism for cell in planned] == [HYBRID, "softmax*1+linear*1", "softmax"]
    assert len({cell.key for cell in planned}) == 3


def test_cells_of_one_mechanism_keep_their_keys():
    cell = Cell("text", "window(window=64)+rotary", 1, {"steps": 5, "code": "x"})
    assert cell.key == "e925a1c6f0f597ac65c6994005e4d1f96dd81040cfaf069a72b1fd6eb6544b1f"
    assert str(parse_stack(cell.mechanism)) == cell.mechanism


def test_the_code_of_every_layer_decides():
    decide = cells.deciding(mqar(), parse_stack("stubs:Good*1+linear*1+gated"))
    assert {"stubs", "regard.linear.linear", "regard.heads.gated"} < set(decide)
    found = cells.codes(mqar(), ["stubs:Good", "stubs:Good*1+linear*1", "stubs:Good*1+linear*1+gated*1"])
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("match", ["params", "flops"])
def test_the_whole_stack_is_matched(match):
    """Where layers differ in what they cost, the MLPs make up for all of them together."""
    task, size = mqar(length=32), sizes(mqar(), {"dim": 32, "depth": 3, "heads": 2})
    hybrid = parse_stack("gated*1+mega*1+softmax")
    goal = cost(task, parse("softmax"), size, match)
    made = matched(task, hybrid, size, match)
    assert abs(cost(task, hybrid, made, match) - goal) <= TOLERANCE * goal
    alone = [cost(task, kind, size, match) for kind in hybrid.kinds]
    assert cost(task, hybrid, size, match) == pytest.approx(sum(alone) / 3)
    assert len({round(one) for one in alone}) == 3


@pytest.mark.parametrize(
    ("task", "hybrid"),
    [
        ("mqar", HYBRID),
        ("retrieval", "(window(window=4)+rotary)*1+rotary*1"),
        ("copying", "linear*1+gated*1"),
        ("selective_copying", HYBRID),
        ("imputation", "softmax*1+linear*1"),
        ("nodes", "gatv2*1+supergat*1"),
        ("digits", "softmax*1+polarized*1"),
        ("boxes", "softmax*1+deformable*1"),
    ],
)
def test_every_task_with_layers_takes_a_pattern(task, hybrid):
    task = tasks.make(task)
    size = replace(sizes(task), depth=3)
    assert why_not(task, parse_stack(hybrid), size) == []
    torch.manual_seed(0)
    names = [type(mixer).__name__ for mixer in task.model(parse_stack(hybrid), size).mixers]
    assert names[0] == names[2]
    plain = [type(task.model(kind, size).mixers[0]).__name__ for kind in parse_stack(hybrid).kinds]
    assert names[:2] == plain


# --- laws, and what is said


def test_each_layer_is_asked_for_the_laws_that_are_its_own(config):
    """An exception of one layer's card excuses no other layer."""
    task, size = mqar(length=64), replace(sizes(mqar()), dim=16, heads=2, depth=2, mlp_dim=8)
    excused = parse_stack("performer*1+stubs:Peeks*1")
    with pytest.raises(ValueError, match=r"^L4: the future changes nothing: .*stubs.py"):
        refuse_what_breaks_laws(task.model(excused, size), task, excused, CPU, "before training")


def test_a_layer_that_is_another_mechanism_is_named():
    task, size = mqar(length=64), replace(sizes(mqar()), dim=16, heads=2, depth=2, mlp_dim=8)
    hybrid = parse_stack("window(window=64)*1+linear")
    said = another(task.model(hybrid, size), task, hybrid, CPU)
    assert said == "window(window=64) in window(window=64)*1+linear*1 is softmax at 64 tokens"
    hybrid = parse_stack("window(window=8)*1+softmax")
    assert another(task.model(hybrid, size), task, hybrid, CPU) == ""


def test_a_cut_pattern_is_told(config):
    checked = validate(replace(config, depth=3, mechanisms=(HYBRID, "softmax")))
    assert checked.others == [f"{HYBRID} is cut at 3 layers, which are linear*1+softmax*1+linear*1"]


def test_state_is_that_of_all_layers_and_none_where_one_cannot_stream():
    each = [build(parse(name), 16, 2) for name in ("linear", "softmax")]
    both = layers(HYBRID, dim=16, num_heads=2, depth=2, causal=True)
    assert state_after(both, 16, 9, CPU) == sum(state_after([one], 16, 9, CPU) for one in each)
    no_stream = build(parse("stubs:Short"), 16, 2)
    assert state_after([*both, no_stream], 16, 9, CPU) == 0


# --- what is shown


def shown(names, width):
    made = {"train_tokens_per_second": 51_700.0, "peak_memory_bytes": 10**8, "parameters": 427_264, "state_bytes": 4000}
    results = [Result(Cell("text", name, 0), "done", heldout={"1x": 3.0 + n}, **made) for n, name in enumerate(names)]
    return str(table(results, width)).splitlines()


def test_long_names_that_begin_alike_stay_apart_at_80_columns():
    local = "(window(window={})+rotary)*5+rotary"
    heading, one, two, *_ = shown([local.format(16), local.format(64)], 80)
    assert max(map(len, (heading, one, two))) <= 80
    assert "window=16" in one
    assert "window=64" in two


def test_names_that_differ_only_far_behind_are_numbered_and_told_in_full():
    names = [f"(window(window=64)+rotary(base=10000))*5+rotary(base={base})" for base in (1000, 2000)]
    heading, one, two, *rest = shown(names, 80)
    assert max(map(len, (heading, one, two, *rest))) <= 80
    assert one.startswith("1 (window(")
    assert two.startswith("2 (window(")
    assert "…" in one
    said = " ".join(" ".join(rest).split())
    assert all(f"{n} {name}" in said for n, name in enumerate(names, 1))


# --- in real workers


def only_builds(job, **rest):
    assert "build" in job, "nothing is trained or timed again"
    return {"result": {}}


@pytest.mark.slow
def test_a_hybrid_is_compared_resumed_and_generates(config):
    pytest.importorskip("plotly")
    mixed = replace(config, mechanisms=("softmax", HYBRID, "stubs:Good*1+softmax"), checkpoint=True)
    out = io.StringIO()
    assert run(mixed, console=Console(file=out, width=80)) == 0
    assert max(map(len, out.getvalue().splitlines())) <= 80
    plain, hybrid, own = read(config.out)
    assert [r.cell.mechanism for r in (plain, hybrid, own)] == ["softmax", HYBRID, "stubs:Good*1+softmax*1"]
    assert abs(hybrid.parameters - plain.parameters) <= TOLERANCE * plain.parameters
    assert 0 < hybrid.state_bytes != plain.state_bytes
    assert all(r.train_tokens_per_second > 0 and r.generate_tokens_per_second > 0 for r in (plain, hybrid, own))
    page = (Path(config.out) / "report.html").read_text()
    assert f">{HYBRID}</h3>" in page
    assert "/linear.html" not in page
    assert ">linear</h4>" in page, "what the catalogue says of each layer"
    again = execute(mixed, train=only_builds)
    assert [r.cell.key for r in again.results] == [r.cell.key for r in (plain, hybrid, own)]
    drawn = list(generate(Path(config.out) / hybrid.checkpoint, "a text", count=3))
    assert len(drawn) == 3
    with pytest.raises(ValueError, match="which is no part of regard; name it as well"):
        generate(Path(config.out) / own.checkpoint, "a text", count=1)


RUN = [
    *("compare", "--task", "mqar(pairs=(1, 2), vocab=8, heldout=8)", "--seeds", "0", "--threads", "1"),
    *("--mechanisms", "linear*1+softmax,(window(window=4)+rotary)*1+softmax", "--steps", "2", "--batch", "2"),
    *("--length", "8", "--dim", "8", "--depth", "2", "--heads", "2"),
]


@pytest.mark.slow
def test_a_run_of_hybrids_that_is_killed_goes_on(tmp_path):
    command = [sys.executable, "-m", "regard", *RUN, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        while "[1/2]" not in job.stdout.readline():
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
    first = read(tmp_path / "run")
    assert first[0].cell.mechanism == HYBRID
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = read(tmp_path / "run")
    assert [r.cell.mechanism for r in results] == [HYBRID, "(window(window=4)+rotary)*1+softmax*1"]
    assert results[0].curve == first[0].curve
    assert "of 2 cells are in" in done.stdout

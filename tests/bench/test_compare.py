"""The whole job: refusals before work, a row a cell, resuming after anything, failures that stop nothing."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from regard import mechanisms
from regard.bench import cells, compare, machine
from regard.bench.closing import closing_lines, table
from regard.bench.compare import execute, run
from regard.bench.config import CompareConfig, CompareError, validate
from regard.bench.events import Finished, Planned, Started, Stepped, Timed
from regard.bench.process import answer
from regard.bench.record import Cell, Result
from regard.bench.store import read

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def config(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("a text that nobody wrote, line by line\n" * 100)
    return CompareConfig(
        mechanisms=("softmax", "alibi"),
        text=(book,),
        seeds=(0, 1),
        steps=2,
        batch=2,
        length=8,
        dim=8,
        depth=1,
        heads=2,
        out=tmp_path / "run",
        threads=1,
    )


SPEED = {"train_tokens_per_second": 100.0, "train_spread": 1.0}


class Fake:
    """Trains nothing, at once, and remembers what it was asked."""

    def __init__(self, **answers):
        self.answers, self.asked, self.timed = answers, [], []

    def __call__(self, job, *, timeout, stop, on_step):
        cell = job["cell"]
        if "build" in job:
            return {"result": {}}
        if "speeds" in job:
            self.timed.append(job["speeds"])
            return self.answers.get("speeds", {"result": dict.fromkeys(job["speeds"], SPEED)})
        self.asked.append((cell["mechanism"], cell["seed"]))
        on_step(1, 8.0)
        loss = 3 + cell["seed"] + len(cell["mechanism"]) / 100
        done = {"result": {"status": "done", "heldout": {"1x": loss}, "checkpoint": job["checkpoint"]}}
        return self.answers.get(cell["mechanism"], done)


ALL = [("softmax", 0), ("alibi", 0), ("softmax", 1), ("alibi", 1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mechanisms": ["softmaxx", "alibi"]}, r"mechanism is unknown \(got 'softmaxx'\).*did you mean"),
        ({"mechanisms": ["window(widnow=3)"]}, r"widnow.*did you mean 'window'"),
        ({"mechanisms": ["alibi("]}, r"cannot be read \(got 'alibi\('\)"),
        ({"mechanisms": ["window(window=4)()"]}, r"cannot be read \(got 'window\(window=4\)\(\)'\)"),
        ({"mechanisms": ["window(window=4)+rotary(window=5)"]}, r"'rotary' has no such option \(got 'window'\)"),
        ({"mechanisms": ["nowhere:Mixer"]}, r"nowhere"),
        ({"mechanisms": []}, r"no mechanisms"),
        ({"heads": 3}, r"compare: heads do not divide dim = 8 \(got 3\); expected such as 1, 2, 4"),
        ({"steps": 0}, r"compare: steps is too small \(got 0\); expected an int >= 1"),
        ({"batch": 1.5}, r"compare: batch has the wrong type \(got 1.5\); expected an int"),
        ({"lr": float("nan")}, r"compare: lr is out of range \(got nan\); expected a finite number > 0"),
        ({"timeout": -1}, r"compare: timeout is out of range \(got -1\)"),
        ({"match": "param"}, r"compare: match is unknown \(got 'param'\); expected one of .*; did you mean 'params'"),
        ({"seeds": []}, r"compare: seeds are missing"),
        ({"seeds": [0, -1]}, r"compare: seeds is too small \(got -1\); expected an int >= 0"),
        ({"device": "tpu"}, r"compare: device is unknown \(got 'tpu'\); expected 'cpu', 'cuda' or"),
        ({"device": "cuda:99"}, r"compare: device is not there \(got 'cuda:99'\)"),
        ({"threads": 0}, r"compare: threads is too small \(got 0\)"),
        ({"task": "chess"}, r"task is unknown \(got 'chess'\); expected one of text, absence, boxes, copying"),
        ({"task": "mqra"}, r"task is unknown \(got 'mqra'\); .*; did you mean 'mqar'"),
        ({"task": "mqar("}, r"task cannot be read \(got 'mqar\('\); at character 6: .* expected a name"),
        (
            {"task": "mqar(pair=3)", "text": ()},
            r"task 'mqar' has no such option \(got 'pair'\); .*; did you mean 'pairs'",
        ),
        ({"task": "mqar(pairs=(1, 99))", "text": ()}, r"task mqar: length has no room for 99 pairs \(got 8\)"),
        ({"task": "mqar(vocab=2.5)", "text": ()}, r"task mqar: vocab has the wrong type \(got 2.5\)"),
        ({"task": "mqar"}, r"task mqar brings its own data; leave text out"),
        ({"task": "digits", "text": ()}, r"task 'digits' has no such option \(got 'length'\)"),
        (
            {"task": "nodes", "text": (), "length": None},
            r"softmax does not fit the task nodes: a TokenMixer; nodes",
        ),
        ({"mechanisms": ["etc"]}, r"etc does not fit the task text: cannot be causal"),
        ({"mechanisms": ["softmax(head_dim=512)"]}, r"does not fit the task text: .* cannot be matched in params"),
        ({"task": "copying", "text": (), "length": None, "checkpoint": True}, r"models of the task copying cannot be"),
        ({"text": ["/no/such/file"]}, r"/no/such/file does not exist"),
        ({"length": 10_000}, r"too short"),
        ({"out": "/proc/nowhere"}, r"output folder /proc/nowhere cannot be made"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_any_work(config, change, said):
    fake = Fake()
    with pytest.raises(CompareError, match=said) as caught:
        execute(replace(config, **change), train=fake)
    assert "\n" not in str(caught.value)
    assert fake.asked == []
    assert not (Path(config.out) / "results.db").exists()


def test_options_of_joined_names_make_cells_of_their_own(config):
    names = ("window(window=4)+rotary(base=500)", "window(window=4)+rotary(base=5)", "window(window=4)+rotary")
    found = cells.plan(validate(replace(config, mechanisms=names, seeds=(0,))))
    assert [cell.mechanism for cell in found] == list(names)
    assert len({cell.key for cell in found}) == 3


def test_events_tell_the_story(config):
    events = []
    outcome = execute(config, events.append, train=Fake())
    assert isinstance(events[0], Planned)
    assert [type(e) for e in events[1:]] == [*[Started, Stepped, Finished] * 4, Timed]
    assert [(e.cell.mechanism, e.cell.seed) for e in events if isinstance(e, Started)] == ALL
    assert [e.number for e in events if isinstance(e, Finished)] == [1, 2, 3, 4]
    assert outcome.exit_code == 0
    assert outcome.results == read(config.out)


def test_the_same_command_runs_nothing_twice(config):
    execute(config, train=Fake())
    fake, events = Fake(), []
    outcome = execute(config, events.append, train=fake)
    assert fake.asked == []
    assert len(outcome.results) == len(events[0].reused) == 4


def test_more_seeds_run_only_what_is_new(config):
    execute(replace(config, seeds=(0,)), train=Fake())
    fake = Fake()
    assert len(execute(config, train=fake).results) == 4
    assert fake.asked == ALL[2:]


def test_small_models_get_as_many_threads_as_they_can_feed(config, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    for dim, threads in ((8, 1), (64, 1), (128, 2), (1024, 4)):
        checked = validate(replace(config, threads=None, dim=dim, batch=4, length=256, text=()))
        assert cells.settings(checked)["threads"] == threads
    assert cells.settings(validate(replace(config, threads=3)))["threads"] == 3


def test_speeds_are_measured_once_for_all_that_stand_in_the_table(config):
    fake = Fake(alibi={"failed": "it broke"})
    outcome = execute(replace(config, mechanisms=("softmax", "rotary", "alibi")), train=fake)
    assert fake.timed == [["softmax", "rotary"]]
    done = [r for r in outcome.results if r.status == "done"]
    assert {r.train_tokens_per_second for r in done} == {SPEED["train_tokens_per_second"]}
    assert len({r.turns for r in done}) == 1
    assert outcome.results == read(config.out)
    execute(replace(config, mechanisms=("softmax", "rotary")), train=fake)
    assert len(fake.timed) == 1, "those two were measured with each other"
    execute(replace(config, mechanisms=("softmax", "gated")), train=fake)
    assert fake.timed[1:] == [["softmax", "gated"]]


def test_speeds_that_cannot_be_measured_are_told_and_lose_nothing(config):
    outcome = execute(config, train=Fake(speeds={"failed": "out of memory"}))
    assert outcome.exit_code == 0
    assert outcome.untimed == "out of memory"
    assert {r.turns for r in outcome.results} == {""}
    assert "speeds could not be measured: out of memory" in closing_lines(config, outcome, "")
    again = Fake()
    assert execute(config, train=again).untimed == ""
    assert (again.asked, again.timed) == ([], [["softmax", "alibi"]])


def test_a_fault_of_an_own_mechanism_takes_no_others_speeds(config):
    """Whoever's turn it was is left out, and the rest are measured again."""
    own, asked = "stubs:Good", []

    def train(job, *, on_step, **rest):
        if "speeds" not in job:
            return Fake()(job, on_step=on_step, **rest)
        asked.append(job["speeds"])
        on_step(2, len(job["speeds"]) - 1)
        return {"failed": "it broke"} if own in job["speeds"] else Fake()(job, on_step=on_step, **rest)

    outcome = execute(replace(config, mechanisms=("softmax", own)), train=train)
    assert asked == [["softmax", own], ["softmax"]]
    assert outcome.untimed == "stubs:Good: it broke"
    speeds = {(r.cell.mechanism, r.train_tokens_per_second) for r in outcome.results}
    assert speeds == {("softmax", SPEED["train_tokens_per_second"]), (own, 0.0)}


def test_own_mechanisms_are_built_elsewhere_before_any_work(config, monkeypatch):
    """A crash in a constructor is a refusal in one line; nothing of the caller's code is run here."""
    monkeypatch.delitem(sys.modules, "stubs", raising=False)
    crashing = 'stubs:Faulty(fault="segfaults")'
    with pytest.raises(CompareError) as caught:
        execute(replace(config, mechanisms=("softmax", "stubs:Good", crashing)), train=answer)
    at = next(n for n, line in enumerate((HERE / "faulty.py").read_text().splitlines(), 1) if "string_at" in line)
    said = f"stubs:Faulty(fault='segfaults'): its process was ended by SIGSEGV (faulty.py, line {at})"
    assert str(caught.value) == said
    assert "stubs" not in sys.modules
    assert not (Path(config.out) / "results.db").exists()


def test_a_stop_before_speeds_are_measured_says_so(config):
    def stopping(job, *, stop, **rest):
        if "speeds" in job:
            stop.number = 15
            return None
        return Fake()(job, stop=stop, **rest)

    outcome = execute(config, train=stopping)
    assert outcome.exit_code == 128 + 15
    assert "stopped with speeds to be measured; the same command goes on from here" in closing_lines(
        config, outcome, ""
    )


@pytest.mark.parametrize("change", [{"steps": 3}, {"lr": 0.1}, {"match": "flops"}, {"threads": 2}])
def test_rows_of_other_settings_are_kept_and_not_used(config, change):
    before = execute(config, train=Fake()).results
    fake, events = Fake(), []
    outcome = execute(replace(config, **change), events.append, train=fake)
    assert fake.asked == ALL
    assert events[0].others == 4
    assert events[0].differing == list(change)
    assert read(config.out) == before + outcome.results


def test_rows_of_other_code_and_other_text_are_not_used(config, monkeypatch):
    execute(config, train=Fake())
    Path(config.text[0]).write_text("another text that nobody wrote\n" * 100)
    monkeypatch.setattr(cells, "codes", lambda task, specs: dict.fromkeys(specs, "other"))
    events = []
    execute(config, events.append, train=Fake())
    assert set(events[0].differing) == {"bytes", "code", "fingerprint"}
    assert events[0].reused == []


def test_other_mechanisms_in_the_store_are_no_other_code(config):
    execute(config, train=Fake())
    events = []
    execute(replace(config, mechanisms=("kerple",)), events.append, train=Fake())
    assert (events[0].others, events[0].differing) == (4, [])


def test_what_an_own_mechanism_does_makes_new_cells_and_a_comment_does_not(config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    own = tmp_path / "own_mechanism.py"
    own.write_text("from stubs import Good\n")
    mine = replace(config, mechanisms=("own_mechanism:Good(width=2.0)",), seeds=(0,))
    asked = []
    for text in ("from stubs import Good\n", "from stubs import Good  # words\n", "from stubs import Good\nX = 1\n"):
        own.write_text(text)
        execute(mine, train=(fake := Fake()))
        asked.append(len(fake.asked))
    assert asked == [1, 0, 1]


def test_a_failed_cell_stops_nothing_and_is_retried_on_request(config):
    outcome = execute(config, train=Fake(softmax={"failed": "it broke"}))
    assert [r.status for r in outcome.results] == ["failed", "done", "failed", "done"]
    assert [r.reason for r in outcome.failed] == ["it broke"] * 2
    assert outcome.exit_code == 3
    execute(config, train=(again := Fake()))
    assert again.asked == []
    outcome = execute(replace(config, retry_failed=True), train=(retried := Fake()))
    assert retried.asked == [("softmax", 0), ("softmax", 1)]
    assert outcome.exit_code == 0


def test_a_full_disk_in_a_worker_ends_the_run_in_one_line(config):
    with pytest.raises(CompareError, match=r"cannot be written: the disk is full .*bytes free"):
        execute(config, train=Fake(alibi={"full": "x"}))
    assert [r.cell.mechanism for r in read(config.out)] == ["softmax"]


def test_a_missing_checkpoint_is_made_again(config):
    execute(config, train=Fake())
    execute(replace(config, checkpoint=True), train=(fake := Fake()))
    assert fake.asked == ALL
    names = [r.checkpoint for r in read(config.out)]
    assert len(set(names)) == 4
    assert all(name.startswith("checkpoints/") and ".." not in name for name in names)


# --- Tasks


@pytest.fixture
def mqar(config):
    task = "mqar(pairs=(1, 2), vocab=8, heldout=8)"
    return replace(config, task=task, text=(), mechanisms=("softmax",))


def test_a_task_brings_its_own_defaults(tmp_path):
    checked = validate(CompareConfig(task="copying", out=tmp_path, depth=1))
    its = checked.task.defaults
    assert checked.config.depth == 1
    assert (checked.config.steps, checked.config.dim, checked.config.lr) == (its.steps, its.dim, its.lr)
    assert checked.specs == list(checked.task.mechanisms())
    assert cells.plan(checked)[0].settings["symbols"] == [4, 8, 16, 32]


def test_options_of_a_task_make_other_cells(mqar):
    found = [
        cells.plan(validate(replace(mqar, task=task, seeds=(0,))))[0]
        for task in ("mqar(pairs=(1, 2))", "mqar(pairs=1)", "mqar(pairs=(1, 2), length=8)")
    ]
    assert found[0].key == found[2].key != found[1].key
    assert [cell.task for cell in found] == ["mqar"] * 3


def test_all_runs_what_fits_and_tells_what_does_not(mqar):
    events, fake = [], Fake()
    execute(replace(mqar, mechanisms=("all", "gated+rotary"), seeds=(0,)), events.append, train=fake)
    ran, planned = [mechanism for mechanism, _ in fake.asked], events[0]
    assert {"softmax", "alibi"} < set(ran)
    assert ran[-1] == "gated+rotary"
    assert planned.unfit["etc"] == "cannot be causal"
    assert not planned.unfit.keys() & set(ran)
    assert planned.unfit.keys() | set(ran) == {*mechanisms(), "gated+rotary"}


def test_the_callers_own_mechanisms_say_what_they_are(config):
    digits = replace(config, task="digits", text=(), length=None, mechanisms=("stubs:Mapped", "softmax"))
    assert validate(digits).specs == ["stubs:Mapped", "softmax"]


@pytest.mark.slow
def test_a_task_runs_in_real_workers_to_a_report_of_its_own(mqar):
    pytest.importorskip("plotly")
    out = io.StringIO()
    assert run(mqar, console=Console(file=out, width=100)) == 0
    said = out.getvalue()
    assert "1 mechanism x 2 seeds, 2 steps of 2 x 8, equal params; mqar: 1, 2 pairs of 8 symbols, generated" in said
    assert re.search(r"softmax seed 0: \d+\.\d% accuracy, ", said)
    assert re.search(r"^mechanism +accuracy +1 pairs +2 pairs +train tok/s ", said, re.MULTILINE), said
    results = read(mqar.out)
    assert all(list(r.heldout) == ["mean", "1", "2"] and r.metric.name == "accuracy" for r in results)
    page = (Path(mqar.out) / "report.html").read_text()
    assert "Accuracy by pairs" in page
    assert "% accuracy on held-out data on mqar" in page
    execute(mqar, train=(again := Fake()))
    assert again.asked == []


# --- Killed


RUN = """
import json, sys, time
from pathlib import Path
from regard.bench import cells, compare, machine
from regard.bench.config import Checked, CompareConfig
from regard.tasks.text import NextByte, Text

folder, log = Path(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
task = NextByte(text=Text("test", b"x", b"y"))
compare.validate = lambda config, ask: Checked(config, task, list(config.mechanisms))
cells.codes = lambda task, specs: dict.fromkeys(specs, "test")

def train(job, *, timeout, stop, on_step):
    cell = job["cell"]
    if "speeds" in job:
        return {"failed": "not asked here"}
    log.write(json.dumps([cell["mechanism"], cell["seed"]]) + "\\n")
    time.sleep(0.01)
    return {"result": {"status": "done", "parameters": cell["seed"]}}

config = CompareConfig(mechanisms=("a", "b"), seeds=tuple(range(100)), out=folder)
sys.exit(compare.execute(config, train=train).exit_code)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_and_repeats_nothing(tmp_path):
    draw, done = random.Random(0), set()
    for kill in range(7):
        log = tmp_path / f"log{kill}"
        with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "run"), str(log)]) as job:
            if kill < 6:
                while job.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 1 + kill % 3):
                    time.sleep(0.002)
                time.sleep(draw.random() * 0.15)
                job.kill()
        ran = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
        assert not done & set(ran), "a committed cell was run again"
        rows = [(r.cell.mechanism, r.cell.seed) for r in read(tmp_path / "run")]
        assert len(rows) == len(set(rows))
        assert done <= set(rows), "a committed row was lost"
        assert len(set(ran) - set(rows)) <= 1, "more was lost than the cell that ran"
        done = set(rows)
    assert job.returncode == 0
    assert done == {(m, seed) for m in "ab" for seed in range(100)}
    assert all(r.parameters == r.cell.seed for r in read(tmp_path / "run"))


def hanging(config, tmp_path):
    """A run in a process of its own, whose first cell has begun to hang; and the process id of that cell."""
    code = (
        "import sys; from pathlib import Path; from regard.bench.compare import *\n"
        "sys.exit(run(CompareConfig(mechanisms=['stubs:Hangs'], text=[sys.argv[1]], out=sys.argv[2], "
        "steps=2, batch=2, length=8, dim=8, depth=1, heads=2, seeds=[0], threads=1)))"
    )
    environment = {**os.environ, "STUB_PID": str(tmp_path / "pid"), "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", code, str(config.text[0]), str(config.out)]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert job.poll() is None
        time.sleep(0.05)
    return job, int((tmp_path / "pid").read_text())


def gone(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_run_with_a_hint_and_its_worker_with_it(config, tmp_path, number, code):
    job, worker = hanging(config, tmp_path)
    with job:
        job.send_signal(number)
        said, _ = job.communicate(timeout=20)
    assert job.returncode == code
    assert "stopped with 1 cell to go; the same command goes on from here" in said
    assert gone(worker, 5)
    assert read(config.out) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_worker_outlives_a_run_that_was_killed(config, tmp_path):
    job, worker = hanging(config, tmp_path)
    with job:
        job.kill()
    assert gone(worker, 10)


# --- For real


@pytest.mark.slow
def test_faults_end_their_own_cells_and_are_told(config):
    """In the store, in the terminal and in the report, beside what others found."""
    faults = {"segfaults": "SIGSEGV", "forks_and_exits": "exit code 3", "exits_by_exception": "SystemExit: 0"}
    own = [f"stubs:Faulty(fault='{fault}', at=5)" for fault in faults]
    out = io.StringIO()
    assert run(replace(config, mechanisms=(*own, "alibi"), seeds=(0,)), console=Console(file=out, width=200)) == 3
    *failed, good = read(config.out)
    assert good.status == "done"
    page = (Path(config.out) / "report.html").read_text()
    for result, (fault, said) in zip(failed, faults.items()):
        assert said in result.reason
        assert re.search(r" \(faulty.py, line \d+\)$", result.reason)
        assert f"in {fault}\n" in result.traceback
        assert result.reason in out.getvalue()
        assert said in page
        assert f"in {fault}" in page


@pytest.mark.slow
def test_real_workers_train_fail_and_continue(config):
    """Good and faulty mechanisms side by side; the loss of the good one is the same in another process."""
    mechanisms = ("stubs:Good", "stubs:Raises", "stubs:Diverges", "alibi")
    mixed = replace(config, mechanisms=mechanisms, seeds=(0,), checkpoint=True)
    out = io.StringIO()
    assert run(mixed, console=Console(file=out, width=100)) == 3
    found = {r.cell.mechanism: r for r in read(config.out)}
    assert [found[m].status for m in mechanisms] == ["done", "failed", "failed", "done"]
    at = next(n for n, line in enumerate((HERE / "stubs.py").read_text().splitlines(), 1) if "raise Runtime" in line)
    assert found["stubs:Raises"].reason == f"RuntimeError: this mechanism is broken (stubs.py, line {at})"
    assert re.search(rf'stubs.py", line {at}, in forward\n', found["stubs:Raises"].traceback)
    assert "became nan at step 1" in found["stubs:Diverges"].reason
    assert found["alibi"].environment["threads"] == "1"
    assert found["alibi"].peak_memory_bytes > 0
    assert (Path(config.out) / found["alibi"].checkpoint).is_file()
    assert "failed: stubs:Raises seed 0: RuntimeError: this mechanism is broken (stubs.py, line" in out.getvalue()
    page = (Path(config.out) / "report.html").read_text()
    assert "<summary>Traceback</summary>" in page
    assert f"stubs.py&quot;, line {at}, in forward" in page
    again = execute(replace(mixed, mechanisms=("alibi",), out=config.out / "again")).results[0]
    assert again.heldout == found["alibi"].heldout
    assert again.curve == found["alibi"].curve


# --- What is shown


def shown(results, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(table(results, width), soft_wrap=True)
    return console.file.getvalue()


def test_the_table_fits_and_marks_the_best():
    def one(mechanism, seed, loss, **fields):
        return Result(Cell("text", mechanism, seed), "done", heldout={"1x": loss, "2x": loss + 1}, **fields)

    speed = {"train_tokens_per_second": 51_700.0, "peak_memory_bytes": 10**8, "parameters": 427_264}
    text = shown(
        [
            one("window(window=64)", 0, 3.0, **speed),
            one("window(window=64)", 1, 3.2, **speed),
            one("a\x1b[31m_very_long_name_that_nobody_would_give", 0, 2.5, state_bytes=262_144),
            Result(Cell("text", "broken", 0), "failed", reason="x"),
        ]
    )
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "3.100 ±.141" in text
    assert text.index("a_very") < text.index("window") < text.index("broken"), "best first"
    assert "*2.500" in text
    assert "*3.100" not in text
    assert " 51.7k" in text, "nothing to be better than"
    assert "427k" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_table_has_a_line_a_row_at_any_width(width):
    """What matters most stays: names, the main number, speed; and what has no room is named."""
    names = ["softmax", "window(window=64)+rotary(base=500)", "performer", "mega"]
    made = {"train_tokens_per_second": 51_700.0, "peak_memory_bytes": 10**8, "parameters": 427_264, "state_bytes": 4000}
    results = [
        Result(Cell("text", name, seed), "done", heldout={"1x": 3.0 + n + seed / 100, "2x": 4.0, "4x": 5.0}, **made)
        for n, name in enumerate(names)
        for seed in (0, 1)
    ]
    heading, *rows = shown(results, width).splitlines()
    assert max(map(len, [heading, *rows])) <= width
    assert [row.split()[0][:6] for row in rows[:4]] == [name[:6] for name in names]
    assert all(re.search(r" [*~]?\d\.\d{3} ±\.007", row) for row in rows[:4])
    assert heading.split()[:3] == ["mechanism", "bits/byte", "1x"]
    missing = " ".join(rows[4:])
    headings = ["2x", "4x", "train tok/s", "peak MB", "state KB", "params"]
    assert all((name in heading) != (name in missing) for name in headings)
    assert (not missing) == (width == 200 or width == 100)


def test_a_line_a_cell_where_there_is_no_terminal(config, monkeypatch):
    monkeypatch.setattr(compare, "answer", None)
    fake = Fake(alibi={"failed": "it \x1b[31m broke"})
    monkeypatch.setattr(compare.execute, "__kwdefaults__", {"train": fake})
    console = Console(file=io.StringIO(), width=100)
    assert run(config, console=console) == 3
    lines = console.file.getvalue().splitlines()
    said = " ".join(" ".join(lines).split())
    assert said.startswith("2 mechanisms x 2 seeds, 2 steps of 2 x 8 bytes, equal params; text: ")
    assert re.search(r" read 1 file, 3,900 bytes; held out: the last 390 bytes \(10.0%\) \[1/4\]", said)
    assert next(line for line in lines if line.startswith("[1/4]")).startswith(
        "[1/4] softmax seed 0: 3.070 bits per byte"
    )
    assert "[2/4] alibi seed 0: FAILED: it broke" in lines
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in console.file.getvalue()

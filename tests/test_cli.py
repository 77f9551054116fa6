"""The command line: what it prints, how wide, and how it refuses; and that the documents are true."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from typer.testing import CliRunner

import regard
from regard import catalog, catalog_page, cli, doctor, tasks, terminal
from regard.bench.config import CompareConfig
from regard.cards import FEATURES, _registry
from regard.kernels.plan import KERNELS

ROOT = Path(__file__).parent.parent
PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "FORCE_COLOR": None, "REGARD_TRACEBACK": None}
NAMES = regard.mechanisms()
EVERY = catalog.names()


def invoke(*arguments, **environment):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={**PLAIN, **environment}, prog_name="regard")


def output(*arguments, **environment):
    result = invoke(*arguments, **environment)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def widest(text):
    return max(cell_len(line) for line in text.splitlines())


# --- list


@pytest.mark.parametrize("columns", [80, 100])
def test_list_shows_every_mechanism_within_the_terminal(columns):
    text = output("list", COLUMNS=str(columns))
    assert widest(text) <= columns
    rows = [line.split()[:5] for line in text.splitlines()]
    for name in EVERY:
        card = regard.card(name)
        kind = catalog_page.KINDS[card.protocol][0]
        assert [name, card.family, kind, catalog_page.marks(card), catalog_page.VERIFIED[card.verified]] in rows
    families = len({regard.card(name).family for name in EVERY})
    analyses = len(catalog.analyses())
    assert text.splitlines()[-1] == f"{len(NAMES)} mechanisms, {analyses} analyses, {families} families"
    assert not re.search(r"[ \t]$", text, re.MULTILINE), "no blanks at the ends of lines"


def test_list_of_a_family():
    text = output("list", "--family", "normalizers")
    shown = {line.split()[0] for line in text.splitlines() if " normalizers " in line}
    assert shown == set(regard.mechanisms("normalizers"))
    assert text.splitlines()[-1] == f"{len(shown)} mechanisms"


def test_marks_tell_what_is_supported():
    assert set(catalog_page.MARKS) == set(catalog_page.MEANING) == FEATURES
    assert len(set(catalog_page.MARKS.values())) == len(FEATURES)
    lacking = regard.Card("x", "f", "", "", regard.Paper("", "", 2000, ""), slots=dict, supports=FEATURES - {"cross"})
    assert catalog_page.marks(lacking) == "cb-pmgsdt"


def test_list_as_json():
    data = json.loads(output("list", "--json"))
    assert [card["name"] for card in data] == EVERY
    assert data[EVERY.index("alibi")]["paper"]["url"] == "https://arxiv.org/abs/2108.12409"
    assert data[EVERY.index("window")]["options"] == {"window": 128}


@pytest.mark.parametrize("task", ["mqar", "mqar(pairs=(1,), length=8)"])
def test_list_tells_what_fits_a_task_and_why_not(task):
    text = output("list", "--task", task, "--family", "mixers")
    assert widest(text) <= 100
    rows = {line.split()[0]: line.split(None, 3)[2:] for line in text.splitlines() if " mixers " in line}
    assert list(rows) == regard.mechanisms("mixers")
    assert rows["etc"] == ["no", "cannot be causal"]
    assert rows["gss"] == ["yes"]
    fit = sum(row[0] == "yes" for row in rows.values())
    assert text.splitlines()[-1] == f"{fit} of {len(rows)} mechanisms can do the task {task}"
    data = json.loads(output("list", "--task", task, "--family", "mixers", "--json"))
    assert {card["name"]: not card["why_not"] for card in data} == {n: row[0] == "yes" for n, row in rows.items()}


# --- show


@pytest.mark.parametrize("name", EVERY)
def test_show_says_what_the_card_says(name):
    card, text = regard.card(name), output("show", name)
    assert widest(text) <= 100
    words = " ".join(text.split())
    for part in (
        card.gist,
        card.equation,
        card.paper.title,
        card.paper.url or card.paper.ref,
        card.claim,
        *card.differs,
    ):
        assert " ".join(part.split()) in words
    for feature in FEATURES if name in NAMES else ():
        found = re.search(rf"^  (yes|no ) {feature} ", text, re.MULTILINE)
        assert found, feature
        assert found[1].strip() == ("yes" if feature in card.supports else "no"), feature
    for option, default in card.options.items():
        assert f"  {option} = {default!r}" in text or f"  {option} (required)" in text
    for law, why in card.exceptions.items():
        assert f"{law}: {' '.join(why.split())}" in words
    assert (card.cost.state == "") == ("it does not stream" in text)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_formulas_that_can_be_computed(name):
    card = regard.card(name)
    found = catalog_page.costs(card, card.example, batch=1, heads=8, length=1024, width=64)
    for part in ("time", "state"):
        assert found[part] is None or found[part] >= 0, f"{getattr(card.cost, part)!r}: {found[part]}"


def test_show_computes_cost_at_the_given_size():
    numbers = json.loads(output("show", "alibi", "--json", "--length", 100, "--heads", 3, "--width", 5))["cost"][
        "numbers"
    ]
    assert numbers["time"] == 2 * 3 * 100 * 100 * 5 + 3 * 100 * 100
    assert numbers["state"] == 2 * 100 * 3 * 5
    assert "333,000 multiply-adds" not in output("show", "alibi", "--length", 101, "--heads", 3, "--width", 5)
    assert "330,000 multiply-adds at B=1, H=G=3, T=S=100, D=V=5" in output(
        "show", "alibi", "--length", 100, "--heads", 3, "--width", 5
    )


@pytest.mark.parametrize(
    ("formula", "number"), [("2*(T - 1)//2", 3), ("min(T, r)*log2(8)", 6), ("T**2/-r", -8), ("ceil(T/3)", 2)]
)
def test_formulas(formula, number):
    assert catalog_page.evaluate(formula, {"T": 4, "r": 2}) == number


@pytest.mark.parametrize("formula", ["T*unknown", "__import__('os')", "T.real", "2*", "T/0", "[T]", "min(T, key=r)"])
def test_formulas_refuse_what_is_no_arithmetic(formula):
    with pytest.raises(ValueError, match=r"no number for|cannot be computed"):
        catalog_page.evaluate(formula, {"T": 4, "r": 2})


def test_show_draws_masks():
    text = output("show", "window(window=3)")
    assert "causal() & window(3)" in text
    assert "window = 128  (here 3)" in text
    rows = [line.split(maxsplit=1)[1] for line in text.splitlines() if re.match(r" +\d+ [█·]", line)]
    assert len(rows) == 24
    assert [row.count("██") for row in rows] == [1, 2] + [3] * 22


def test_show_draws_biases():
    text = output("show", "alibi")
    rows = re.findall(r"head \d  ([▁▂▃▄▅▆▇█]{64})", text)
    left = [["▁▂▃▄▅▆▇█".index(c) for c in row] for row in rows]
    expected = torch.exp(-regard.positions.alibi_slopes(6)[:, None] * torch.arange(64))
    assert left == (8 * expected).int().clamp(max=7).tolist()
    assert output("show", "kerple") == output("show", "kerple"), "trained biases are drawn from one seed"


def test_show_draws_no_bias_that_reads_the_data():
    for name in ("cope", "shaw", "rotary"):
        assert "share of a key's weight" not in output("show", name)
        assert "causal()" in output("show", name)


def test_show_writes_svg(tmp_path):
    target = tmp_path / "mask.svg"
    assert f"picture: {target}" in output("show", "window", "--svg", target)
    assert target.read_text().startswith("<svg ")
    assert "window(4)" in target.read_text()


# --- plan


def test_plan_says_what_runs_and_why_not_the_others():
    text = output("plan", "--window", 128, "--length", 8192)
    runs = "window" if KERNELS["native"].build.why_not() else "native"
    words = {"window": r"queries in blocks of \d+, \d+ keys each", "native": r"C\+\+, \d+% of the blocks"}
    assert re.search(rf"^runs  {runs} +{words[runs]}", text, re.MULTILINE)
    assert re.search(r"^not   neighborhood +the mask is not a neighborhood", text, re.MULTILINE)
    for name in ("sdpa", "block_sparse", "chunked", "eager"):
        assert re.search(rf"^not   {name} +about [\d.e+]+ times the time", text, re.MULTILINE)
    assert all(re.search(rf"^(runs|not )  {name} ", text, re.MULTILINE) for name in KERNELS)
    assert widest(text) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_plan_of_every_mechanism(name):
    """The kernel planned for a mechanism can run it, and no memory is taken for a size that would not fit."""
    if regard.card(name).build:
        assert "is a layer of its own" in invoke("plan", "--mechanism", name).stderr
        return
    causal = "--causal" if "causal" in regard.card(name).supports else "--bidirectional"
    found = json.loads(output("plan", "--mechanism", name, causal, "--length", 2**15, "--json"))
    assert found["kernel"] in KERNELS
    assert found["why_not"].keys() == KERNELS.keys() - {found["kernel"]}
    assert found["kernel"] != "eager", "the scores would take 32 GB"


def test_plan_agrees_with_the_layer(monkeypatch):
    """What is planned for a mechanism is what its layer runs."""
    ran = []
    for name, kernel in KERNELS.items():
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda p, *a, run=run, name=name: ran.append(name) or run(p, *a))
    for spec in ("window(window=64)", "shaw(max_distance=4)", "entmax+rotary", "mqa"):
        planned = json.loads(
            output("plan", "--mechanism", spec, "--heads", 2, "--width", 8, "--length", 1024, "--json")
        )
        parsed = cli_parse(spec)
        layer = regard.create(parsed.name, dim=16, num_heads=2, causal=True, **parsed.options)
        ran.clear()
        layer(torch.randn(1, 1024, 16))
        assert ran[0] == planned["kernel"], spec


def cli_parse(text):
    from regard.models.mixer import parse

    return parse(text)


def test_plan_shows_the_heads_that_the_mechanism_makes():
    assert "H=8, G=1," in output("plan", "--mechanism", "mqa")
    assert "H=8, G=2, T=1, S=50," in output(
        "plan", "--mechanism", "alibi", "--kv-heads", 2, "--length", 1, "--keys", 50
    )


# --- doctor


def test_doctor_knows_this_machine():
    text = output("doctor")
    assert widest(text) <= 100
    for name, value in (("regard", regard.__version__), ("torch", torch.__version__)):
        assert re.search(rf"^  {name} +{re.escape(value)}$", text, re.MULTILINE)
    absent = {"native", "grouped"} if KERNELS["native"].build.why_not() else set()
    absent |= set() if os.environ.get("TRITON_INTERPRET") == "1" else {"triton"}
    for kernel in KERNELS.keys() - absent:
        assert re.search(rf"^  {kernel} on cpu +ok  runs$", text, re.MULTILINE)
    for kernel in absent:
        assert re.search(rf"^  {kernel} on cpu +no  attention: kernel", text, re.MULTILINE)
    assert re.search(
        r"^  folder +ok  .*GiB free",
        " ".join(text.split("\n  ")).replace("folder", "\n  folder"),
        re.MULTILINE,
    )


def test_doctor_tells_what_is_missing(monkeypatch, tmp_path):
    def broken(problem):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(KERNELS["chunked"], "run", broken)
    monkeypatch.setattr(KERNELS["block_sparse"], "run", lambda problem: torch.zeros(1, 2, 160, 16))
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "plotly")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda dir: (tmp_path / "none" / "x").touch())
    text = output("doctor")
    assert re.search(r"^  chunked on cpu +no  no kernel image$", text, re.MULTILINE)
    assert re.search(r"^  block_sparse on cpu +no  runs, but is wrong by ", text, re.MULTILINE)
    assert re.search(r"^  report +no  without plotly; pip install 'regard\[report\]'$", text, re.MULTILINE)
    assert re.search(r"^  compiler +no  no C\+\+ compiler", text, re.MULTILINE)
    assert re.search(r"^  folder +no  the current folder cannot be written", text, re.MULTILINE)
    states = {finding["name"]: finding["state"] for finding in json.loads(output("doctor", "--json"))}
    assert (states["report"], states["sdpa on cpu"]) == ("no", "ok")


# --- compare, report, generate


@pytest.fixture
def config(monkeypatch):
    """What `compare` was asked to do, and the exit code it will give."""
    seen = types.SimpleNamespace(code=0, config=None)

    def run(config):
        seen.config = config
        return seen.code

    monkeypatch.setattr("regard.bench.compare.run", run)
    return seen


def test_compare_has_the_librarys_defaults(config):
    assert invoke("compare").exit_code == 0
    assert config.config == CompareConfig()


def test_compare_tells_its_defaults():
    text = " ".join(re.sub(r"[│\s]+", " ", output("compare", "--help")).split())
    for name in ("match", "out", "timeout", "task"):
        assert f"[default: {getattr(CompareConfig, name)}]" in text, name
    assert "[default: 0, 1]" in text
    its = tasks.find("text").defaults
    for value in (its.steps, its.batch, its.dim, its.lr, tasks.find("text").length):
        assert f"[default: {value} for text]" in text, value
    assert f"{', '.join(tasks.names())}; with options in brackets" in text


def test_compare_passes_every_option_on(config):
    config.code = 3
    line = (
        "compare --task mqar(pairs=(2,4)) --text a.txt --text b "
        "--mechanisms softmax,window(size=3,x=2),gated+rotary --steps 7 "
        "--seeds 3,1 --batch 2 --length 33 --dim 64 --depth 5 --heads 8 --lr 0.5 --match flops --out runs/x "
        "--checkpoint --device cuda:1 --timeout 9 --retry-failed --threads 4"
    )
    assert invoke(*line.split()).exit_code == 3
    assert config.config == CompareConfig(
        task="mqar(pairs=(2,4))",
        text=[Path("a.txt"), Path("b")],
        mechanisms=["softmax", "window(size=3,x=2)", "gated+rotary"],
        steps=7,
        seeds=[3, 1],
        batch=2,
        length=33,
        dim=64,
        depth=5,
        heads=8,
        lr=0.5,
        match="flops",
        out=Path("runs/x"),
        checkpoint=True,
        device="cuda:1",
        timeout=9.0,
        retry_failed=True,
        threads=4,
    )


def test_report_is_written_again(tmp_path):
    pytest.importorskip("plotly")
    from regard.bench.record import Cell, Result
    from regard.bench.store import opened

    with opened(tmp_path) as store:
        store.put(Result(Cell("text", "alibi", 0), "done", curve=[(1, 2.0)], heldout={"1x": 2.5}, parameters=10))
    assert output("report", tmp_path) == f"report: {tmp_path / 'report.html'}\n"
    assert "alibi" in (tmp_path / "report.html").read_text()
    output("report", tmp_path, "--out", tmp_path / "other.html")
    assert "alibi" in (tmp_path / "other.html").read_text()


@pytest.fixture
def checkpoint(tmp_path):
    from regard.models.checkpoint import save
    from regard.models.lm import LMConfig, language_model

    made = LMConfig("alibi", dim=16, depth=1, num_heads=2, mlp_dim=16)
    return save(language_model(made), made, tmp_path / "m.safetensors")


def test_generate_continues_the_prompt(checkpoint):
    first = output("generate", checkpoint, "--prompt", "Hé\x1b[31m", "--bytes", 40, "--seed", 3)
    assert first.startswith("Hé")
    assert "\x1b" not in first
    assert len(first) > 10
    assert first == output("generate", checkpoint, "--prompt", "Hé\x1b[31m", "--bytes", 40, "--seed", 3)
    assert first != output("generate", checkpoint, "--prompt", "Hé\x1b[31m", "--bytes", 40, "--seed", 4)
    assert output("generate", checkpoint, "--prompt", "x", "--bytes", 0) == "x\n"


# --- what is refused


BAD = [
    ("list --family position", "unknown family 'position'; did you mean 'positions'"),
    ("show alibbi", "unknown mechanism 'alibbi'; did you mean 'alibi'?"),
    ("show gated+rotary", "'gated+rotary' joins several mechanisms"),
    ("show window(windw=3)", "unknown option of 'window' 'windw'; did you mean 'window'?"),
    ("show window(3)", "cannot be read"),
    ("show window(window=0)", "must be"),
    ("show alibi --svg nowhere/x.svg", "nowhere/x.svg: No such file or directory"),
    ("plan --heads 8 --kv-heads 3", "8 query heads are not a multiple of 3 key heads"),
    ("plan --kernel flash", "unknown kernel 'flash'"),
    ("plan --kernel block_sparse --bidirectional", "no mask, so there are no empty blocks"),
    ("plan --dropout 2", "dropout must be in [0, 1], got 2.0"),
    ("plan --mechanism alibi+kerple", "both fill the slot 'position'"),
    ("plan --mechanism mqa --kv-heads 4", "does not support gqa"),
    ("compare --seeds 1,x", "seeds must be whole numbers with commas between, got '1,x'"),
    ("compare --dim 100 --heads 3", "heads do not divide dim = 100 (got 3); expected such as 1, 2, 4"),
    ("compare --mechanisms alibbi", "did you mean 'alibi'?"),
    ("compare --task mqra", "unknown task 'mqra'; did you mean 'mqar'?"),
    ("compare --task mqar --mechanisms etc", "etc does not fit the task mqar: cannot be causal"),
    ("compare --task mqar --text x.txt", "task mqar brings its own data; leave text out"),
    ("compare --task digits --length 9", "task digits: there is no option 'length'"),
    ("list --task chess", "unknown task 'chess'; there are text, boxes, "),
    ("list --task mqar --markdown", "leave --markdown or --task out"),
    ("compare --steps 0", "steps is too small (got 0); expected an int >= 1"),
    ("compare --text nowhere.txt", "nowhere.txt does not exist"),
    ("compare --device tpu", "device is unknown (got 'tpu'); expected 'cpu', 'cuda' or 'cuda:N'"),
    ("report nowhere", "nowhere/results.db does not exist"),
    ("generate nowhere.safetensors", "nowhere.safetensors cannot be read: No such file"),
    ("generate {checkpoint} --bytes -1", "count is too small (got -1); expected an int >= 0"),
    ("generate {checkpoint} --temperature -1", "temperature is out of range (got -1.0); expected a finite number >= 0"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[line for line, _ in BAD])
def test_mistakes_end_in_one_line(line, reason, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "{checkpoint}" in line:
        line = line.format(checkpoint=request.getfixturevalue("checkpoint"))
    result = invoke(*line.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("lst", "No such command 'lst'"),
        ("list --familly x", "No such option"),
        ("plan --length 0", "--length"),
        ("plan --dtype int8", "'int8' is not one of"),
        ("compare --match loss", "'loss' is not one of"),
        ("show", "Missing argument"),
    ],
)
def test_usage_mistakes_are_explained(line, reason):
    result = invoke(*line.split())
    assert result.exit_code == 2
    assert reason in re.sub(r"[│\s]+", " ", result.stderr)
    assert "Traceback" not in result.output


def test_a_traceback_on_request():
    assert isinstance(invoke("show", "alibbi", REGARD_TRACEBACK="1").exception, ValueError)
    assert isinstance(invoke("show", "alibbi", REGARD_TRACEBACK="0").exception, SystemExit)


def test_names_cannot_steer_the_terminal():
    for text in (invoke("report", "\x1b[2Jx\r\ny\u202e\x9b").stderr, invoke("show", "\x1b[31malibi").stderr):
        assert re.fullmatch(r"error: [^\x00-\x1f\x7f-\x9f\u202e]+\n", text), repr(text)
    assert terminal.clean("a\x1b[31;1mb\x00c\td\n") == "abc\td\n"
    assert terminal.line("a \n\r b\x07") == "a b"


# --- terminals


def test_help_and_version():
    assert output("--version") == f"regard {regard.__version__}\n"
    for command in ("", "list", "show", "plan", "doctor", "compare", "report", "generate"):
        assert widest(output(*command.split(), "--help")) <= 100
    shown = output("--help")
    assert all(
        f" {command} " in shown for command in ("list", "show", "plan", "doctor", "compare", "report", "generate")
    )


@pytest.mark.parametrize("columns", ["20", "1", "nonsense"])
def test_odd_widths(columns):
    assert "alibi" in output("list", COLUMNS=columns).replace("\n", "")


def test_colours_only_for_those_who_want_them():
    assert "\x1b[" not in output("show", "alibi")
    assert "\x1b[" in output("show", "alibi", NO_COLOR=None, FORCE_COLOR="1", TERM="xterm")


def started(*arguments, **environment):
    base = {**os.environ, **{k: v for k, v in PLAIN.items() if v}, "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "regard", *arguments], {**base, **environment}


def test_terminals_without_unicode():
    arguments, environment = started("show", "window(window=4)", PYTHONIOENCODING="ascii")
    done = subprocess.run(arguments, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = re.findall(rb"^ +\d+ ([.# ]+)$", done.stdout, re.MULTILINE)
    assert len(rows) == 24, "pictures are drawn in the characters that there are"
    assert rows[1].startswith(b"####. . ")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("ascii", "#. e -> x2 <= ?"), ("latin-1", "#· é -> x² <= ?"), ("utf-8", "█· é → x² ≤ 語")],
)
def test_what_an_encoding_lacks_has_a_likeness(encoding, text):
    terminal.tolerate_encoding()
    assert "█· é → x² ≤ 語".encode(encoding, errors="regard").decode(encoding) == text


def test_a_reader_that_leaves():
    """`regard list --json | head -1` says nothing on stderr."""
    arguments, environment = started("list", "--json")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(arguments, env=environment, stdout=out, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""
    assert done.returncode == 1


# --- documents


def blocks(document, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_the_readmes_python_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), space)
    assert capsys.readouterr().out.startswith(str(regard.plan(*(space[n] for n in "qkv"), mask=space["near"])))
    assert (tmp_path / "attention.html").stat().st_size > 10_000


def test_the_readmes_outputs_are_current():
    """`python tools/readme.py` makes them anew."""
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools" / "readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.README.read_text(encoding="utf-8")
    assert len(tool.PART.findall(text)) == 5
    assert tool.filled(text, lambda command: output(*shlex.split(command)[1:])) == text


def test_the_readmes_commands_exist():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `regard (\w+)", text, re.MULTILINE)) == known
    read = {
        v for p in (ROOT / "src").rglob("*.py") for v in re.findall(r"environ\S*?[(\[]\"(\w+)", p.read_text("utf-8"))
    }
    assert read <= set(re.findall(r"^\| `(\w+)=", text, re.MULTILINE)), "every environment variable is in the table"


def test_the_contributing_example_is_a_mechanism(monkeypatch):
    part, test = (block.replace('"soft_cap"', '"temporary_example"') for block in blocks("CONTRIBUTING.md", "python"))
    module = types.ModuleType("regard.scores.soft_cap")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    catalog.cards()
    try:
        exec(compile(part, "CONTRIBUTING.md", "exec"), module.__dict__)
        space = {}
        exec(compile(test, "CONTRIBUTING.md", "exec"), space)
        tests = [value for name, value in space.items() if name.startswith("test_")]
        assert len(tests) == 3
        for run in tests:
            run()
        layer = regard.create("temporary_example", dim=24, num_heads=6, causal=True, cap=2.0)
        x = torch.randn(2, 12, 24)
        y, _ = layer.step(x, layer.init_state(2, 12))
        torch.testing.assert_close(y, layer(x))
        assert "temporary_example" in output("list")
        assert "cap = 50.0" in output("show", "temporary_example")
    finally:
        _registry.pop("temporary_example", None)


def test_pre_commit_runs_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    made = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    hooks = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert hooks == made

"""The command line: what it prints, how wide, and how it refuses; and that the documents are true."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import typing
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from typer.testing import CliRunner

import regard
from regard import catalog, cli, doctor, index, masks, tasks, terminal
from regard.bench.config import CompareConfig
from regard.bench.profile import Profile
from regard.cards import FEATURES, Card, Paper, Protocols, _registry
from regard.cli import configured, page, table
from regard.cli.configured import documented
from regard.cost import costs, evaluate
from regard.kernels import Problem, choose, triton_attention
from regard.kernels.plan import KERNELS, _auto
from regard.pipeline.function import problem

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


@pytest.mark.parametrize("columns", [100, 200])
def test_list_shows_every_mechanism_within_the_terminal(columns):
    text = output("list", COLUMNS=str(columns))
    assert widest(text) <= columns
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    for name in EVERY:
        card = regard.card(name)
        marks = table.marks(index.data(card)["supports"])
        shown = [name, card.family, table.KINDS[card.protocol][0], marks, table.VERIFIED[card.verified][0]]
        assert rows[name].split()[:5] == shown
        gist = rows[name].split(None, 5)[5]
        assert gist == card.gist or (gist[-1] == "…" and card.gist.startswith(gist[:-1].rstrip()))
    families = len({regard.card(name).family for name in EVERY})
    analyses = len(catalog.analyses())
    functions = len(EVERY) - len(NAMES) - analyses
    counted = f"{functions} function{'s' * (functions > 1)}, " if functions else ""
    assert text.splitlines()[-1] == f"{len(NAMES)} mechanisms, {counted}{analyses} analyses, {families} families"
    assert not re.search(r"[ \t]$", text, re.MULTILINE), "no blanks at the ends of lines"


ONE_LINE_A_ROW = {
    "list": lambda: EVERY,
    "list --family heads": lambda: regard.mechanisms("heads"),
    "list --task mqar --family mixers": lambda: regard.mechanisms("mixers"),
    "plan --window 64": lambda: [f"{'not' if n else 'runs'}" for n in range(len(KERNELS))],
    "doctor": lambda: [finding.name.split()[0] for finding in doctor.examine()],
}


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ONE_LINE_A_ROW)
def test_tables_have_a_line_a_row_in_narrow_terminals(command, columns):
    text = output(*command.split(), COLUMNS=str(columns))
    assert widest(text) <= columns
    firsts = [line.split()[0] for line in text.splitlines() if line.strip()]
    names = list(ONE_LINE_A_ROW[command]())
    start = firsts.index(names[0])
    if command == "doctor":
        topics = {finding.topic for finding in doctor.examine()}
        assert [first for first in firsts if first not in topics] == names
    else:
        assert firsts[start : start + len(names)] == names


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ["show window", "show performer", "show attention_rollout", "plan --mechanism mqa"])
def test_other_commands_stay_within_narrow_terminals(command, columns):
    assert widest(output(*command.split(), COLUMNS=str(columns))) <= columns


@pytest.mark.parametrize("columns", [60, 80])
def test_compare_and_profile_stay_within_narrow_terminals(columns, tmp_path, monkeypatch):
    """What they do is faked; what they say is theirs."""
    from regard.bench import compare, profile

    def trained(job, *, on_step, **rest):
        if "speeds" in job:
            return {"result": {name: {"train_tokens_per_second": 5e4, "train_spread": 1e3} for name in job["speeds"]}}
        found = {"1x": 3.0 + job["cell"]["seed"], "2x": 4.0, "4x": 5.0}
        made = {"peak_memory_bytes": 10**8, "state_bytes": 4000, "parameters": 10**6}
        return {"result": {"status": "done", "heldout": found, **made}}

    monkeypatch.setattr(compare.execute, "__kwdefaults__", {"train": trained})
    monkeypatch.setattr(profile.run, "__kwdefaults__", {
        **profile.run.__kwdefaults__, "measure": lambda job, **rest: {"result": {"values": {"forward": job["length"]}}},
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a text that nobody wrote, line by line\n" * 100)
    names = ["softmax", "window(window=4)+rotary(base=500.0)", "alibi"]
    small = "--steps 2 --batch 2 --length 8 --dim 8 --depth 1 --heads 2 --text book.txt"
    shown = output("compare", "--mechanisms", ",".join(names), *small.split(), COLUMNS=str(columns))
    after = shown.partition("\nmechanism ")[2].splitlines()[1:]
    measured = output(
        "profile",
        "--mechanisms",
        ",".join(names),
        "--lengths",
        "1k..64k",
        "--dim",
        8,
        "--heads",
        2,
        COLUMNS=str(columns),
    )
    beneath = measured.partition("forward ")[2].splitlines()[1:]
    for text, rows in ((shown, after), (measured, beneath)):
        assert widest(text) <= columns
        assert sorted(row.split()[0][:6] for row in rows[:3]) == sorted(name[:6] for name in names)
    assert "held out: the last " in shown


def test_list_of_a_family():
    text = output("list", "--family", "normalizers")
    shown = {line.split()[0] for line in text.splitlines() if " normalizers " in line}
    assert shown == set(regard.mechanisms("normalizers"))
    assert text.splitlines()[-1] == f"{len(shown)} mechanisms"


def test_marks_tell_what_is_supported():
    assert set(table.MARKS) == set(page.MEANING) == FEATURES
    assert len(set(table.MARKS.values())) == len(FEATURES)
    assert table.marks({name: name != "cross" for name in FEATURES}) == "cb-pkmgsdt"


def test_every_protocol_has_a_letter_and_words():
    assert set(table.KINDS) == set(typing.get_args(Protocols))
    assert len({letter for letter, _, _ in table.KINDS.values()}) == len(table.KINDS)
    assert all(len(letter) == 1 and word and words for letter, word, words in table.KINDS.values())


def test_list_as_json():
    data = json.loads(output("list", "--json"))
    assert [card["name"] for card in data] == EVERY
    assert [paper["url"] for paper in data[EVERY.index("alibi")]["papers"]] == ["https://arxiv.org/abs/2108.12409"]
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
@pytest.mark.parametrize("columns", [80, 100])
def test_show_says_what_the_card_says(name, columns):
    card, text = regard.card(name), output("show", name, COLUMNS=str(columns))
    assert widest(text) <= columns
    words, letters = " ".join(text.split()), "".join(text.split())
    for part in (
        card.gist,
        card.equation,
        *(part for paper in card.papers for part in (paper.title, paper.authors, paper.url or paper.ref, paper.read)),
        card.claim,
        *card.differs,
    ):
        assert "".join(part.split()) in letters  # a test's name may be wider than a line
    for feature in FEATURES if name in NAMES else ():
        found = re.search(rf"^  (yes|no ) {feature} ", text, re.MULTILINE)
        assert found, feature
        assert found[1].strip() == ("yes" if feature in card.supports else "no"), feature
    for option, default in card.options.items():
        assert f" {option} = {default!r}" in words or f" {option} (required)" in words
    for law, why in card.exceptions.items():
        assert f"{law}: {' '.join(why.split())}" in words
    assert (card.cost.state == "") == ("it does not stream" in text)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_formulas_that_can_be_computed(name):
    card = regard.card(name)
    found = costs(card, card.example, batch=1, heads=8, length=1024, width=64)
    for part in ("time", "state"):
        assert found[part] is None or found[part] >= 0, f"{getattr(card.cost, part)!r}: {found[part]}"


@pytest.fixture
def two_papers():
    """A card with two papers and a variant, of a class whose parameters are tied across layers."""
    papers = (
        Paper(
            "The First Paper on a Thing with a Title that is Longer than a Line of a Narrow Terminal", "Ao", 2001, "V 1"
        ),
        Paper("The Second", "Bo et al.", 2002, "2001.00001", read="section 3"),
    )
    card = Card(
        "temporary_two",
        equation="y = x\nz = " + " + ".join(f"x_{n}" for n in range(30)),
        papers=papers,
        gist="Does nothing, twice, by two papers.",
        protocol="Pooler",
        supports={"bidirectional"},
        auxiliary="entropy",
        tasks=("mqar",),
    )

    @card.module
    class Two(torch.nn.Module):
        tied = ("weight",)

        def __init__(self, dim: int, *, size: int, form: typing.Literal["plain", "gated"] = "plain") -> None:
            super().__init__()

    card.variant("temporary_gated", "The same with a gate.", preset={"form": "gated"}, example={"size": 1})
    yield papers
    for name in ("temporary_two", "temporary_gated"):
        _registry.pop(name, None)


def test_show_several_papers_and_variants(two_papers):
    wide = output("show", "temporary_two(size=3)")
    assert "papers" in wide.splitlines()
    for paper in two_papers:
        assert paper.title in " ".join(wide.split())
    for line in (
        "  The Second",
        "    Bo et al. 2002, https://arxiv.org/abs/2001.00001",
        "    read: section 3",
        "    Ao 2001, V 1",
        "  - temporary_gated: The same with a gate.",
        "  weight: the paper has one for all layers; regard.share(*layers) makes it so",
        "  size (required)  (here 3)",
        "  form = 'plain'  or 'gated'",
        "  regard compare --task mqar",
    ):
        assert line in wide.splitlines(), line
    assert "entropy(...) gives a loss" in wide
    narrow = output("show", "temporary_gated", COLUMNS="40")
    assert widest(narrow) <= 40
    assert "of temporary_two, with form = 'gated'" in " ".join(narrow.split())
    assert "form =" not in narrow.partition("options")[2]
    data = json.loads(output("show", "temporary_gated", "--json"))
    assert [paper["year"] for paper in data["papers"]] == [2001, 2002]
    assert (data["variant_of"], data["preset"], data["tied"]) == ("temporary_two", {"form": "gated"}, ["weight"])
    assert (data["options"], data["required"]) == ({"size": None}, ["size"])
    row = next(line for line in output("list", "--markdown").splitlines() if "`temporary_two`" in line)
    assert "| Ao 2001, V 1; [Bo et al. 2002](https://arxiv.org/abs/2001.00001) |" in row


@pytest.mark.parametrize("name", ["kerple", "temporary_two(size=2)", "attention_rollout"])
def test_show_as_markdown(name, two_papers):
    text = output("show", name, "--markdown")
    card = regard.card(name.partition("(")[0])
    assert text.startswith(f"# {card.name}\n\n{card.gist}\n")
    assert f"```text\n{card.equation}\n```" in text
    for paper in card.papers:
        who = f"{paper.authors} {paper.year}"
        assert f"- {paper.title}, " + (f"[{who}]({paper.url})" if paper.url else f"{who}, {paper.ref}") in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [h for h in headings if h in output("show", name).splitlines()] == headings
    assert text.count("```") % 2 == 0


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
    assert evaluate(formula, {"T": 4, "r": 2}) == number


@pytest.mark.parametrize("formula", ["T*unknown", "__import__('os')", "T.real", "2*", "T/0", "[T]", "min(T, key=r)"])
def test_formulas_refuse_what_is_no_arithmetic(formula):
    with pytest.raises(ValueError, match=r"no number for|cannot be computed"):
        evaluate(formula, {"T": 4, "r": 2})


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
    if not regard.card(name).is_part:
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
    joined = "window(window=64)+rotary(base=9)"
    for spec in ("window(window=64)", "shaw(max_distance=4)", "entmax+rotary", joined, "mqa"):
        planned = json.loads(
            output("plan", "--mechanism", spec, "--heads", 2, "--width", 8, "--length", 1024, "--json")
        )
        layer = regard.create(spec, dim=16, num_heads=2, causal=True)
        ran.clear()
        layer(torch.randn(1, 1024, 16))
        assert ran[0] == planned["kernel"], spec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 64])
def test_plan_for_a_gpu_that_is_not_here(window, dtype, monkeypatch):
    """What auto would take there: kernels of CPUs are out, and those of GPUs are out for what they lack here alone."""
    given = ["plan", "--length", 4096, "--dtype", dtype, *(["--window", window] if window else [])]
    at = {device: json.loads(output(*given, "--device", device, "--json")) for device in ("cpu", "cuda")}
    assert {device: found["device"] for device, found in at.items()} == {"cpu": "cpu", "cuda": "cuda"}
    assert at["cuda"]["why_not"]["native"] == ["tensors on cuda, not on the CPU"]
    said = json.dumps(at["cuda"])
    assert "meta" not in said + json.dumps(at["cpu"])
    assert "only CUDA" not in said
    missing = at["cuda"]["why_not"].get("triton", [""])[0]
    assert ("not installed" in missing) == (not triton_attention.installed())
    q = torch.empty(1, 8, 4096, 64, dtype=getattr(torch, dtype), device="meta")
    mask = masks.causal() & masks.window(window) if window else masks.causal()
    there = replace(problem(q, q, q, mask=mask), on="cuda")
    monkeypatch.setattr(Problem, "readable", True)  # as tensors there are
    assert _auto(there) is KERNELS[at["cuda"]["kernel"]], "what attention itself would take"


def test_a_device_is_named_for_tensors_on_none():
    with pytest.raises(ValueError, match=r"device is said of tensors that are on one \(got cuda\)"):
        choose(problem(*torch.randn(3, 1, 1, 2, 4)), device="cuda")
    assert "'tpu' is not one of 'cpu', 'cuda'" in invoke("plan", "--device", "tpu").stderr


def test_plan_and_show_read_options_of_joined_names():
    joined = "window(window=3)+rotary(base=500)"
    found = json.loads(output("plan", "--mechanism", joined, "--length", 4096, "--json"))
    assert (
        found["kernel"]
        == json.loads(output("plan", "--mechanism", "window(window=3)", "--length", 4096, "--json"))["kernel"]
    )
    text = output("show", joined)
    assert "window = 128  (here 3)" in text
    assert "(here 500)" in text
    assert text.count("causal() & window(3)") == text.count("\npicture\n") == 1
    assert [entry["name"] for entry in json.loads(output("show", joined, "--json"))] == ["window", "rotary"]
    assert re.findall("^# (.*)$", output("show", joined, "--markdown"), re.MULTILINE) == ["window", "rotary"]


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
    absent = {"few", "native", "grouped", "paged"} if KERNELS["native"].build.why_not() else set()
    absent |= set() if os.environ.get("TRITON_INTERPRET") == "1" else {"triton"}
    for kernel in KERNELS.keys() - absent:
        assert re.search(rf"^  {kernel} on cpu +ok  runs$", text, re.MULTILINE)
    for kernel in absent:
        assert re.search(rf"^  {kernel} on cpu +no  (?!attention)\w", text, re.MULTILINE)
    assert re.search(r"^  folder +ok  \d+ GiB free", text, re.MULTILINE)


WITHOUT = {
    "triton": "Triton's kernels on GPUs",
    "transformers": "swap, trace and explain",
    "scipy": "the task boxes",
    "plotly": "report.html",
    "plotext": "plots in the terminal",
    "scikit-learn": "the task digits",
}


@pytest.mark.slow
def test_everything_that_needs_no_extra_runs_without():
    """In a process where none of them can be imported and there is no compiler."""
    modules = [{"scikit-learn": "sklearn"}.get(name, name) for name in (*WITHOUT, "torch_geometric")]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({modules}))
from regard.cli import app
for line in ("doctor", "list", "show window", "show kerple", "plan --window 64"):
    app(line.split(), standalone_mode=False)
"""
    environment = {**os.environ, **{k: v for k, v in PLAIN.items() if v}, "PATH": "", "CXX": "", "COLUMNS": "400"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for package, use in WITHOUT.items():
        told = rf"pip install .* for .*{package} \({use}|^  {package} +no  {use}"  # where regard is no package, by name
        assert re.search(told, done.stdout, re.MULTILINE), package
    assert "pip install 'regard[test]' for what the tests need: " in done.stdout
    assert re.search(r"^  compiler +no  no C\+\+ compiler on PATH; for ", done.stdout, re.MULTILINE)
    for name in ("eager", "chunked", "sdpa", "window"):
        assert re.search(rf"^  {name} on cpu +ok  runs$", done.stdout, re.MULTILINE)


def test_doctor_keeps_torchs_warnings_to_itself(monkeypatch):
    def warning():
        warnings.warn("CUDA initialization: the driver is too old", UserWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(torch.cuda, "device_count", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "none that this torch can use" in output("doctor")


def test_doctor_tells_what_is_missing(monkeypatch, tmp_path):
    def broken(problem):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(KERNELS["chunked"], "run", broken)
    monkeypatch.setattr(KERNELS["block_sparse"], "run", lambda problem: torch.zeros_like(problem.q))
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "plotly")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda dir: (tmp_path / "none" / "x").touch())
    text = output("doctor")
    assert re.search(r"^  chunked on cpu +no  no kernel image$", text, re.MULTILINE)
    assert re.search(r"^  block_sparse on cpu +no  runs, but is wrong by ", text, re.MULTILINE)
    wanted = r"^  report +no  pip install 'regard\[report\]' for plotly \(report.html\)$"
    assert re.search(wanted, output("doctor", COLUMNS="200"), re.MULTILINE)
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
    for name in ("match", "out", "timeout", "task", "device"):
        assert f"[default: {getattr(CompareConfig, name)}]" in text, name
    assert "[default: 0, 1, 2]" in text
    its = tasks.find("text").defaults
    for value in (
        its.steps,
        its.batch,
        its.dim,
        its.lr,
        ", ".join(tasks.find("text").mechanisms()),
        tasks.find("text").length,
    ):
        assert f"[default: ({value} for text)]" in text, value
    assert "with options in brackets" in text
    assert f"There are {', '.join(tasks.names())}." in text


@pytest.mark.parametrize("config", [CompareConfig, Profile])
def test_options_are_the_fields_of_the_config(config):
    """Each with what its docstring says first; so a new field is a new option, and its help is written once."""
    text = output({CompareConfig: "compare", Profile: "profile"}[config], "--help")
    said = documented(config)
    for field in dataclasses.fields(config):
        assert re.search(rf"^  --{field.name.replace('_', '-')} ", text, re.MULTILINE), field.name
        assert said[field.name] in " ".join(text.split()), field.name


def test_a_config_becomes_a_command(monkeypatch):
    """Of every type that a field may have; what is not given is left to the config."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        names: tuple[str, ...] = ("a", "b")
        """What they are called.

        Not on the command line."""
        sizes: typing.Sequence[int] | None = None
        files: typing.Sequence[str | Path] = ()
        way: typing.Literal["here", "there"] = "here"
        """Which one."""
        factor: float = 1.5
        most: int | None = None
        quick_one: bool = False
        where: str | Path = Path("runs")

    asked = []
    monkeypatch.setattr(configured.app, "registered_commands", list(configured.app.registered_commands))
    source = configured.Source(Config, flags={"quick_one": "--quick/--slow"}, defaults={"most": "as many as fit"})

    @configured.configured(lambda: source)
    def temporary(config):
        """Try it."""
        asked.append(config)

    assert output("temporary") == ""
    line = "temporary --names x(y=1,z=2),w --sizes 3,4 --files p --files q --way there --most 7 --quick --where r"
    output(*line.split())
    assert asked == [
        Config(),
        Config(("x(y=1,z=2)", "w"), [3, 4], [Path("p"), Path("q")], "there", most=7, quick_one=True, where=Path("r")),
    ]
    text = " ".join(output("temporary", "--help").split())
    assert "What they are called. With commas between. [default: a, b]" in text
    assert "Not on the command line" not in text
    assert "--way <here|there>" in text
    assert "Which one. [default: here]" in text
    assert "[default: (as many as fit)]" in text
    assert "'up' is not one of" in invoke("temporary", "--way", "up").stderr


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
    ("list --family position", "family is unknown (got 'position'); expected one of"),
    (
        "show alibbi",
        "mechanism is unknown (got 'alibbi'); expected one of those that `regard list` shows; did you mean 'alibi'?",
    ),
    ("show gated+polarized", "only mechanisms that fill slots can be joined by '+'"),
    (
        "show window(windw=3)",
        "'window' has no such option (got 'windw'); expected one of window; did you mean 'window'?",
    ),
    ("show window(3)", "cannot be read"),
    ("show window(window=0)", "window: size is too small (got 0)"),
    ("show alibi --svg nowhere/x.svg", "nowhere/x.svg: No such file or directory"),
    ("plan --heads 8 --kv-heads 3", "no multiple of the 3 key heads (got 8)"),
    ("plan --kernel flash", "attention: kernel is unknown (got 'flash'); expected one of 'auto'"),
    ("plan --kernel block_sparse --bidirectional", "no mask, so there are no empty blocks"),
    ("plan --dropout 2", "dropout is out of range (got 2.0); expected a finite number >= 0 and <= 1"),
    ("plan --mechanism alibi+kerple", "both fill the slot 'position'"),
    ("plan --mechanism mqa --kv-heads 4", "mqa: num_kv_heads is not 1 (got 4)"),
    ("compare --seeds 1,x", "seeds must be whole numbers with commas between, got '1,x'"),
    ("compare --dim 100 --heads 3", "heads do not divide dim = 100 (got 3); expected such as 1, 2, 4"),
    ("compare --mechanisms alibbi", "did you mean 'alibi'?"),
    ("compare --task mqra", "task is unknown (got 'mqra'); expected one of"),
    ("compare --task mqar --mechanisms etc", "etc does not fit the task mqar: cannot be causal"),
    ("compare --task mqar --text x.txt", "task mqar brings its own data; leave text out"),
    ("compare --task digits --length 9", "task 'digits' has no such option (got 'length'); expected "),
    ("list --task chess", "task is unknown (got 'chess'); expected one of text, absence, boxes, "),
    ("list --task mqar --markdown", "leave --markdown or --task out"),
    ("compare --steps 0", "steps is too small (got 0); expected an int >= 1"),
    ("compare --text nowhere.txt", "nowhere.txt does not exist"),
    ("profile --device nope", "profile: device is unknown (got 'nope'); expected 'cpu', 'cuda' or 'cuda:N'"),
    ("profile --device cuda:99", "profile: device is not there (got 'cuda:99')"),
    ("show window(window=3)()", "cannot be read"),
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
        ("--nothing", "No such option"),
    ],
)
def test_usage_mistakes_are_explained(line, reason):
    result = invoke(*line.split())
    assert result.exit_code == 2
    assert re.fullmatch(r"error: [^\n]+ --help tells more\n", result.stderr), result.stderr
    assert reason in result.stderr
    assert result.stdout == ""


def test_a_traceback_on_request():
    assert isinstance(invoke("show", "alibbi", REGARD_TRACEBACK="1").exception, ValueError)
    assert isinstance(invoke("show", "alibbi", REGARD_TRACEBACK="0").exception, SystemExit)


def test_names_cannot_steer_the_terminal():
    for text in (invoke("report", "\x1b[2Jx\r\ny\u202e\x9b").stderr, invoke("show", "\x1b[31malibi").stderr):
        assert re.fullmatch(r"error: [^\x00-\x1f\x7f-\x9f\u202e]+\n", text), repr(text)
    assert terminal.clean("a\x1b[31;1mb\x00c\td\n") == "abc\td\n"
    assert terminal.line("a \n\r b\x07") == "a b"


# --- start


STARTS = [
    ("list", 0, ""),
    ("list --markdown", 0, ""),
    ("list --family positions --json", 0, ""),
    ("list --family position", 2, "error: regard: family is unknown (got 'position'); expected one of "),
    ("lst", 2, "Did you mean 'list'?"),
    ("--help", 0, ""),
    ("list --help", 0, ""),
    ("--version", 0, ""),
    pytest.param(
        "compare --help",
        0,
        "",
        marks=pytest.mark.xfail(
            CompareConfig.__module__ == "regard.bench.compare", reason="the config stands among code that needs torch"
        ),
    ),
]


@pytest.mark.parametrize(("line", "code", "said"), STARTS)
def test_help_and_lists_need_no_torch(line, code, said):
    """In a fresh process; a list needs no rich either, which takes longer to import than a list takes to read."""
    arguments = [sys.executable, "-c", PROBE, *line.split()]
    done = subprocess.run(arguments, env=started()[1], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    *errors, loaded = done.stderr.splitlines()
    assert not {"torch", "numpy", "jaxtyping", "einops"} & set(loaded.split())
    assert "rich.table" not in loaded or not line.startswith("list")
    assert said in " ".join(errors)
    assert bool(done.stdout) == (code == 0)


PROBE = """
import atexit, sys
from regard.cli import main
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
main()
"""


# --- terminals


def test_help_and_version():
    assert output("--version") == f"regard {regard.__version__}\n"
    for columns in (80, 100):
        for command in ("", *cli.COMMANDS):
            assert widest(output(*command.split(), "--help", COLUMNS=str(columns))) <= columns
        shown = output("--help", COLUMNS=str(columns))
        assert all(f" {command} " in shown for command in cli.COMMANDS)
        assert "..." not in shown.partition("Commands:")[2], "what a command does fits on its line"


def test_every_file_of_a_command_is_one():
    """Files that register nothing are what several commands share."""
    folder = Path(cli.__file__).parent
    makes = {
        path.stem for path in folder.glob("*.py") if re.search(r"^@(app\.command|configured)\(", path.read_text(), re.M)
    }
    assert makes == set(cli.COMMANDS)


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_importing_ends_it_at_once(tmp_path, number, code):
    """Whatever is being imported, and even if it takes no exception for an answer."""
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "while True:\n    try: time.sleep(60)\n    except BaseException: pass\n"
    )
    arguments, environment = started("compare", "--steps", "1", "--out", str(tmp_path / "run"))
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), environment.get("PYTHONPATH", "")))
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        while not (tmp_path / "begun").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(number)
        said, _ = job.communicate(timeout=20)
    assert (job.returncode, said) == (code, b"")


def test_the_entry_point_imports_little():
    """A signal finds its handler before anything is imported that takes time."""
    code = "import sys; before = set(sys.modules); import regard.__main__; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert {name for name in names if name.startswith("regard")} == {"regard", "regard.__main__"}
    assert len(names) < 40


# --- documents


def blocks(document, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_the_contributing_example_is_a_mechanism(monkeypatch):
    part, test, *_ = (
        block.replace('"clipped"', '"temporary_example"') for block in blocks("CONTRIBUTING.md", "python")
    )
    module = types.ModuleType("regard.scores.clipped")
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
        layer = regard.create("temporary_example", dim=24, num_heads=6, causal=True, clip=2.0)
        x = torch.randn(2, 12, 24)
        y, _ = layer.step(x, layer.init_state(2, 12))
        torch.testing.assert_close(y, layer(x))
        assert "temporary_example" in output("list")
        assert "clip = 10.0" in output("show", "temporary_example")
    finally:
        _registry.pop("temporary_example", None)


def test_pre_commit_runs_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    made = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    hooks = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert hooks == made

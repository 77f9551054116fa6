"""README and the site: every block of code runs, every link leads somewhere, what is made from the code is there."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from tests.test_cli import ROOT, output
from tools import choose, pages, readme

import regard
from regard import cards, cli, index, tasks
from regard.cli.picture import BUILT

DOCS = ROOT / "docs"
HAND = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
"""All that is written by hand, but for what other tests run: CONTRIBUTING's code and the examples."""
LINKING = [*HAND, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = ("list", "show", "plan", "doctor", "check")
"""Commands that are run; of the others, which take minutes, the arguments are read."""


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, the code) of every block in it."""
    return [(said.strip(), code) for kind, said, code in BLOCK.findall(text) if kind == language]


def named(path: Path) -> str:
    return path.name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, whose modules can be imported; cards made there are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before, modules = set(cards._registry), set(sys.modules)
    yield tmp_path
    for name in set(cards._registry) - before:
        cards._registry.pop(name)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def files(text: str, folder: Path) -> None:
    """Write the blocks that a page gives a file's name."""
    for said, code in blocks(text, "python"):
        if said.startswith("title="):
            (folder / said.removeprefix("title=").strip('"')).write_text(code, encoding="utf-8")


@pytest.mark.parametrize("page", [p for p in HAND if blocks(p.read_text("utf-8"), "python")], ids=named)
def test_python_runs(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text(encoding="utf-8")
    files(text, here)
    space: dict[str, object] = {"__name__": "page"}
    for said, code in blocks(text, "python"):
        if not said:
            exec(compile(code, page.name, "exec"), space)
    if page.name in ("README.md", "swap.md"):
        assert (here / "attention.html").stat().st_size > 10_000
    if page.name == "README.md":
        q, k, v = (space[n] for n in "qkv")
        assert capsys.readouterr().out.startswith(str(regard.plan(q, k, v, mask=space["near"])))


@pytest.mark.parametrize("page", [p for p in LINKING if blocks(p.read_text("utf-8"), "console")], ids=named)
def test_commands(page: Path, here: Path) -> None:
    """They are run if they are quick and about what is there; else their arguments are read, or files looked for."""
    text = page.read_text(encoding="utf-8")
    files(text, here)
    (here / "book.txt").write_text("once upon a time", encoding="utf-8")
    for _, code in blocks(readme.PART.sub("", text), "console"):
        for line in code.splitlines():
            if line.startswith("$ "):
                command(shlex.split(line[2:], comments=True), run=page.name != "CONTRIBUTING.md")


def command(words: list[str], *, run: bool) -> None:
    program, *rest = words
    makefile, project = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "pyproject.toml"))
    match program.removeprefix(".venv/bin/"):
        case "make":
            assert re.search(rf"^{rest[0]}:.*  ## ", makefile, re.MULTILINE), words
        case "pip":
            for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), words
        case "python":
            assert (ROOT / rest[0]).is_file(), words
        case "pre-commit":
            assert (ROOT / ".pre-commit-config.yaml").is_file()
        case "regard" if run and rest[0] in RUN:
            assert output(*rest)
        case "regard":
            group = typer.main.get_command(cli.app)
            found = group.get_command(None, rest[0])  # type: ignore[attr-defined]
            assert found is not None, words
            found.make_context(rest[0], rest[1:])
        case _:
            pytest.fail(f"no way to check {words}")


def test_no_other_blocks() -> None:
    """What is neither Python nor console says nothing that could be wrong: drawings of the pipeline alone."""
    for page in HAND:
        odd = [code for kind, _, code in BLOCK.findall(page.read_text("utf-8")) if kind not in ("python", "console")]
        assert all(code.startswith("x - project - position") for code in odd), page


# --- what is made -------------------------------------------------------------------------------------------


def test_the_readme_is_current_and_short() -> None:
    """`python tools/readme.py` makes its table anew."""
    text = readme.README.read_text(encoding="utf-8")
    assert len(readme.PART.findall(text)) == 1
    assert readme.filled(text, readme.run) == text
    assert len(text.splitlines()) < 200


def made_here(line: str) -> str:
    """A command's output; what a tool of its own puts out takes a minute, and other tests see to it."""
    program, *rest = shlex.split(line)
    if program == "python":
        assert (ROOT / rest[0]).is_file(), line
        return "| made with the site |"
    return output(*rest)


def test_what_pages_ask_for_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as for its reader, but not in these tests
    asked = 0
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        parts = readme.PART.findall(text)
        assert all(not part[0].partition("-->\n")[2] for part in parts), f"{page}: outputs are made with the site"
        made = pages.filled(text, made_here)
        assert "<!-- make" not in made
        asked += len(parts) + len(pages.MADE.findall(text))
    assert asked >= 9


def test_the_tables_say_what_cards_say() -> None:
    """By hand, for one mechanism of each kind; every one has a row and a formula that grows in some known way."""
    entries = {entry["name"]: entry for entry in choose.choosable()}
    expected = {
        "softmax": ("T²", "grows", "exact"),
        "window": ("T", "fixed", "exact"),
        "moba": ("T²", "grows", "chosen"),
        "linear": ("T", "fixed", "own"),
        "fftnet": ("T log T", "", "own"),
        "shift": ("none", "", "own"),
        "gatv2": ("T", "", "own"),
    }
    for name, told in expected.items():
        entry = entries[name]
        assert (choose.growth(entry, "time"), choose.state(entry), choose.exactness(entry)) == told, name
    whole = choose.whole()
    for name, entry in entries.items():
        assert f"[{name}](mechanisms/{name}.md)" in whole
        assert re.fullmatch(r"none|fixed|T([²³]|\^[012]\.5)?( log T)?", choose.growth(entry, "time")), name
        assert choose.growth(entry, "state") or not entry["supports"]["streaming"] or not entry["cost"]["state"], name
    assert {row.split(" ")[1] for row in choose.families().splitlines()[2:]} == {e["family"] for e in entries.values()}


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages.all_pages()


def test_every_mechanism_has_a_page_with_all_that_its_card_says(made: dict[str, str]) -> None:
    for entry in index.entries():
        text = made[f"mechanisms/{entry['name']}.md"]
        card = regard.card(entry["name"])
        assert text.startswith(f"# {entry['name']}\n\n")
        assert entry["equation"] in text
        for paper in entry["papers"]:
            assert (paper["url"] or paper["ref"]) in text
        for option in card.options:
            row = re.search(rf"^\| `{option}` \| (.*) \|$", text, re.MULTILINE)
            assert row, (entry["name"], option)
            assert card.defaults.get(option, "").split(",")[0] in row[1]
        assert all(path in text for path in re.findall(r"tests/[\w/]+\.py", entry["claim"]))
        assert text.count("\n- ") >= len(card.differs) + len(card.exceptions)
        assert f'"src/{card.builder.__module__.replace(".", "/")}.py"' in text
        seen = entry["form"] != "function" and entry["protocol"] in BUILT and entry["protocol"] != "Loss"
        assert ("<svg" in text) == seen, entry["name"]
        assert f"[{entry['name']}]({entry['name']}.md)" in made["mechanisms/index.md"]


def test_the_code_of_these_pages_runs(made: dict[str, str]) -> None:
    ran = 0
    for page, text in made.items():
        for _, code in blocks(text, "python") if page.startswith("mechanisms/") else ():
            space: dict[str, object] = {}
            exec(compile(code, page, "exec"), space)
            assert isinstance(space["y"], torch.Tensor), page
            ran += 1
    assert ran > len(choose.choosable()) * 3 / 4


def test_pictures_show_what_is_seen(made: dict[str, str]) -> None:
    """Nothing above the diagonal of what is causal; a window's mask is the window's."""
    for name in ("alibi", "window", "linear", "mega"):
        for drawn in re.findall(r'<svg class="heat" viewBox="0 0 (\d+) \1".*?</svg>', made[f"mechanisms/{name}.md"]):
            assert int(drawn) in (12, 16, 24)
        svgs = re.findall(r'<svg class="heat".*?</svg>', made[f"mechanisms/{name}.md"])
        runs = [tuple(map(int, run)) for svg in svgs for run in re.findall(r"M(\d+) (\d+)h(\d+)v1", svg)]
        assert runs
        assert all(first + length <= row + 1 for first, row, length in runs), name
    mask = re.search(r'<svg class="heat" viewBox="0 0 24 24".*?</svg>', made["mechanisms/window.md"])
    assert mask is not None
    width = regard.card("window").example["window"]
    runs = [tuple(map(int, run)) for run in re.findall(r"M(\d+) (\d+)h(\d+)v1", mask[0])]
    assert sorted(runs, key=lambda run: run[1]) == [(max(0, i - width + 1), i, min(i + 1, width)) for i in range(24)]


def test_what_a_page_would_fetch_is_found() -> None:
    """`make docs` refuses such pages."""
    here = '<link rel="canonical" href="https://a.b/"><a href="https://a.b">x</a><img src="a.png"><script src="a.js">'
    assert pages.loaded(here) == []
    for tag in (
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css?family=Roboto">',
        "<link href=//a.b/icon.png rel=icon>",
        '<script src="https://unpkg.com/iframe-worker/shim">',
        "<img alt=x src='http://a.b/c.png'>",
        "url(https://a.b/font.woff2",
    ):
        assert pages.loaded(f"{here}{tag})") == [tag]


# --- links and names ----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What headings are called in addresses."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", LINKING, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dates = {f"mechanisms/{entry['name']}.md" for entry in index.entries()} | {"mechanisms/index.md", *pages.FROM_ROOT}
    plain = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        if page.parent == DOCS and path in dates:
            continue
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert page.parent != DOCS or found.resolve().is_relative_to(DOCS), f"{page.name}: {target} is not on the site"
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_links_of_made_pages_lead_somewhere(made: dict[str, str]) -> None:
    known = {*made, *(page.name for page in DOCS.glob("*.md"))}
    for page, text in made.items():
        if page.startswith("mechanisms/"):
            body = text.partition("\n## Source\n")[0]
            for target in re.findall(r"\]\(([\w./]+\.md)\)", body):
                assert str(Path("mechanisms", target)).replace("mechanisms/../", "") in known, (page, target)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(
        [*(page.name for page in DOCS.glob("*.md")), "mechanisms/index.md", *pages.FROM_ROOT]
    )


def test_the_api_names_what_can_be_imported() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    told = re.findall(r"^::: (\S+)(?:\n    options: \{ members: \[([^\]]*)\])?", text, re.MULTILINE)
    assert len(told) > 20
    for name, members in told:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        for member in filter(None, members.split(", ")):
            assert hasattr(found, member) or member in found.__dataclass_fields__, f"{name}.{member}"
    rooms = {"heads", "inspect", "kinds", "laws", "masks", "normalizers", "positions", "scores", "stages"}
    public = {name for name in regard.__all__ if name[0].islower()} - rooms - {"analyses", "card"}
    assert {f"regard.{name}" for name in public} <= {name for name, _ in told}, "a public function that the page lacks"


def test_the_commands_and_variables_are_all_told() -> None:
    known = {found.name or found.callback.__name__ for found in cli.app.registered_commands}  # type: ignore[union-attr]
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `regard (\w+)", text, re.MULTILINE)) == known
    # What a process takes out of its environment was put there by the one that started it, and is nobody's setting.
    setting = re.compile(r"environ(?!\.pop)\S*?[(\[]\"(\w+)")
    read = {name for path in (ROOT / "src").rglob("*.py") for name in setting.findall(path.read_text("utf-8"))}
    assert read <= set(re.findall(r"^\| `(\w+)=", text, re.MULTILINE)), "every environment variable is in the table"


def test_the_readme_knows_how_many_mechanisms_a_plain_compare_trains() -> None:
    words = ("none", "one", "two", "three", "four", "five", "six")
    assert f"trains {words[len(tasks.find('text').mechanisms())]} mechanisms" in (ROOT / "README.md").read_text()

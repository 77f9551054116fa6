"""The command line: `regard` and `python -m regard`. It parses, calls the library and prints.

Torch and the library are imported inside the commands, so that help comes at once.
"""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from regard import terminal

if TYPE_CHECKING:
    from regard.kernels import Plan

MISTAKE = 2
"""Exit code for what the caller can put right."""


class Commands(TyperGroup):
    """Mistakes of the caller end in one line on stderr; REGARD_TRACEBACK=1 shows where they came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader has left; typer ends quietly
        except (ValueError, TypeError, OSError, ImportError) as error:
            if os.environ.get("REGARD_TRACEBACK", "") not in ("", "0"):
                raise
            terminal.error(_reason(error))
            raise typer.Exit(MISTAKE) from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Every attention mechanism worth knowing: list and compare them, and see what runs and why.",
)


def _version(asked: bool) -> None:
    if asked:
        from regard import __version__

        print(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]
Family = Annotated[str | None, typer.Option(help="Only this family, e.g. positions.")]
Batch = Annotated[int, typer.Option(min=1, help="B, sequences.")]
Heads = Annotated[int, typer.Option(min=1, help="H, query heads.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="G, key heads, dividing H (default: H).")]
Length = Annotated[int, typer.Option(min=1, max=2**20, help="T, queries.")]
Keys = Annotated[int | None, typer.Option(min=1, max=2**20, help="S, keys (default: T).")]
Width = Annotated[int, typer.Option(min=1, help="D, the width of a head.")]


@app.command("list")
def list_(
    family: Family = None,
    task: Annotated[str | None, typer.Option(help="Show which can do this task of compare, and why not.")] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the mechanisms."""
    from regard import catalog, catalog_page

    named = catalog.names(family) if task is None else catalog.mechanisms(family)
    cards = [catalog.card(name) for name in named]
    if task is not None:
        if markdown:
            raise ValueError("list: the Markdown table has no column for a task; leave --markdown or --task out")
        reasons = _reasons([card.name for card in cards], task)
        if as_json:
            _print_json([{**catalog_page.data(card), "why_not": reasons[card.name]} for card in cards])
            return
        grid = terminal.grid("name", "family", "fits", "why not")
        for card in cards:
            why = reasons[card.name]
            grid.add_row(card.name, card.family, "no" if why else "yes", terminal.line("; ".join(why)))
        terminal.show(grid, "")
        fit = sum(not why for why in reasons.values())
        terminal.show(terminal.line(f"{fit} of {len(cards)} mechanisms can do the task {task}"))
    elif as_json:
        _print_json([catalog_page.data(card) for card in cards])
    elif markdown:
        print(catalog_page.markdown(cards))
    else:
        terminal.show(catalog_page.table(cards), "")
        terminal.show(*catalog_page.LEGEND, style="dim")
        terminal.show(catalog_page.count(cards, families=family is None))


def _reasons(names: list[str], task: str) -> dict[str, list[str]]:
    """Mechanism -> why it cannot do the task at the task's own size; [] if it can."""
    from regard import tasks
    from regard.bench.fitting import sizes, why_not
    from regard.models.mixer import parse

    asked = parse(task)
    made = tasks.make(asked.name, asked.options)
    return {name: why_not(made, parse(name), sizes(made)) for name in names}


@app.command()
def show(
    mechanism: Annotated[str, typer.Argument(metavar="NAME", help="A name, or 'window(window=8)' with options.")],
    length: Annotated[int, typer.Option(min=1, help="T = S, tokens, for the numbers of the cost.")] = 1024,
    heads: Annotated[int, typer.Option(min=1, help="H = G, heads, likewise.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="D = V, the width of a head, likewise.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="B, sequences, likewise.")] = 1,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of what a query may see to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known about a mechanism: equation, paper, support, cost, picture."""
    from rich.text import Text

    from regard import catalog, catalog_page
    from regard.models.mixer import parse

    spec = parse(mechanism)
    if "+" in spec.name:
        raise ValueError(f"show: {spec.name!r} joins several mechanisms; show them one by one")
    card = catalog.card(spec.name)
    module = catalog_page.small(card, spec.options)
    cost = catalog_page.costs(card, spec.options, batch=batch, heads=heads, length=length, width=width)
    if svg is not None:
        field = catalog_page.field(module)
        if field is None:
            raise ValueError(f"show: {card.name} has no mask that could be drawn; leave --svg out")
        svg.write_text(field.svg(), encoding="utf-8")
    drawing = catalog_page.picture(module)
    if as_json:
        _print_json({**catalog_page.data(card), "cost": {**catalog_page.data(card)["cost"], "numbers": cost}})
        return
    terminal.show(Text(card.name, "bold cyan") + Text(f"  ({card.family})", "dim"), card.gist)
    for heading, lines in catalog_page.page(card, spec.options, cost, drawing):
        terminal.show("", Text(heading, "bold"))
        if heading == "picture":  # drawn to scale, so cut and not wrapped
            terminal.show(*(f"  {text}" for text in lines), cut=True)
        else:
            terminal.show(*(terminal.indented(text) for text in lines))
    if svg is not None:
        print(terminal.line(f"\npicture: {svg}"))


class Dtype(StrEnum):
    """What tensors may hold."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


@app.command()
def plan(
    batch: Batch = 1,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    length: Length = 1024,
    keys: Keys = None,
    width: Width = 64,
    dtype: Annotated[
        Dtype, typer.Option(metavar="DTYPE", help="float32, float16, bfloat16 or float64.")
    ] = Dtype.float32,
    mechanism: Annotated[
        str | None,
        typer.Option(help="Plan this mechanism instead of plain attention, e.g. alibi or entmax+rotary."),
    ] = None,
    causal: Annotated[bool, typer.Option("--causal/--bidirectional", help="Whether queries see later keys.")] = True,
    window: Annotated[int | None, typer.Option(min=1, help="Keys that a query sees, its own included.")] = None,
    dropout: Annotated[float, typer.Option(help="Probability of dropping a weight.")] = 0.0,
    kernel: Annotated[str, typer.Option(help="A kernel by name, to see whether it can run.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which kernel will run, and why not the others. Runs nothing and takes no memory."""
    G, S = heads if kv_heads is None else kv_heads, length if keys is None else keys
    sizes = {"B": batch, "H": heads, "G": G, "T": length, "S": S, "D": width}
    found = _plan(sizes, dtype.value, mechanism, causal, window, dropout, kernel)
    if as_json:
        _print_json({"kernel": found.kernel, "because": found.because, "why_not": found.why_not, "sizes": sizes})
        return
    asked = [mechanism or "softmax attention", "causal" if causal else "bidirectional"]
    asked += [f"window {window}"] * (window is not None) + [dtype.value]
    terminal.show(terminal.line(f"{', '.join(asked)}; {', '.join(f'{n}={size}' for n, size in sizes.items())}"))
    grid = terminal.grid(4, 0, 0)
    grid.add_row("runs", found.kernel, found.because, style="bold green")
    for name, reasons in found.why_not.items():
        grid.add_row("not", name, "; ".join(reasons))
    terminal.show(grid)


def _plan(
    sizes: dict[str, int],
    dtype_name: str,
    mechanism: str | None,
    causal: bool,
    window: int | None,
    dropout: float,
    kernel: str,
) -> "Plan":
    import torch

    import regard
    from regard import catalog, masks
    from regard.models.mixer import parse

    B, H, G, T, S, D = sizes.values()
    dtype = getattr(torch, dtype_name)
    mask = masks.causal() if causal else None
    if window is not None:
        mask = masks.window(window) if mask is None else mask & masks.window(window)
    if mechanism is None:
        q, k, v = (torch.empty(B, n, m, D, dtype=dtype, device="meta") for n, m in ((H, T), (G, S), (G, S)))
        return regard.plan(q, k, v, mask=mask, dropout=dropout, kernel=kernel)
    spec = parse(mechanism)
    if not all(catalog.card(part).is_part for part in spec.name.split("+")):
        raise ValueError(f"plan: {mechanism} is a layer of its own, not a pipeline; there is no kernel to choose")
    settings: dict[str, Any] = {**spec.options, "device": "meta", "dtype": dtype}
    settings |= {"causal": causal, "num_kv_heads": None if G == H else G, "head_dim": D, "dropout": dropout}
    settings |= {} if kernel == "auto" else {"kernel": kernel}
    module = regard.create(spec.name, dim=H * D, num_heads=H, **settings)
    assert isinstance(module, regard.Attention)
    sizes["G"] = module.num_kv_heads  # what the mechanism makes of it
    x, context = (torch.empty(B, n, H * D, dtype=dtype, device="meta") for n in (T, S))
    own = None if window is None else masks.window(window)
    return module.plan(x, None if T == S else context, mask=own)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine offers: versions, devices, kernels that run, extras and what is missing."""
    from dataclasses import asdict
    from itertools import groupby

    from rich.text import Text

    from regard.doctor import examine

    findings = examine()
    if as_json:
        _print_json([asdict(finding) for finding in findings])
        return
    indent = max(len(finding.name) for finding in findings) + 2
    style = {"ok": "green", "no": "yellow", "fact": None}
    for topic, some in groupby(findings, key=lambda finding: finding.topic):
        grid = terminal.grid(indent, 2, 0)
        for finding in some:
            mark = "" if finding.state == "fact" else finding.state
            grid.add_row(f"  {finding.name}", mark, terminal.line(finding.text), style=style[finding.state])
        terminal.show(Text(topic, "bold"), grid)


class Match(StrEnum):
    """What a comparison holds equal."""

    params = "params"
    flops = "flops"


class Comparison(TyperCommand):
    """Help that shows the tasks and the defaults, which stand in CompareConfig and with the tasks alone."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from regard import tasks
        from regard.bench.config import CompareConfig

        text = tasks.find("text")
        for option in self.params:
            name = str(option.name)
            value = getattr(CompareConfig, name, None)
            of_task = getattr(text.defaults, name, getattr(text, name, None) if name == "length" else None)
            if not isinstance(option, TyperOption):
                continue
            if name == "task":
                option.help = f"{', '.join(tasks.names())}; with options in brackets: 'mqar(pairs=(4, 8))'."
            for found, of in ((value, ""), (of_task, " for text")):
                if found not in (None, (), False):
                    option.default = (", ".join(map(str, found)) if isinstance(found, tuple) else str(found)) + of
        super().format_help(ctx, formatter)


@app.command(cls=Comparison)
def compare(
    task: Annotated[str | None, typer.Option(help="What is learned; each has defaults of its own.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A file or folder to train on; may be repeated (default: Python's own sources and docs)."),
    ] = None,
    mechanisms: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between, options in brackets: softmax,'window(window=64)',gated+rotary; "
            "or all, for every one that fits the task."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of a cell.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds with commas between, e.g. 0,1,2.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence: bytes, for text.")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    depth: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of a layer.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    match: Annotated[Match | None, typer.Option(help="What is equal to the baseline's, mostly softmax.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; the same command resumes there.")] = None,
    checkpoint: Annotated[bool, typer.Option("--checkpoint/--no-checkpoint", help="Keep the trained models.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a cell counts as failed.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells again that failed earlier.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a cell (default: all, at most 8).")] = None,
) -> None:
    """Train mechanisms on the same task at equal budget; print a table and write report.html.

    Exit code: 0 all done, 3 some cells failed, 130 or 143 stopped (the same command goes on).
    """
    from regard.bench.compare import run
    from regard.bench.config import CompareConfig
    from regard.models.mixer import split

    given: dict[str, Any] = {
        "task": task,
        "text": text,
        "mechanisms": None if mechanisms is None else split(mechanisms),
        "steps": steps,
        "seeds": None if seeds is None else _integers("seeds", seeds),
        "batch": batch,
        "length": length,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "lr": lr,
        "match": None if match is None else match.value,
        "out": out,
        "device": device,
        "timeout": timeout,
        "threads": threads,
    }
    # Defaults stand in one place: in CompareConfig.
    config = CompareConfig(
        checkpoint=checkpoint, retry_failed=retry_failed, **{k: v for k, v in given.items() if v is not None}
    )
    raise typer.Exit(run(config))


@app.command()
def profile(
    mechanisms: Annotated[
        str | None,
        typer.Option(help="Names with commas between (default: the baseline, and those whose cards name profile)."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens: 1k..32k doubles, 500,1k,3k lists.")] = "1k..8k",
    dim: Annotated[int, typer.Option(help="M, the model width.")] = 256,
    heads: Heads = 4,
    batch: Batch = 1,
    causal: Annotated[bool, typer.Option("--causal/--bidirectional", help="Whether later tokens are seen.")] = True,
    limit: Annotated[float, typer.Option(help="Seconds that a cell may take.")] = 60.0,
    threads: Annotated[int, typer.Option(help="CPU threads of a cell (default: all, at most 8).")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of profile.json and report.html.")] = Path("runs/profile"),
) -> None:
    """Measure time and memory over lengths, each cell in its own process, and how they grow."""
    from regard.bench.profile import Profile
    from regard.bench.profile import lengths as read
    from regard.bench.profile_page import command
    from regard.models.mixer import split

    config = Profile(
        tuple(split(mechanisms or "")), read(lengths), dim, heads, batch, causal, limit, threads, device, out
    )
    raise typer.Exit(command(config))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a comparison.")],
    out: Annotated[Path | None, typer.Option(help="The file to write (default: FOLDER/report.html).")] = None,
) -> None:
    """Write the report of a comparison again, from its stored results."""
    from regard.bench.report import write
    from regard.bench.store import read

    path = write(read(folder), folder / "report.html" if out is None else out)
    print(terminal.line(f"report: {path}"))


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file that compare --checkpoint kept.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    count: Annotated[int, typer.Option("--bytes", help="Bytes to write.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte; higher is more varied.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many likeliest bytes only.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    mechanism: Annotated[
        str | None,
        typer.Option(help="Needed for a model with your own mechanism: its name, as a sign of trust."),
    ] = None,
) -> None:
    """Continue a text with a trained model."""
    import codecs

    from regard.bench.generate import generate as continued

    drawn = continued(
        checkpoint, prompt, count=count, temperature=temperature, top_k=top_k, seed=seed, mechanism=mechanism
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(terminal.clean(prompt), end="")
    for piece in drawn:
        print(terminal.clean(decoder.decode(piece)), end="", flush=True)
    print(terminal.clean(decoder.decode(b"", final=True)))


@app.command()
def explain(
    text: Annotated[str | None, typer.Option(help="What the model reads.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_DIR",
            help="A transformers model, or one of compare --checkpoint (default: the newest of these in runs).",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="What the model sees.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers, with commas between, e.g. 0,5.")] = None,
    swap: Annotated[
        str | None, typer.Option(metavar="MECHANISM", help="Show the model with this attention beside its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("attention.html"),
) -> None:
    """Show what a model attends to, as a page with every layer and head."""
    from regard.inspect.explain import explain as explained

    chosen = None if layers is None else _integers("layers", layers)
    explained(
        text, model=model, image=image, layers=chosen, swap=swap, out=out, say=lambda words: print(terminal.line(words))
    )


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between, got {text!r}") from None


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def main() -> None:
    """The entry point of `regard`."""
    terminal.tolerate_encoding()
    app(prog_name="regard")

"""`regard plan`: which kernel will run for a size, and why not the others."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard import terminal
from regard.cli.arguments import AsJson, Batch, Heads, print_json
from regard.cli.group import Command, app

if TYPE_CHECKING:
    from regard.kernels import Plan


class Dtype(StrEnum):
    """What tensors may hold."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


class Device(StrEnum):
    """Where tensors may be."""

    cpu = "cpu"
    cuda = "cuda"


@app.command("plan", cls=Command)
def plan(
    batch: Batch = 1,
    heads: Heads = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="G, key heads, dividing H (default: H).")] = None,
    length: Annotated[int, typer.Option(min=1, max=2**20, help="T, queries.")] = 1024,
    keys: Annotated[int | None, typer.Option(min=1, max=2**20, help="S, keys (default: T).")] = None,
    width: Annotated[int, typer.Option(min=1, help="D, the width of a head.")] = 64,
    dtype: Annotated[
        Dtype, typer.Option(metavar="DTYPE", help="float32, float16, bfloat16 or float64.")
    ] = Dtype.float32,
    mechanism: Annotated[
        str | None,
        typer.Option(help="Plan this mechanism instead of plain attention, e.g. alibi or entmax+rotary."),
    ] = None,
    causal: Annotated[bool, typer.Option("--causal/--bidirectional", help="Whether queries see no later keys.")] = True,
    window: Annotated[int | None, typer.Option(min=1, help="Keys that a query sees, its own included.")] = None,
    dropout: Annotated[float, typer.Option(help="Probability of dropping a weight.")] = 0.0,
    device: Annotated[
        Device, typer.Option(metavar="DEVICE", help="cpu, or cuda: no GPU need be here, but what is installed counts.")
    ] = Device.cpu,
    kernel: Annotated[str, typer.Option(help="A kernel by name, to see whether it can run.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which kernel will run, and why not the others. Runs nothing and takes no memory."""
    G, S = heads if kv_heads is None else kv_heads, length if keys is None else keys
    sizes = {"B": batch, "H": heads, "G": G, "T": length, "S": S, "D": width}
    found = _plan(sizes, dtype.value, mechanism, causal, window, dropout, kernel, device.value)
    if as_json:
        print_json(
            {"kernel": found.kernel, "because": found.because, "why_not": found.why_not}
            | {"sizes": sizes, "device": device.value}
        )
        return
    asked = [mechanism or "softmax attention", "causal" if causal else "bidirectional"]
    asked += [f"window {window}"] * (window is not None) + [dtype.value, device.value]
    terminal.show(terminal.line(f"{', '.join(asked)}; {', '.join(f'{n}={size}' for n, size in sizes.items())}"))
    columns = (terminal.Column(""), terminal.Column("kernel"), terminal.Column("why", least=24))
    rows = [("runs", found.kernel, found.because)]
    rows += [("not", name, "; ".join(reasons)) for name, reasons in found.why_not.items()]
    _, runs, *others = terminal.joined(terminal.fitted(columns, rows))
    terminal.show(runs, style="bold green")
    print("\n".join(others))


def _plan(
    sizes: dict[str, int],
    dtype_name: str,
    mechanism: str | None,
    causal: bool,
    window: int | None,
    dropout: float,
    kernel: str,
    device: str,
) -> "Plan":
    import torch

    import regard
    from regard import catalog, masks
    from regard.kernels import choose
    from regard.pipeline.function import problem
    from regard.spec import parse

    B, H, G, T, S, D = sizes.values()
    dtype = getattr(torch, dtype_name)
    mask = masks.causal() if causal else None
    if window is not None:
        mask = masks.window(window) if mask is None else mask & masks.window(window)
    if mechanism is None:
        q, k, v = (torch.empty(B, n, m, D, dtype=dtype, device="meta") for n, m in ((H, T), (G, S), (G, S)))
        return choose(problem(q, k, v, mask=mask, dropout=dropout), kernel, device)
    spec = parse(mechanism)
    if not all(catalog.card(name).is_part for name in spec.names):
        raise ValueError(f"plan: {mechanism} is a layer of its own, not a pipeline; there is no kernel to choose")
    settings: dict[str, Any] = {"device": "meta", "dtype": dtype}
    settings |= {"causal": causal, "num_kv_heads": None if G == H else G, "head_dim": D, "dropout": dropout}
    settings |= {} if kernel == "auto" else {"kernel": kernel}
    module = regard.create(str(spec), dim=H * D, num_heads=H, **settings)
    assert isinstance(module, regard.Attention)
    sizes["G"] = module.num_kv_heads  # what the mechanism makes of it
    x, context = (torch.empty(B, n, H * D, dtype=dtype, device="meta") for n in (T, S))
    own = None if window is None else masks.window(window)
    return module.plan(x, None if T == S else context, mask=own, device=device)

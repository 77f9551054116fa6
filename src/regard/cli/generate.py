"""`regard generate`: text from a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from regard import terminal
from regard.cli.group import Command, app


@app.command("generate", cls=Command)
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

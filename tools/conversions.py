"""The table of layers that regard loads from other libraries: each with the largest difference of its outputs.

    python tools/conversions.py            # Markdown; of the libraries that are installed

A small random layer of each class in float64 against what `regard.convert_layer` makes of it, on padded inputs. Where
theirs computes something in float32 (angles, norms, a softmax), the difference is of that size.
"""

import sys
from pathlib import Path

import torch

import regard

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from integrations import conversions


def row(name: str, mechanisms: tuple[str, ...]) -> str:
    made = conversions.case(name)
    with torch.no_grad():
        ours, theirs = made.outputs(regard.convert_layer(made.theirs), made.theirs)
    kind, difference = name.split(" ")[1], (ours - theirs).abs().max()
    return f"| {kind} | {' + '.join(mechanisms)} | {difference:.0e} | {'yes' if made.exact else 'no'} |"


def main() -> None:
    before = ""
    for name in conversions.names():
        library = name.split(" ")[0]
        if library != before:
            head = "| class | mechanisms | difference | back |"
            print(f"\n## {library}\n\n{head}\n|---|---|---|---|".lstrip("\n" if not before else ""))
            before = library
        print(row(name, regard.convertible()[name]))


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    main()

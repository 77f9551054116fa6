"""The table of layers that regard loads from other libraries: each with the largest relative difference of its outputs.

    python tools/conversions.py            # Markdown; of the libraries that are installed

A small random layer of each class in float64 against what `regard.convert_layer` makes of it, on padded inputs. The
difference is relative to 1 + the largest output. Where theirs computes something in float32 (angles, norms, a softmax),
it is of that size; the last column has the same with float64 in these places. Progress goes to stderr.
"""

import sys
import time
import warnings
from pathlib import Path

import torch

import regard

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from integrations import conversions

HEAD = ("library", "class", "mechanisms", "weights back", "difference", "theirs all in float64")


def row(name: str, mechanisms: tuple[str, ...]) -> tuple[str, ...]:
    made = conversions.case(name)
    library, kind = name.split(" ")
    plain, wide = (conversions.difference(made, wide=wide) for wide in (False, True))
    back = "bit by bit" if made.exact else "no"
    return library, f"`{kind}`", " + ".join(mechanisms), back, f"{plain:.0e}", f"{wide:.0e}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEAD)} |\n|---|---|---|---|---:|---:|")
    names, start = conversions.names(), time.perf_counter()
    for n, name in enumerate(names, 1):
        print(f"| {' | '.join(row(name, regard.convertible()[name]))} |", flush=True)
        print(f"{n} of {len(names)}, {time.perf_counter() - start:.0f} s: {name}", file=sys.stderr)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # what theirs has to say of such small layers
    main()

"""What must run where only `pip install regard` was run: none of the extras, and no compiler.

`make bare` runs it in a fresh environment; tests/test_bare.py where each extra is made to fail in turn. With --native,
as `make release` runs it, the wheel must have brought the C++ kernels too.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

EXTRAS = ("triton", "scipy", "sklearn", "transformers", "plotly", "plotext", "torch_geometric", "entmax", "PIL")
COMMANDS = (
    "--help",
    "list",
    "list --family positions --json",
    "list --task mqar",
    "show kerple",
    "show performer",
    "show attention_rollout",
    "doctor",
    "plan --length 4096 --window 64",
    "plan --mechanism alibi",
    "compare --task mqar --mechanisms softmax,linear --steps 20 --seeds 0 --dim 32 --depth 1 --heads 2 --threads 1",
    "compare --task mqar --mechanisms softmax,linear --steps 20 --seeds 0 --dim 32 --depth 1 --heads 2 --threads 1",
)
CREATE = """
import torch, regard
for name in regard.mechanisms():
    card = regard.card(name)
    causal = "bidirectional" not in card.supports
    sizes = {"dim": 24, "num_heads": 6} if card.is_part or card.takes("dim") or card.takes("num_heads") else {}
    regard.create(name, **sizes, causal=causal, **card.example)
q = torch.randn(1, 2, 64, 8)
for kernel in ("auto", "eager", "chunked", "sdpa", "block_sparse"):
    mask = regard.masks.causal() & regard.masks.window(8)
    out = regard.attention(q, q, q, mask=mask, kernel=kernel)
print(len(regard.mechanisms()), "mechanisms are built")
"""
NATIVE = """
import torch, regard
from regard.kernels.native import build, recipe
if isinstance(ready := recipe.ready(), str):
    print("no C++ kernels:", ready)
else:
    q, k, v = torch.randn(3, 1, 4, 700, 32)
    mask = regard.masks.causal() & regard.masks.window(100)
    out, expected = (regard.attention(q, k, v, mask=mask, kernel=kernel) for kernel in ("native", "eager"))
    torch.testing.assert_close(out, expected)
    assert build.library()._name == str(ready)
    print("C++ kernels run:", ready.name)
"""


def run(*command: str, env: dict[str, str], folder: Path) -> str:
    """The output; ends with what was said where the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def main() -> None:
    """Run everything here, as it would be without a compiler."""
    present = [name for name in EXTRAS if installed(name)]
    env = {**os.environ, "CXX": "", "PATH": str(Path(sys.executable).parent), "COLUMNS": "80"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        env["REGARD_CACHE"] = str(folder / "cache")
        print(run(sys.executable, "-c", CREATE, env=env, folder=folder).strip())
        (folder / "a file").touch()  # below which nobody can write
        nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "REGARD_CACHE"), str(folder / "a file" / "below"))
        print(native := run(sys.executable, "-c", NATIVE, env=env | nowhere, folder=folder).strip())
        if "--native" in sys.argv[1:] and not native.startswith("C++ kernels run:"):
            sys.exit("the wheel must have brought C++ kernels for this processor")
        for command in COMMANDS:
            out = run(sys.executable, "-m", "regard", *command.split(), env=env, folder=folder)
            assert out.strip(), command
            print(f"regard {command.partition(' --steps')[0]}: {len(out.splitlines())} lines")
        assert (folder / "runs" / "compare" / "results.db").is_file()
    print(f"regard {version('regard')}, torch {version('torch')}; of the extras: {', '.join(present) or 'none'}")
    print("no C++ compiler" if shutil.which("g++", path=env["PATH"]) is None else "a compiler was found")


def installed(name: str) -> bool:
    """Whether it imports."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()

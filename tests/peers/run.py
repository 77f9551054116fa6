"""Other libraries' own tests, with regard in their place and without: `make test-peers`, ARGS names some suites.

Tests come with the packages: from the sdist, which pip fetches into `.peers/`, or in the installed package.
"""

import importlib.util
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FETCHED = ROOT / ".peers"
if str(HERE.parent) not in sys.path:
    sys.path.append(str(HERE.parent))  # run as a script

from peers.table import Result, differences, report, results  # noqa: E402


@dataclass(frozen=True)
class Suite:
    """Tests of one package."""

    package: str
    tests: str
    """Files: in this folder, "{sdist}" or "{installed}"."""
    plugin: str
    """Puts regard in the package's place."""


SUITES = {
    "transformers": Suite("transformers", "transformers_models.py", "transformers_swapped"),
    "generation, ours": Suite("transformers", "transformers_generation.py", "transformers_swapped"),
    "entmax": Suite("entmax", "{installed}/test_*.py", "entmax_replaced"),
    "torch_geometric, ours": Suite("torch_geometric", "geometric_layers.py", "geometric_replaced"),
    "local-attention": Suite("local-attention", "{sdist}/tests/test_*.py", "local_attention_replaced"),
}
SDISTS = ("transformers", "local-attention")


def sdist(package: str) -> Path:
    """The folder with the tests of the installed version, fetched on first use."""
    pinned = f"{package}=={version(package)}"
    folder = FETCHED / pinned.replace("==", "-").replace("local-attention", "local_attention")
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package, pinned]
        subprocess.run([*pip, "--dest", str(FETCHED)], check=True)
        with tarfile.open(f"{folder}.tar.gz") as packed:
            wanted = [m for m in packed.getmembers() if m.name.startswith(f"{folder.name}/tests/")]
            packed.extractall(FETCHED, wanted, filter="data")
    return folder


def start(suite: Suite, junit: Path, *, regard: bool) -> subprocess.Popen[bytes]:
    """pytest on one thread, apart from this project's own configuration and fixtures."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    places = {"sdist": FETCHED, "installed": FETCHED}
    if suite.package in SDISTS:
        places["sdist"] = sdist(suite.package)
        env["PEERS"] = str(places["sdist"])
    spec = importlib.util.find_spec(suite.package.replace("-", "_"))
    if spec is not None and spec.origin is not None:
        places["installed"] = Path(spec.origin).parent
    pattern = HERE / suite.tests.format(**places)  # an absolute path takes the place of HERE
    plugins = ["peers.counting", *([f"peers.{suite.plugin}"] if regard else [])]
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={ROOT}", "--noconftest", "-q"]
    command += ["-p", "no:cacheprovider", "--timeout=300", f"--junitxml={junit}", "-W", "ignore", "--tb=short"]
    command += [f"-p{plugin}" for plugin in plugins]
    command += sorted(str(path) for path in pattern.parent.glob(pattern.name))
    log = junit.with_suffix(".log").open("wb")
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def main(asked: Sequence[str]) -> int:
    """Print the table; 1 where a test ends worse with regard and no reason is given."""
    if unknown := [name for name in asked if not any(key.startswith(name) for key in SUITES)]:
        print(f"test-peers: suites are unknown (got {', '.join(unknown)}); expected some of {', '.join(SUITES)}")
        return 2
    FETCHED.mkdir(exist_ok=True)
    known = differences((HERE / "differences.txt").read_text())
    runs: dict[str, tuple[dict[str, Result], dict[str, Result]]] = {}
    for name, suite in SUITES.items():
        if asked and not any(name.startswith(each) for each in asked):
            continue
        started = time.monotonic()
        files = {side: FETCHED / f"{name.partition(',')[0]}-{side}.xml" for side in ("with", "without")}
        for file in files.values():
            file.unlink(missing_ok=True)
        both = [start(suite, file, regard=side == "with") for side, file in files.items()]
        for process in both:
            process.wait()
        runs[name] = (results(files["with"]), results(files["without"]))
        took, log = time.monotonic() - started, files["with"].with_suffix(".log").relative_to(ROOT)
        print(f"{name}: {took:.0f} s; what pytest said is in {log}", flush=True)
    text, well = report(runs, known)
    print(f"\n{text}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

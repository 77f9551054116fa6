"""What this machine offers: versions, devices, kernels that really run, extras, and what is missing."""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    topic: str
    name: str
    state: Literal["ok", "no", "fact"]
    text: str


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown. Raises nothing: what fails is a finding."""
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that the C++ kernels could not be built is a finding too
    try:
        with warnings.catch_warnings():
            # Torch's of missing drivers, flex's that it is not compiled: told as findings.
            warnings.simplefilter("ignore")
            return [*_versions(), *_devices(), *_kernels(), *_extras(), *_surroundings()]
    finally:
        logging.disable(quiet)


def _versions() -> list[Finding]:
    import torch

    from regard import __version__

    system = f"{platform.python_version()} ({platform.python_implementation()})"
    system += f", {platform.system()} {platform.machine()}"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    found = {"regard": __version__, "python": system, "torch": torch.__version__, "threads": threads}
    return [Finding("versions", name, "fact", text) for name, text in found.items()]


def _devices() -> list[Finding]:
    import torch

    # Newer versions of torch say what the processor can do; older ones only which of its own builds they use.
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    wanted = {"avx512_bf16": "AVX512-BF16", "amx_tile": "AMX", "sve2": "SVE2", "bf16": "BF16"}
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
    extra = [words for name, words in wanted.items() if told.get(name)]
    found = [Finding("devices", "cpu", "fact", ", ".join([capability, *extra]))]
    for n in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(n)
        memory = f"{known.total_memory / 2**30:.1f} GiB"
        text = f"{known.name}, {memory}, compute capability {known.major}.{known.minor}"
        found.append(Finding("devices", f"cuda:{n}", "ok", text))
    if torch.backends.mps.is_available():
        found.append(Finding("devices", "mps", "ok", "Apple GPU"))
    if len(found) == 1:
        found.append(Finding("devices", "gpu", "no", "none that this torch can use; everything runs on the CPU"))
    return found


def _kernels() -> list[Finding]:
    """Each kernel on a small problem that it can run, on each device, against the eager one on the CPU."""
    import torch

    from regard import attention, masks
    from regard.kernels.pages import Pages
    from regard.kernels.plan import KERNELS, execute
    from regard.pipeline.function import problem

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 160, 32, generator=generator)
    picks = masks.chosen(torch.rand(1, 2, 160, 5, generator=generator) < 0.5, 160, 160, (1, 32))
    single = masks.listed(torch.randint(160, (1, 2, 160, 9), generator=generator), 160, 160)
    special = {
        "window": masks.causal() & masks.window(32),
        "neighborhood": masks.neighborhood((10, 16), 5),
        "grouped": masks.causal() & picks,
        "listed": masks.causal() & single,
    }
    found = []
    for device in ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]:
        for name in KERNELS:
            mask = special.get(name, masks.causal())
            given = (q[:, :, -1:] if name in ("decode", "few", "paged") else q, k, v)
            at = [t.to(device) for t in given]
            expected = attention(*given, mask=mask, kernel="eager")
            try:
                p = problem(*at, mask=mask)
                if name == "paged":
                    cut = [z[0].unflatten(1, (-1, 16)).transpose(0, 1).contiguous() for z in at[1:]]
                    p.pages = Pages(cut[0], cut[1], [torch.arange(10, dtype=torch.int32)], [0], [160], 160)
                if why := KERNELS[name].why_not(p):
                    found.append(Finding("kernels", f"{name} on {device}", "no", "; ".join(why)))
                    continue
                off = float((execute(p, name).cpu() - expected).abs().max())
            except Exception as error:  # whatever a broken driver or build throws is the finding
                reason = str(error).splitlines() or [type(error).__name__]
                found.append(Finding("kernels", f"{name} on {device}", "no", reason[0]))
                continue
            fine = off <= 1e-3  # TF32 and other devices' orders of summing; a wrong kernel is off by far more
            text = "runs" if fine else f"runs, but is wrong by {off:.2g}; use another kernel and report it"
            found.append(Finding("kernels", f"{name} on {device}", "ok" if fine else "no", text))
    return found


def _extras() -> list[Finding]:
    """Each extra of the package, and the command that installs it where something is missing."""
    try:
        wanted = importlib.metadata.requires("regard") or []
    except importlib.metadata.PackageNotFoundError:
        unknown = Finding("extras", "regard", "no", "not installed as a package, so its extras are unknown")
        return [unknown, *(Finding("extras", p, "ok" if _installed(p) else "no", use) for p, use in USES.items())]
    extras: dict[str, list[str]] = {}
    for requirement in wanted:
        if match := re.match(r"([\w.-]+).*;.*extra == ['\"]([\w.-]+)['\"]", requirement):
            extras.setdefault(match[2], []).append(re.sub(r"[-_.]+", "-", match[1]).lower())
    found = []
    for extra, packages in sorted(extras.items()):
        missing = [package for package in packages if not _installed(package)]
        about = f"{EXTRAS[extra]}: " if extra in EXTRAS else ""
        named = [p if about or p not in USES else f"{p} ({USES[p]})" for p in missing]
        text = f"pip install 'regard[{extra}]' for {about}{', '.join(named)}" if missing else f"{about}installed"
        found.append(Finding("extras", extra, "no" if missing else "ok", text))
    return found


EXTRAS = {
    "bench": "the peers that `make bench` measures",
    "dev": "what `make lint` runs",
    "docs": "the site, by `make docs`",
    "test": "what the tests need",
}
"""What those extras are for that no command of `regard` needs."""

USES = {
    "pillow": "images in explain",
    "plotext": "plots in the terminal, in profile",
    "plotly": "report.html",
    "scikit-learn": "the task digits, pictures of embeddings, some analyses",
    "scipy": "the task boxes, some analyses",
    "transformers": "swap, trace and explain on its models",
    "triton": "Triton's kernels on GPUs",
}
"""Package, in the spelling of indexes -> what it is for."""

_IMPORTED = {"pillow": "PIL", "scikit-learn": "sklearn", "pytest-xdist": "xdist"}
"""What a package is imported as, where that is not its name."""


def _installed(package: str) -> bool:
    """Whether it can be found; it is not imported."""
    return importlib.util.find_spec(_IMPORTED.get(package, package.replace("-", "_"))) is not None


def _surroundings() -> list[Finding]:
    found = []
    wanted = (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl")
    compiler = next((path for name in wanted if (path := shutil.which(name))), None)
    if compiler:
        found.append(Finding("surroundings", "compiler", "ok", compiler))
    else:
        found.append(
            Finding(
                "surroundings",
                "compiler",
                "no",
                "no C++ compiler on PATH; for regard's native kernels where it brings none, and torch.compile on CPUs",
            )
        )
    found.append(_compiled())
    try:
        with tempfile.TemporaryFile(dir="."):
            free = shutil.disk_usage(".").free / 2**30
        found.append(Finding("surroundings", "folder", "ok", f"{free:.0f} GiB free, {os.getcwd()} can be written"))
    except OSError as error:
        found.append(
            Finding(
                "surroundings",
                "folder",
                "no",
                f"the current folder cannot be written ({error.strerror}); give --out",
            )
        )
    return found


def _compiled() -> Finding:
    """Which compiled kernels are used, and why not the ones that a wheel brings."""
    from regard.kernels.native import build, cache

    name = "compiled kernels"
    if not isinstance(found := build.brought(), str):
        return Finding("surroundings", name, "ok", f"those that came with this installation: {Path(found._name).name}")
    if os.name != "posix":
        return Finding("surroundings", name, "no", f"{found}; they are built on Linux and macOS alone")
    try:
        folder = cache.chosen()
        with tempfile.TemporaryFile(dir=folder):
            return Finding("surroundings", name, "ok", f"kept in {folder}; {found}")
    except OSError as error:
        reason = str(error)
    try:
        return Finding("surroundings", name, "no", f"{reason}; kept in {cache.temporary()} (or set REGARD_CACHE)")
    except OSError as error:
        return Finding("surroundings", name, "no", f"{reason}; {error}; set REGARD_CACHE to a folder of your own")

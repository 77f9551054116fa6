"""The C++ kernels that a wheel brings: the same numbers as those compiled here, and nothing that can't be trusted."""

import json
import re
import subprocess
import sys
import types
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import regard
from kernels import test_native
from regard import doctor
from regard.kernels.native import build, recipe
from regard.positions import Alibi

ROOT = Path(__file__).parents[2]
SUITS = [v for v in recipe.VARIANTS.get(recipe.platform.machine(), ()) if v.needs <= recipe._features()]
pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {'; '.join(build.why_not())}")
here = pytest.mark.skipif(not SUITS, reason="this processor is of no class that a wheel has a library for")


@pytest.fixture(scope="module")
def hook():
    """hatch_build.py, where hatchling may be missing."""
    with pytest.MonkeyPatch.context() as patch:
        interface = types.SimpleNamespace(BuildHookInterface=object)
        patch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", interface)
        spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(hook, tmp_path_factory):
    """What a wheel brings."""
    folder = tmp_path_factory.mktemp("ready")
    hook.build(folder)
    return folder


def installed(monkeypatch, folder: Path) -> None:
    """As if this installation had these libraries."""
    monkeypatch.setattr(recipe, "READY", folder)
    monkeypatch.setattr(build, "brought", build.brought.__wrapped__)
    monkeypatch.setattr(build, "_load", build._load.__wrapped__)
    monkeypatch.setattr(build, "_here", build._here.__wrapped__)


ASKED = {
    "documents": lambda: test_native.test_long("documents"),
    "blocks by head": lambda: test_native.test_long("blocks by head"),
    "odd sizes": lambda: test_native.test_sizes((1, 6, 2, 129, 129, 111, 16)),
    "bias by distance": lambda: test_native.test_bias_by_distance(Alibi),
    "bfloat16": lambda: test_native.test_half("window", torch.bfloat16),
    "log-sum-exp": test_native.test_log_sum_exp,
    "entmax": lambda: test_native.test_entmax_rows(1.5, 700),
    "topk": lambda: test_native.test_topk_rows("random", 8, 700),
}


@here
@pytest.mark.parametrize(
    ("variant", "asked"),
    [
        pytest.param(variant, asked, marks=[] if n == 0 or asked == "documents" else pytest.mark.slow)
        for n, variant in enumerate(SUITS)
        for asked in ASKED
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_numbers_are_as_good_as_those_of_a_library_compiled_here(asked, variant, made, monkeypatch):
    """Against float64, by the tests of those. To the bit they need not agree: what fuses a product and a sum into one
    rounding is the compiler's choice, and it chooses otherwise for one processor than for a class of them."""
    every = recipe.VARIANTS[recipe.platform.machine()]
    monkeypatch.setitem(recipe.VARIANTS, recipe.platform.machine(), every[every.index(variant) :])
    installed(monkeypatch, made)
    assert build.library()._name == str(made / f"{variant.name}.so")
    ASKED[asked]()


@here
def test_it_needs_no_compiler_and_no_folder(made):
    code = f"""
from pathlib import Path
from regard.kernels.native import recipe
recipe.READY = Path({str(made)!r})
from regard import attention, doctor, masks
import torch
q, k, v = torch.randn(3, 1, 2, 300, 16)
out, expected = (attention(q, k, v, mask=masks.causal(), kernel=kernel) for kernel in ("native", "eager"))
torch.testing.assert_close(out, expected)
print(doctor._compiled())
"""
    environment = {"PATH": "", "CXX": "", "HOME": "/proc/none", "REGARD_CACHE": "/proc/none", "TMPDIR": "/proc/none"}
    environment["PYTHONPATH"] = str(Path(regard.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"state='ok', text='those that came with this installation: {SUITS[0].name}.so'" in done.stdout


def test_it_names_no_runtime_and_no_torch(made):
    """OpenMP's functions are looked for among what torch has loaded, by whatever name; of torch it needs nothing."""
    libraries = sorted(made.glob("*.so"))
    assert len(libraries) == len(recipe.VARIANTS[recipe.platform.machine()])
    for library in libraries:
        data = library.read_bytes()
        assert b"GOMP_parallel" in data
        assert not re.search(rb"lib(gomp|omp|torch|c10)|kmpc|_ZN(2at|3c10)", data)


# --- what is not used ---------------------------------------------------------------------------------------------


def known(folder: Path) -> dict:
    return json.loads((folder / "libraries.json").read_text())


def rewritten(folder: Path, **changes: str) -> None:
    told = known(folder)
    told[SUITS[0].name].update(changes)
    (folder / "libraries.json").write_text(json.dumps(told))


def cut(folder: Path, patch) -> None:
    file = folder / f"{SUITS[0].name}.so" if SUITS else next(folder.glob("*.so"))
    file.write_bytes(file.read_bytes()[:20000])


def lacking(folder: Path, patch) -> None:
    file = folder / f"{SUITS[0].name}.so"
    file.write_bytes(file.read_bytes().replace(b"regard_topk", b"regard_tipk"))
    rewritten(folder, sha256=recipe.hashlib.sha256(file.read_bytes()).hexdigest())


WRONG = {
    "is damaged": cut,
    "was made of other sources": lambda folder, patch: patch.setattr(recipe, "FLAGS", (*recipe.FLAGS, "-g0")),
    "and this processor can do none of them": lambda folder, patch: patch.setattr(recipe, "_features", set),
    "this installation brings none": lambda folder, patch: (folder / "libraries.json").unlink(),
    "can't be read: ": lambda folder, patch: (folder / "libraries.json").write_text("[]]"),
    "can't be read: 'made_of'": lambda folder, patch: (
        (folder / "libraries.json").write_text(json.dumps({SUITS[0].name: {"file": "x.so"}}))
    ),
    "the library lacks regard_topk": lacking,
}


@here
@pytest.mark.parametrize("words", WRONG)
def test_what_can_not_be_used_is_compiled_here(words, made, compiler, tmp_path, monkeypatch):
    """And the doctor says why."""
    folder = tmp_path / "ready"
    recipe.shutil.copytree(made, folder)
    compiler('cp REAL "$made"')
    WRONG[words](folder, monkeypatch)
    installed(monkeypatch, folder)
    loaded = build.library()
    assert loaded._name.startswith("/proc/self/fd/") or "cache" in loaded._name
    found = doctor._compiled()
    assert found.state == "ok"
    assert found.text.startswith(f"kept in {tmp_path}/cache/native; ")
    assert words in found.text


# --- the wheel ----------------------------------------------------------------------------------------------------


class App:
    def __init__(self):
        self.said = []

    def display_warning(self, text):
        self.said.append(text)


def built(hook, version: str = "standard") -> tuple[dict, str]:
    """What the hook adds to a wheel, and what it warns of."""
    native = hook.Native()
    native.app, data = App(), {"force_include": {}}
    native.initialize(version, data)
    packed = {inside: Path(path).exists() for path, inside in data["force_include"].items()}
    assert all(packed.values())
    native.finalize(version, data, "")
    return data, " ".join(native.app.said)


@pytest.mark.parametrize(
    ("program", "words"), [(None, "no C++ compiler found"), ("/bin/false", r"/bin/false failed \(exit code 1\)")]
)
def test_without_a_compiler_the_wheel_is_one_of_python_alone(program, words, hook, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", program or "")
    data, said = built(hook)
    assert data == {"force_include": {}}
    assert re.search(words.replace("++", r"\+\+"), said)


def test_it_is_so_on_request_and_in_a_checkout(hook, monkeypatch):
    assert built(hook, "editable") == ({"force_include": {}}, "")
    monkeypatch.setenv("REGARD_NATIVE", "0")
    assert built(hook) == ({"force_include": {}}, "")


def test_a_library_of_llvms_openmp_is_not_packed(hook, compiler, monkeypatch):
    """Torch brings GNU's runtime, and such a library would not load."""
    compiler('if [ "$made" ]; then cp REAL "$made"; printf __kmpc_fork_call >> "$made"; fi')
    data, said = built(hook)
    assert data == {"force_include": {}}
    assert "LLVM's OpenMP runtime" in said


def test_the_tag_says_what_the_libraries_need(hook, made):
    machine = recipe.platform.machine()
    asks = [b"\0GLIBC_2.2.5\0GLIBC_2.14\0GLIBCXX_3.4\0CXXABI_1.3.11\0", b"\0GLIBC_2.27\0"]
    assert hook.tag(asks) == f"manylinux_2_27_{machine}"
    newer = [*asks, b"\0GLIBCXX_3.4.29\0"]  # GCC 11's, which no glibc promises
    assert hook.tag(newer) == hook.tag([]) == next(hook.platform_tags())
    libraries = [path.read_bytes() for path in made.glob("*.so")]
    from packaging.tags import platform_tags

    assert hook.tag(libraries) in set(platform_tags())


def test_a_wheel_has_a_library_for_each_class(hook, made, monkeypatch):
    def ready(folder):
        return [
            Path(recipe.shutil.copy(path, folder)) for path in (*sorted(made.glob("*.so")), made / "libraries.json")
        ]

    monkeypatch.setattr(hook, "build", ready)
    data, said = built(hook)
    assert not said
    assert data["pure_python"] is False
    assert re.fullmatch(r"py3-none-\w*linux\w*", data["tag"])
    names = {variant.name for variant in recipe.VARIANTS[recipe.platform.machine()]}
    files = {f"regard/kernels/native/ready/{name}" for name in ("libraries.json", *(f"{n}.so" for n in names))}
    assert set(data["force_include"].values()) == files

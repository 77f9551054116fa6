"""Files are written whole or not at all, and what is wrong with one that is read ends in one line that names it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard.files import SHOWN, header, naming, read, read_json, write_atomically


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    path.chmod(0o640)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    code = """
import sys
from pathlib import Path
from regard.files import write_atomically
print("go", flush=True)
n = 0
while True:
    n = (n + 1) % 10
    write_atomically(Path(sys.argv[1]), bytes([n]) * 1_000_000)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        seen = set()
        while len(seen) < 4:
            data = path.read_bytes() if path.exists() else b""
            assert data == data[:1] * 1_000_000 * bool(data)
            seen.add(data[:1])
        writer.kill()
    data = path.read_bytes()
    assert data == data[:1] * 1_000_000


def test_what_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("missing/page.html", "folder"):
        with pytest.raises(OSError) as caught:
            write_atomically(tmp_path / name, b"x")
        assert caught.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


BAD = {
    "twice": (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    "twice, far inside": (b'[{"b": {"a": 1, "a": 2}}]', "the key 'a' stands twice"),
    "NaN": (b'{"a": NaN}', "NaN is no number of JSON"),
    "infinity": (b"[-Infinity]", "-Infinity is no number of JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "it is nested too deep"),
    "cut": (b'{"a": [1, 2', "Expecting"),
    "no text": (b"\xff\xfe\x00", "can't decode"),
    "empty": (b"", "Expecting value"),
}


@pytest.mark.parametrize("way", BAD)
def test_json_that_no_writer_wrote(way, tmp_path):
    text, words = BAD[way]
    path = tmp_path / "said.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=words) as refused, naming(path):
        read_json(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_what_transformers_writes_for_infinity_is_read_where_it_is_asked_for(tmp_path):
    (tmp_path / "config.json").write_text('{"limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json", infinite=True)[0] == {"limit": [0.0, float("inf")]}


def test_pipes_and_long_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * 11)
    for name, words in (("pipe", "no plain file"), ("long", "longer than 10 bytes"), ("gone", "there is no such file")):
        with pytest.raises(ValueError, match=words), naming(tmp_path / name):
            read(tmp_path / name, 10)
    with pytest.raises(ValueError, match="no plain file"), naming(tmp_path / "pipe"):
        header(tmp_path / "pipe")


def test_messages_are_one_short_line_with_the_path_first(tmp_path):
    path = tmp_path / "x"
    for error in (KeyError("name"), ValueError("a\nb\n" * 1000), RuntimeError(f"{path}: " + "c" * 2000), MemoryError()):
        with pytest.raises(ValueError, match=str(path)) as refused, naming(path):
            raise error
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) <= SHOWN + len(f"{path}: ")
    with pytest.raises(KeyboardInterrupt), naming(path):
        raise KeyboardInterrupt


def tensors(path, said, data=b"", length=None):
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "overlap": ({"a": ONE, "b": ONE}, 16, "overlap"),
    "gap": ({"a": {**ONE, "data_offsets": [4, 12]}}, 12, "gaps"),
    "too long": ({"a": ONE}, 9, "9 stand there"),
    "too short": ({"a": ONE}, 7, "7 stand there"),
    "a shape that lies": ({"a": {**ONE, "shape": [10**12, 10**12]}}, 8, "not as long as its shape"),
    "a negative shape": ({"a": {**ONE, "shape": [-2]}}, 8, "no sizes"),
    "a shape of floats": ({"a": {**ONE, "shape": [2.0]}}, 8, "no sizes"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "dtype"),
    "an unknown dtype": ({"a": {**ONE, "dtype": "F7"}}, 8, "not read"),
    "a dtype that is a list": ({"a": {**ONE, "dtype": ["F32"]}}, 8, "unhashable|not read"),
    "a list": ([ONE], 8, "no object"),
    "a number": ({"a": 3}, 8, "subscriptable"),
    "metadata of numbers": ({"a": ONE, "__metadata__": {"x": 1}}, 8, "no texts"),
    "twice": (b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), 8, "stands twice"),
    "deep": (b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 8, "nested too deep"),
}


@pytest.mark.parametrize("way", HEADERS)
def test_headers_that_no_writer_wrote(way, tmp_path):
    said, size, words = HEADERS[way]
    path = tensors(tmp_path / "x.safetensors", said, bytes(size))
    with pytest.raises(ValueError, match=words) as refused, naming(path):
        header(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    for length in (2**40, 2**63, 3):
        path = tensors(tmp_path / "x.safetensors", {"a": ONE}, bytes(8), length)
        with pytest.raises(ValueError, match=r"x\.safetensors"), naming(path):
            header(path)


def test_an_honest_header_is_that_of_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    held = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bool), "c": torch.ones(0, 5).bfloat16()}
    save_file(held, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert header(tmp_path / "x.safetensors") == {"a": ("F32", (2, 3)), "b": ("BOOL", (4,)), "c": ("BF16", (0, 5))}


def test_files_are_written_by_one_helper():
    """So that whoever reads one, or is killed while it is written, finds it whole. Others write where it is said."""
    root = Path(regard.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                said = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
                modes = [text for text in said if isinstance(text, str) and len(text) < 4]
                written = name == "open" and any(set(mode) & set("wax+") for mode in modes)
                if written or name in ("write_text", "write_bytes", "save_file", "tofile", "savez"):
                    found.add((str(path.relative_to(root)), name))
    allowed = {
        ("files.py", "write_bytes"),  # the helper's own
        ("files.py", "open"),
        ("inspect/store.py", "save_file"),  # beside the file that it replaces
        ("bench/memory.py", "write_text"),  # switches of the system's
        ("bench/guard.py", "open"),
        ("bench/worker.py", "open"),  # its standard error
    }
    others = {one for one in found - allowed if not one[0].startswith("kernels/native")}  # its cache has its own rules
    assert others == set()

"""A checkpoint comes back bit for bit, or not at all."""

import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save as safetensors

from regard.bench.generate import generate
from regard.models.checkpoint import load, save
from regard.models.lm import LMConfig, language_model

CONFIG = LMConfig("rotary", dim=8, depth=1, num_heads=2, mlp_dim=12, length=8)


@pytest.fixture
def kept(tmp_path):
    torch.manual_seed(0)
    model = language_model(CONFIG)
    return model, save(model, CONFIG, tmp_path / "model.safetensors")


def test_it_comes_back_bit_for_bit(kept):
    model, path = kept
    loaded, config = load(path)
    assert config == CONFIG
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    ids = torch.arange(8)[None]
    assert torch.equal(model.eval()(ids), loaded(ids))


def test_every_flipped_byte_and_every_cut_is_noticed(kept, tmp_path):
    _, path = kept
    data, draw = path.read_bytes(), random.Random(0)
    damaged = tmp_path / "damaged.safetensors"
    cuts = [data[: draw.randrange(len(data))] for _ in range(40)]
    flips = []
    for _ in range(120):
        at = draw.randrange(len(data))
        flips.append(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
    for content in [b"", b"\xff" * 8, (2**63).to_bytes(8, "little") + data[8:], *cuts, *flips]:
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.safetensors"):
            load(damaged)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_pickles_are_refused_unread(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="pickle"):
        load(tmp_path / name)
    assert not (tmp_path / "pickle-was-run").exists()


def test_other_safetensors_and_missing_files_are_refused(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(safetensors({"w": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"other\.safetensors is damaged, or no model of regard"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"gone\.safetensors cannot be read"):
        load(tmp_path / "gone.safetensors")


def test_a_forged_configuration_builds_nothing(tmp_path):
    """The checksum is right, the sizes are not: 1 TB would be asked for."""
    huge = LMConfig("rotary", dim=2**18, depth=1, num_heads=2, mlp_dim=2**18)
    with pytest.raises(ValueError, match="do not fit"):
        load(save(language_model(CONFIG), huge, tmp_path / "forged.safetensors"))


def test_a_file_does_not_decide_which_code_is_imported(tmp_path):
    own = LMConfig("torch.nn:Identity", dim=8, depth=1, num_heads=2, mlp_dim=12)
    path = save(language_model(own), own, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="no part of regard"):
        load(path)
    assert load(path, "torch.nn:Identity")[1] == own


def test_generated_text_follows_the_seed(kept):
    _, path = kept
    first = b"".join(generate(path, "a prompt", count=20, seed=3))
    assert len(first) == 20
    assert b"".join(generate(path, "a prompt", count=20, seed=3)) == first
    assert b"".join(generate(path, "a prompt", count=20, seed=4)) != first
    assert b"".join(generate(path, "", count=5, seed=3)) != b""


@pytest.mark.parametrize("option", [{"count": -1}, {"temperature": -0.5}, {"temperature": float("nan")}, {"top_k": 0}])
def test_generate_refuses_before_it_reads(option, tmp_path):
    with pytest.raises(ValueError, match=r"generate: (count|temperature|top_k) is "):
        generate(tmp_path / "not-even-there", **option)

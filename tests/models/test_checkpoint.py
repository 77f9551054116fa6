"""A checkpoint comes back bit for bit, or not at all."""

import json
import os
import pickle
import random
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save as safetensors

import regard
from regard.bench.generate import generate
from regard.models import checkpoint
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


# --- files that nobody saved: the checksum is right, something else is not ------------------------------------


def forged(path, said=None, change=None, text=None, kind="regard.lm/1"):
    """A file of an honest model's tensors with another configuration, and a checksum over both."""
    torch.manual_seed(0)
    tensors = {name: t.clone() for name, t in language_model(CONFIG).state_dict().items()}
    if change is not None:
        change(tensors)
    text = json.dumps({**asdict(CONFIG), **(said or {})}) if text is None else text
    metadata = {"format": kind, "config": text, "sha256": checkpoint._digest(tensors, text)}
    path.write_bytes(safetensors(tensors, metadata))
    return path


def spoilt(value, name="blocks.0.up.weight"):
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


def cast(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


FORGED = {
    "a wide head": ({"said": {"mechanism": "softmax(head_dim=1000000)"}}, "head_dim is too large"),
    "a wider head than its tensors": ({"said": {"mechanism": "softmax(head_dim=60000)"}}, "do not fit .*120000"),
    "a float": ({"said": {"mechanism": "rotary(base=1e30)"}}, "base is out of range"),
    "a list": ({"said": {"mechanism": f"softmax(head_dim=[{10**9}])"}}, "head_dim is too large"),
    "a wrong kind": ({"said": {"mechanism": "softmax(head_dim='x')"}}, "head_dim"),
    "bytes": ({"said": {"mechanism": "softmax(head_dim=b'x')"}}, "head_dim has the wrong type"),
    "no such option": ({"said": {"mechanism": "softmax(nothing=1)"}}, "nothing"),
    "no such mechanism": ({"said": {"mechanism": "sofmax"}}, "softmax"),
    "a part of no layer": ({"said": {"mechanism": "rollout"}}, "rollout"),
    "an unreadable mechanism": ({"said": {"mechanism": "softmax(" + "(" * 5000}}, "mechanism cannot be read"),
    "a number as mechanism": ({"said": {"mechanism": 3}}, "names no mechanism"),
    "layers": ({"said": {"depth": 10**9}}, "do not fit its configuration .depth"),
    "layers as text": ({"said": {"depth": "1"}}, "depth has the wrong type"),
    "layers as truth": ({"said": {"depth": True}}, "depth has the wrong type"),
    "a vocabulary": ({"said": {"vocab": 10**12}}, "embedding.weight"),
    "more": ({"said": {"code": "x"}}, "unknown entry 'code'"),
    "a list as configuration": ({"text": "[]"}, "names no mechanism"),
    "deep": ({"text": "[" * 30_000}, "is not one of a regard model"),
    "long": ({"text": " " * 70_000 + "{}"}, "longer than"),
    "twice": ({"text": json.dumps(asdict(CONFIG))[:-1] + ', "depth": 1}'}, "'depth' stands twice"),
    "NaN as a size": ({"text": json.dumps({**asdict(CONFIG), "length": float("nan")})}, "NaN is no number"),
    "no JSON": ({"text": "{"}, "is not one of a regard model"),
    "another format": ({"kind": "regard.lm/9"}, "has format 'regard.lm/9'"),
    "NaN": ({"change": spoilt(float("nan"))}, "'blocks.0.up.weight' holds what is no number"),
    "whole numbers": ({"change": cast("blocks.0.up.weight", torch.int64)}, "'blocks.0.up.weight' is I64"),
    "truth values": ({"change": cast("norm.weight", torch.bool)}, "'norm.weight' is BOOL"),
    "bytes as weights": ({"change": cast("norm.weight", torch.uint8)}, "'norm.weight' is U8"),
    "a tensor too many": ({"change": lambda tensors: tensors.update(x=torch.ones(1))}, "'x' are too many"),
    "a tensor too few": ({"change": lambda tensors: tensors.pop("norm.weight")}, "'norm.weight' are missing"),
    "another shape": ({"change": lambda tensors: tensors.update({"norm.weight": torch.ones(9)})}, r"F32 \[9\]"),
}  # fmt: skip


@pytest.mark.parametrize("way", FORGED)
def test_forged_files_are_refused_in_one_line_before_anything_is_allocated(way, tmp_path, monkeypatch):
    change, words = FORGED[way]
    path = forged(tmp_path / "forged.safetensors", **change)

    def built(config):
        assert torch.empty(0).device.type == "meta" or way == "NaN"
        return language_model(config)

    monkeypatch.setattr(checkpoint, "language_model", built)
    with pytest.raises(ValueError, match=words) as refused:
        load(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= len(str(path)) + 510


def test_weights_from_which_nothing_can_be_drawn(tmp_path):
    path = forged(tmp_path / "m.safetensors", change=lambda tensors: tensors["norm.weight"].fill_(float("inf")))
    with pytest.raises(
        ValueError, match=r"m\.safetensors: no text can be drawn from it: probability tensor"
    ) as refused:
        list(generate(path, "a", count=2))
    assert "\n" not in str(refused.value)
    config = replace(CONFIG, vocab=300)
    with pytest.raises(ValueError, match=r"n\.safetensors: it has 300 tokens"):
        generate(save(language_model(config), config, tmp_path / "n.safetensors"), "a")


def test_an_honest_file_in_another_precision_is_read(tmp_path):
    path = forged(tmp_path / "half.safetensors", change=cast("blocks.0.up.weight", torch.bfloat16))
    assert load(path)[0].blocks[0].up.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["softmax(head_dim=6)", "window(window=5000)", "rotary(base=10000000)", "alibi"])
def test_options_that_people_write_are_none_out_of_proportion(name, tmp_path):
    config = replace(CONFIG, mechanism=name)
    assert load(save(language_model(config), config, tmp_path / "m.safetensors"))[1] == config


def test_all_mechanisms_of_a_language_model_are_described_by_the_device_meta(tmp_path):
    """What is compared there is what is built."""
    tried = 0
    for name in regard.mechanisms():
        config = replace(CONFIG, mechanism=name)
        try:
            model = language_model(config)
        except (ValueError, TypeError):
            continue  # it needs options
        path = save(model, config, tmp_path / "m.safetensors")
        again = load(path)[0]
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())), name
        tried += 1
    assert tried > 30


def test_a_header_whose_length_begins_like_a_pickle(kept, tmp_path):
    """1152 is written as 80 04, as a pickle of the protocol 4 begins."""
    model, _ = kept
    for length in range(10, 200):
        config = replace(CONFIG, length=10**length)
        path = save(model, config, tmp_path / "m.safetensors")
        assert load(path)[1] == config
        if path.read_bytes()[:2] == b"\x80\x04":
            return
    pytest.fail("none of them does")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", tmp_path):
        with pytest.raises(ValueError, match="no plain file"):
            load(path)

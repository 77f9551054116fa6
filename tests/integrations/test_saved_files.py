"""Nothing but safetensors of the folder itself is read for a swapped model, wherever its files would lead."""

import json

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file

import regard
from integrations.tiny import GROUPED

WHOLE, PART, INDEX = "model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"


@pytest.fixture
def saved(tmp_path):
    """A folder with a swapped model, and beside it its weights as a pickle."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    regard.swap(tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED)).eval(), "kerple").save_pretrained(folder)
    torch.save(load_file(folder / WHOLE), tmp_path / "weights.bin")
    return folder


def write(path, said):
    path.write_text(json.dumps(said))


def decoy(folder, target):
    """The real file under another name satisfies whoever looks at it; the index leads elsewhere."""
    names = load_file(folder / WHOLE)
    (folder / WHOLE).rename(folder / PART)
    write(folder / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(names, target)})


def inside(folder):
    (folder.parent / "weights.bin").rename(folder / "pytorch_model.bin")
    decoy(folder, "pytorch_model.bin")


def one_of_many(folder):
    decoy(folder, PART)
    said = json.loads((folder / INDEX).read_text())
    said["weight_map"]["lm_head.weight"] = "../weights.bin"
    write(folder / INDEX, said)


def by_config(folder):
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "transformers_weights": "../weights.bin"})


def both(folder):
    write(folder / INDEX, {"metadata": {}, "weight_map": {"lm_head.weight": "../weights.bin"}})


def link_out(folder):
    (folder / WHOLE).rename(folder.parent / WHOLE)
    (folder / WHOLE).symlink_to(folder.parent / WHOLE)


def no_index(folder):
    (folder / WHOLE).rename(folder / PART)


WAYS = {
    "an index out of the folder": lambda folder: decoy(folder, "../weights.bin"),
    "an absolute path": lambda folder: decoy(folder, str(folder.parent / "weights.bin")),
    "a pickle inside": inside,
    "one tensor of many": one_of_many,
    "the config": by_config,
    "an index beside the whole": both,
    "a link": link_out,
    "no index": no_index,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_pickle_is_opened(saved, way, monkeypatch):
    WAYS[way](saved)
    opened = []
    monkeypatch.setattr(torch, "load", lambda *given, **options: opened.append(given[0]))
    with pytest.raises(ValueError, match=str(saved)) as refused:
        regard.load_swapped(saved)
    assert opened == []
    assert "\n" not in str(refused.value)


def test_honest_parts_are_read(saved):
    want = regard.load_swapped(saved).model
    decoy(saved, PART)
    again = regard.load_swapped(saved).model
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_hubs_cache_of_links_is_read(saved, tmp_path):
    """huggingface_hub keeps a repository's files as blobs, and a snapshot of links to them."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    want = regard.load_swapped(saved).model
    for number, path in enumerate(sorted(saved.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    got = regard.load_swapped(snapshot).model
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values(), strict=True))

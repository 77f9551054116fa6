"""Nothing but safetensors of the folder itself is read for a model, wherever its files would lead."""

import ast
import json
import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

import regard
from integrations.tiny import GROUPED
from regard.inspect import explain
from regard.integrations.folder import config_of, look, pretrained

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


def config(**more):
    def act(folder):
        write(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **more})

    return act


def another_name(folder):
    (folder / WHOLE).unlink()
    (folder.parent / "weights.bin").rename(folder / WHOLE)


def pipe(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def config_outside(folder):
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def as_if_of_the_hub(folder):
    """Only the blobs of its own repository may be linked to."""
    link_out(folder)
    (folder.parent / "models--a--b" / "snapshots").mkdir(parents=True)
    folder.rename(folder.parent / "models--a--b" / "snapshots" / "1f")
    folder.symlink_to(folder.parent / "models--a--b" / "snapshots" / "1f")


def whole_numbers(folder):
    held = load_file(folder / WHOLE)
    held["lm_head.weight"] = held["lm_head.weight"].long()
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"].long()
    save_file(held, folder / WHOLE, metadata={"format": "pt"})


WAYS = {
    "an index out of the folder": lambda folder: decoy(folder, "../weights.bin"),
    "an absolute path": lambda folder: decoy(folder, str(folder.parent / "weights.bin")),
    "a pickle inside": inside,
    "one tensor of many": one_of_many,
    "the config": by_config,
    "an index beside the whole": both,
    "a link": link_out,
    "no index": no_index,
    "no safetensors": inside,
    "a pickle under the name": another_name,
    "a config further in": config(text_config={"transformers_weights": "../weights.bin"}),
    "another config": config(configuration_files=["config.4.0.0.json"]),
    "timm's own loader": config(model_args={"checkpoint_path": "../weights.bin"}),
    "a folder of timm's": config(backbone="local-dir:../other"),
    "a backbone of the hub": config(backbone="some/where"),
    "another loader": config(quantization_config={"quant_method": "hqq"}),
    "an adapter": lambda folder: write(folder / "adapter_config.json", {"base_model_name_or_path": "../other"}),
    "a tokenizer's link": lambda folder: (folder / "tokenizer.json").symlink_to("/etc/hostname"),
    "the config's link": config_outside,
    "a pipe": pipe,
    "a cache of its own": as_if_of_the_hub,
    "layers without end": config(num_hidden_layers=10**9),
    "labels without end": config(num_labels=10**9),
    "stages without end": config(depths=[2, 10**9]),
    "a vocabulary without end": config(vocab_size=10**12),
    "a width without end": config(intermediate_size=2**62),
    "whole numbers as weights": whole_numbers,
    "generation is a list": lambda folder: write(folder / "generation_config.json", []),
    "a config of wrong kinds": config(hidden_size="wide"),
}
LOADERS = {"load_swapped": regard.load_swapped, "explain": lambda folder: explain.load(str(folder))}


@pytest.fixture
def opened(monkeypatch):
    """What `torch.load` and pickle were given."""
    found = []

    def spy(*given, **options):
        found.append(given)
        raise AssertionError("a pickle is opened")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, spy)
    return found


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("way", WAYS)
def test_no_pickle_is_opened(saved, way, loader, opened):
    WAYS[way](saved)
    with pytest.raises(ValueError, match=f"^{saved}") as refused:
        LOADERS[loader](saved)
    assert opened == []
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700


def test_one_door(tmp_path):
    """Nothing else in the package loads models of others, or pickles; the law of copies makes its own."""
    root = Path(regard.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                whole = ast.unparse(node)
                if node.attr in ("from_pretrained", "snapshot_download") or whole in ("torch.load", "np.load"):
                    found.add((str(path.relative_to(root)), node.attr))
                if whole in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "yaml.load"):
                    found.add((str(path.relative_to(root)), node.attr))
    assert found == {("integrations/folder.py", "from_pretrained"), ("laws/modules.py", "loads")}


def test_a_name_of_the_hub(saved, tmp_path, monkeypatch, opened):
    """Its files are looked at as any folder's, and no others are asked for."""
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    decoy(saved, "../weights.bin")
    with pytest.raises(ValueError, match=r"plain names of safetensors"):
        explain.load("some/model")
    wanted = asked["some/model"]
    names = ["config.json", WHOLE, PART, INDEX, "vocab.txt", "tokenizer.model", "pytorch_model.bin", "evil.py"]
    names += ["model.fp16.safetensors", "onnx/config.json", "rust_model.ot"]
    got = huggingface_hub.utils.filter_repo_objects(names, **wanted)
    assert list(got) == ["config.json", WHOLE, PART, INDEX, "vocab.txt", "tokenizer.model"]

    def offline(name, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'some/model' is no folder.* from the hub: no network$"):
        explain.load("some/model")


def test_configs_of_many_kinds_fit_their_own_weights(tmp_path, opened):
    """The bounds are none for what `save_pretrained` writes, a base model under a head's config included."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    gpt2 = tr.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20)
    for made in (
        tr.BertForTokenClassification(tr.BertConfig(vocab_size=20, num_labels=2000, **sizes)),
        tr.GPT2LMHeadModel(gpt2),
        tr.ViTForImageClassification(tr.ViTConfig(image_size=8, patch_size=4, **sizes)),
        tr.T5ForConditionalGeneration(tr.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
    ):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder)
        found = look(folder)
        pretrained(tr.AutoModel, found, config_of(found))


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

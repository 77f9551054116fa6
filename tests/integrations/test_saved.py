"""Swapped models are written to folders and come back bit for bit; bad folders end in one line that names the file."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from torch import nn

import regard
from integrations.tiny import BASE, GROUPED, batch, off, outputs, tiny
from regard import masks
from regard.integrations.interface import configs_of
from regard.integrations.recipes import (
    differences,
    mask_as_data,
    mask_from_data,
    part_as_data,
    part_classes,
    part_from_data,
)
from regard.integrations.transformers import Swap
from regard.integrations.transformers_saved import MARKER, save_swapped
from regard.masks.rows import EveryRow
from regard.masks.varlen import Varlen
from regard.normalizers import Entmax
from regard.positions import Kerple, Shaw
from regard.shapes import HeadShape
from regard.stages import Mix


def trained(swapped: Swap) -> None:
    """Parameters that are no longer what they start as."""
    with torch.no_grad():
        for n, parameter in enumerate(swapped.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))


def returns(model: nn.Module, inputs: dict, folder: Path) -> Swap:
    """Save, load, compare; and the plain host is what `restore` leaves."""
    with torch.no_grad():
        want = outputs(model, inputs)
        save_swapped(model, folder)
        assert torch.equal(outputs(model, inputs), want)
        found = regard.load_swapped(folder)
        assert torch.equal(outputs(found.model, inputs), want)
    return found


MECHANISMS = {
    "a name": {"mechanism": "kerple"},
    "options": {"mechanism": "window(window=3)+kerple_power"},
    "options beside": {"mechanism": "moba", "block": 2, "topk": 1},
    "a kernel": {"mechanism": "entmax", "alpha": 1.75, "kernel": "eager"},
    "some layers and heads": {"mechanism": "gated+entmax", "layers": [-1], "heads": [0, 2]},
    "a mask": {"mechanism": masks.window(2) | masks.global_tokens(1)},
    "a mask with tensors": {"mechanism": masks.dense(torch.ones(64, 64).tril(2).triu(-3).bool())},
    "a part": {"mechanism": Entmax(alpha=1.3)},
    "a part with parameters": {"mechanism": Kerple(num_heads=4)},
    "slots": {
        "mechanism": {"position": Shaw(num_heads=4, head_dim=8), "mask": masks.blocks(4), "normalizer": Entmax()}
    },
}


@pytest.mark.parametrize("what", MECHANISMS)
def test_whatever_is_swapped_comes_back(what: str, tmp_path: Path):
    model, inputs = tiny("llama", torch.float32), batch("llama", torch.float32)
    with torch.no_grad():
        plain = outputs(model, inputs)
    swapped = regard.swap(model, check=False, **MECHANISMS[what])
    trained(swapped)
    with torch.no_grad():
        assert off(outputs(model, inputs), plain) > 1e-5, "the swap changes nothing, so that nothing would be tested"
    found = returns(model, inputs, tmp_path)
    assert [layer.name for layer in found.layers] == [layer.name for layer in swapped.layers]
    found.restore()
    with torch.no_grad():
        assert torch.equal(outputs(found.model, inputs), plain)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "clip", "whisper", "gemma2"])
def test_hosts_of_many_kinds(name: str, tmp_path: Path):
    """Encoders with decoders, tied weights, several stacks, generation configs."""
    model = tiny(name, torch.float32)
    if name == "clip":
        model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    trained(regard.swap(model, "entmax", layers=lambda layer: layer.index == 1, check=False))
    found = returns(model, batch(name, torch.float32), tmp_path)
    assert type(found.model) is type(model)
    assert not found.model.training
    found.restore()
    names = [[c._attn_implementation for c in configs_of(m)] for m in (found.model, tiny(name, torch.float32))]
    assert names[0] == (["eager", "eager", "sdpa"] if name == "clip" else names[1]) or name == "clip"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_hosts_in_other_dtypes(dtype: torch.dtype, tmp_path: Path):
    """Also their rotation's buffers, which transformers does not save, and which a cast rounds."""
    model, inputs = tiny("llama", dtype), batch("llama", dtype)
    trained(regard.swap(model, "kerple+gated", check=False))
    found = returns(model, inputs, tmp_path)
    assert {p.dtype for p in found.model.parameters()} == {dtype}


def test_parts_keep_a_dtype_of_their_own(tmp_path: Path):
    model = tiny("llama", torch.float32)
    swapped = regard.swap(model, "kerple", check=False)
    for parts in swapped.parts.values():
        parts.double()
    swapped.save_pretrained(tmp_path)
    assert {p.dtype for p in regard.load_swapped(tmp_path).parameters()} == {torch.float64}


def test_several_swaps_on_one_model(tmp_path: Path):
    model, inputs = tiny("llama", torch.float32), batch("llama", torch.float32)
    first = regard.swap(model, "kerple", check=False)
    second = regard.swap(model, masks.window(2), layers=0, heads=[1], check=False)
    trained(first)
    found = returns(model, inputs, tmp_path)
    assert [len(found.layers), len(found.under[0].layers)] == [1, 2]
    second.restore()
    with torch.no_grad():
        assert torch.equal(outputs(returns(model, inputs, tmp_path).model, inputs), outputs(model, inputs))


def test_a_copy_and_a_loaded_model_are_saved_in_turn(tmp_path: Path):
    model, inputs = tiny("llama", torch.float32), batch("llama", torch.float32)
    with regard.swap(model, "kerple", check=False) as swapped:
        trained(swapped)
        twin = copy.deepcopy(model)
    found = returns(twin, inputs, tmp_path / "first")
    found.save_pretrained(tmp_path / "second")
    for name in ("regard.json", "regard.safetensors", "model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_config_that_asks_for_maps(tmp_path: Path):
    config = tr.LlamaConfig(**GROUPED, output_attentions=True, attn_implementation="eager")
    model, inputs = tr.LlamaForCausalLM(config).eval(), batch("llama", torch.float32)
    regard.swap(model, "entmax", check=False)
    found = returns(model, inputs, tmp_path)
    assert [m.shape for m in found.model(**inputs).attentions] == [(3, 4, 9, 9)] * 2


def test_loading_draws_no_random_numbers_and_leaves_nothing_behind(tmp_path: Path):
    model = tiny("llama", torch.float32)
    regard.swap(model, "gated", check=False).save_pretrained(tmp_path)
    torch.manual_seed(3)
    want = torch.rand(2)
    verbosity = tr.logging.get_verbosity()
    torch.manual_seed(3)
    regard.load_swapped(tmp_path)
    assert tr.logging.get_verbosity() == verbosity
    assert torch.equal(torch.rand(2), want)


# --- what transformers alone makes of it ---------------------------------------------------------------------


def test_from_pretrained_loads_the_plain_model_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, inputs = tiny("llama", torch.float32), batch("llama", torch.float32)
    plain = outputs(model, inputs)
    regard.swap(model, masks.window(2), check=False).save_pretrained(tmp_path)
    said = warnings_of(caplog, lambda: tr.LlamaForCausalLM.from_pretrained(tmp_path))
    assert "load_swapped" in said
    assert "UNEXPECTED" in said
    assert torch.equal(outputs(tr.LlamaForCausalLM.from_pretrained(tmp_path).eval(), inputs), plain)
    assert "regard" not in (tmp_path / "config.json").read_text()


def test_the_host_s_own_save_keeps_trained_parts_and_its_load_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, inputs = tiny("llama", torch.float32), batch("llama", torch.float32)
    trained(regard.swap(model, "kerple", check=False))
    want = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    said = warnings_of(caplog, lambda: tr.LlamaForCausalLM.from_pretrained(tmp_path))
    assert "self_attn.regard.position" in said
    again = tr.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    regard.swap(again, "kerple", check=False)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(outputs(again, inputs), want)
    with pytest.raises(ValueError, match=r"regard\.json: there is no such file"):
        regard.load_swapped(tmp_path)


def warnings_of(caplog: pytest.LogCaptureFixture, act: Callable[[], object]) -> str:
    """What transformers logs meanwhile."""
    before, logger = tr.logging.get_verbosity(), logging.getLogger("transformers")
    tr.logging.set_verbosity_warning()
    logger.addHandler(caplog.handler)
    try:
        act()
    finally:
        logger.removeHandler(caplog.handler)
        tr.logging.set_verbosity(before)
    return caplog.text


# --- recipes -------------------------------------------------------------------------------------------------

MASKS = [
    masks.full(),
    masks.nothing(),
    masks.causal() & masks.window(4, ahead=2),
    ~masks.dilated(3, 2) | masks.strided(5),
    masks.blocks(4),
    masks.prefix(3) | masks.global_tokens(2),
    masks.neighborhood((4, 5), 3, dilation=1, stride=2, causal=(True, False)),
    masks.per_head([masks.window(2), masks.causal()]),
    masks.documents(torch.tensor([[0, 0, 1, 1]])),
    masks.packed(torch.tensor([0, 2, 6])),
    Varlen.of([0, 2, 6], [0, 5, 6], 6, 6, masks.causal(), torch.device("cpu")),
    masks.padding(torch.ones(2, 5).bool()),
    masks.padding(lengths=torch.tensor([2, 3])),
    masks.dense(torch.eye(6).bool()),
    masks.chosen(torch.ones(1, 2, 2, 2).bool(), 6, 6, 3),
    masks.block_causal(4),
    masks.block_diffusion(2, 3),
    masks.global_tokens(torch.tensor([[1, 4], [0, -1]])),
    masks.tree(torch.tensor([-1, 0, 0]), prefix=2),
    masks.shared_prefix(2, [3, 1]),
    masks.blocks(2, before=1),
    masks.shifted_chunks(2, [0, 1], wrap=6),
    masks.shifted_dilated(4, 2, [0, 1]),
    masks.near_blocks(2),
    EveryRow(masks.window(3), 1, 0),
    masks.queries(torch.arange(6) % 2 == 0),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_are_data(mask: masks.Mask):
    tensors: dict[str, torch.Tensor] = {}
    again = mask_from_data(json.loads(json.dumps(mask_as_data(mask, tensors))), tensors)
    T = 20 if mask == MASKS[6] else 6
    assert torch.equal(again.dense(T), mask.dense(T))
    assert repr(again) == repr(mask)


def test_every_kind_of_mask_is_known():
    text = json.dumps([mask_as_data(mask, {}) for mask in MASKS])
    library = {kind.__name__ for kind in subclasses(masks.Mask) if kind.__module__.startswith("regard.masks")}
    assert {name for name in library if f'"mask": "{name}"' not in text} == {
        *("Joined", "Predicate"),
        *("Listed", "Lasting"),  # what queries of one call picked
    }


def subclasses(kind: type) -> list[type]:
    return [inner for one in kind.__subclasses__() for inner in (one, *subclasses(one))]


SHAPE = HeadShape(32, 4, 2, 8)


@pytest.mark.parametrize("name", ["entmax", "kerple", "shaw", "qk_norm", "cog", "moba", "xattention", "headmask"])
def test_parts_are_data(name: str):
    """Of those that are handed in, these; others are refused, and can be named instead."""
    (part,) = regard.card(name).parts(vars(SHAPE), regard.card(name).example).values()
    said = json.loads(json.dumps(part_as_data(part, SHAPE, {})))
    again = part_from_data(said, {})
    assert differences(again, part) == []
    assert part_as_data(again, SHAPE, {}) == said


def test_parts_that_do_not_keep_what_they_were_built_with_are_refused():
    part = regard.card("rotary_yarn").parts(vars(SHAPE), {})["position"]
    with pytest.raises(ValueError, match="Rotary has an option that is no number"):
        part_as_data(part, SHAPE, {})


def test_no_two_parts_have_one_name():
    found = part_classes()
    assert {"Entmax", "Kerple", "Shaw", "SigmoidGate", "XAttention"} <= found.keys()
    assert all(kind.__name__ == name for name, kind in found.items())
    every = [
        kind
        for slot in regard.slots.SLOTS.values()
        if slot.kind is not masks.Mask
        for kind in subclasses(slot.kind)
        if found.get(kind.__name__) is not None and kind.__module__.startswith("regard.")
    ]
    assert all(found[kind.__name__] is kind for kind in every)


class Own(Mix):
    """Somebody's own part."""

    def forward(self, z, rows):
        return z * 1.5


def changed_after(swapped):
    swapped.parts["model.layers.0.self_attn"].mask = masks.window(9)


REFUSED = {
    "a rule": (masks.window(3) & masks.predicate(lambda b, h, i, j: i >= j), None, "is a rule in code.*masks.dense"),
    "own class": ({"score_mix": Own()}, None, "Own is no part of this library"),
    "restored": ("softmax", lambda swapped: swapped.restore(), "the swap was restored"),
    "changed": (masks.window(3), changed_after, "layers.0.self_attn is not what its description builds|layers.1"),
    "adapters": (
        "softmax",
        lambda swapped: setattr(swapped.model.lm_head, "base_layer", nn.Linear(2, 2)),
        "the model is not what its class and config build .*base_layer",
    ),
    "two dtypes": ("softmax", lambda swapped: swapped.model.lm_head.double(), "lm_head.weight is torch.float64"),
    "meta": ("softmax", lambda swapped: swapped.model.to("meta"), "holds nothing"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_saved_is_refused_and_nothing_is_written(what: str, tmp_path: Path):
    mechanism, spoil, match = REFUSED[what]
    swapped = regard.swap(tiny("llama", torch.float32), mechanism, check=False)
    if spoil is not None:
        spoil(swapped)
    with pytest.raises(ValueError, match=match) as caught:
        swapped.save_pretrained(tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_classes_of_one_s_own_and_scaled_heads_are_refused(tmp_path: Path):
    class Mine(tr.BertModel):
        pass

    swapped = regard.swap(Mine(tr.BertConfig(**BASE)).eval(), "softmax", check=False)
    with pytest.raises(ValueError, match="Mine is no class of transformers"):
        swapped.save_pretrained(tmp_path)
    swapped = regard.swap(tiny("bert"), "softmax", check=False)
    with regard.scale_heads(swapped.model, torch.ones(2, 4)), pytest.raises(ValueError, match=r"heads .* are scaled"):
        swapped.save_pretrained(tmp_path)


# --- bad folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    swapped = regard.swap(tiny("llama", torch.float32), "kerple", check=False)
    trained(swapped)
    swapped.save_pretrained(folder)
    return folder


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        change(said)
        text = json.dumps(said)
        (folder / name).write_text(text)
        if name == "regard.json":  # as somebody would who knows what ties the files together
            sign(folder)

    return act


def sign(folder: Path) -> None:
    import hashlib

    held = load_file(folder / "model.safetensors")
    digest = hashlib.sha256((folder / "regard.json").read_bytes()).digest()
    held[MARKER] = torch.tensor(list(digest), dtype=torch.uint8)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def tensors(change: Callable[[dict], object], *, tell: bool) -> Callable[[Path], None]:
    """Change the parts' file; with `tell` also what the recipe says of it."""

    def act(folder: Path) -> None:
        from regard import files as plain
        from regard.integrations import files

        held = load_file(folder / "regard.safetensors")
        change(held)
        save_file(held, folder / "regard.safetensors")
        if tell:
            said = json.loads((folder / "regard.json").read_text())
            said["tensors"] = {n: [d, list(s)] for n, (d, s) in plain.header(folder / "regard.safetensors").items()}
            said["sha256"] = files.digest(folder / "regard.safetensors")
            (folder / "regard.json").write_text(json.dumps(said))
            sign(folder)

    return act


def layer(said: dict) -> dict:
    return said["swaps"][0]["layers"]["model.layers.0.self_attn"]


PART = "swap0.model.layers.0.self_attn.position."


def first(held: dict) -> str:
    return next(name for name in sorted(held) if name.startswith(PART))


def deep(folder: Path) -> None:
    (folder / "regard.json").write_text("[" * 100000)


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no recipe": (lambda f: (f / "regard.json").unlink(), "regard.json", "no such file"),
    "no tensors": (lambda f: (f / "regard.safetensors").unlink(), "regard.safetensors", "no such file|No such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "no such file"),
    "no generation config": (
        lambda f: (f / "generation_config.json").unlink(),
        "generation_config.json",
        "no such file",
    ),
    "many labels": (edit("config.json", lambda s: s.update(num_labels=10**9)), "config.json", "too large"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors", "No such file|no such file"),
    "no JSON": (write("regard.json", "{"), "regard.json", "Expecting"),
    "no object": (write("regard.json", "[]"), "regard.json", "format"),
    "a list as config": (write("config.json", "[]"), "config.json", "architectures"),
    "deep": (deep, "regard.json", "nested too deep"),
    "twice": (write("regard.json", '{"format": 1, "format": 2}'), "regard.json", "'format' stands twice"),
    "infinite": (write("regard.json", '{"format": Infinity}'), "regard.json", "Infinity is no number"),
    "newer": (edit("regard.json", lambda s: s.update(format="regard.swap/2")), "regard.json", "regard.swap/2"),
    "unknown key": (edit("regard.json", lambda s: s.update(code="x")), "regard.json", "unknown key"),
    "missing key": (edit("regard.json", lambda s: s.pop("dtype")), "regard.json", "lacks 'dtype'"),
    "unsigned": (
        lambda f: (f / "regard.json").write_text((f / "regard.json").read_text() + " "),
        "model.safetensors",
        "another one",
    ),
    "unknown mechanism": (
        edit("regard.json", lambda s: s["swaps"][0].update(mechanism="os:system")),
        "regard.json",
        "mechanism is unknown",
    ),
    "unknown option": (
        edit("regard.json", lambda s: s["swaps"][0].update(mechanism="kerple(size=3)")),
        "regard.json",
        "size",
    ),
    "out of bounds": (
        edit("regard.json", lambda s: s["swaps"][0].update(mechanism="entmax(alpha=-1.0)")),
        "regard.json",
        "alpha is out of range",
    ),
    "huge option": (
        edit("regard.json", lambda s: s["swaps"][0].update(mechanism="shaw(max_distance=10000000000000)")),
        "regard.json",
        "position|table|tensor",
    ),
    "unknown kernel": (edit("regard.json", lambda s: s["swaps"][0].update(kernel="x")), "regard.json", "kernel"),
    "two answers": (edit("regard.json", lambda s: s["swaps"][0].update(slots={"mask": {}})), "regard.json", "both"),
    "unknown layer": (
        edit("regard.json", lambda s: s["swaps"][0]["layers"].update({"lm_head": layer(s)})),
        "regard.json",
        "lm_head",
    ),
    "huge shape": (
        edit("regard.json", lambda s: layer(s)["shape"].update(num_heads=2**50)),
        "regard.json",
        "num_heads is too large",
    ),
    "odd heads": (edit("regard.json", lambda s: layer(s).update(heads=[4])), "regard.json", "heads is too large"),
    "odd fact": (edit("regard.json", lambda s: layer(s).update(causal=1)), "regard.json", "causal"),
    "odd attention": (
        edit("regard.json", lambda s: s["attention"].update({":": "kernels-community/x"})),
        "regard.json",
        "does not have",
    ),
    "cut": (
        lambda f: (f / "regard.safetensors").write_bytes((f / "regard.safetensors").read_bytes()[:-9]),
        "regard.safetensors",
        "bytes long, and .* stand there",
    ),
    "other numbers": (tensors(lambda h: h[first(h)].add_(1.0), tell=False), "regard.safetensors", "sha256"),
    "other dtype": (
        tensors(lambda h: h.update({first(h): h[first(h)].half()}), tell=False),
        "regard.safetensors",
        "F16",
    ),
    "other shape": (
        tensors(lambda h: h.update({first(h): torch.zeros(3, 5)}), tell=True),
        "regard.json",
        "is not what the recipe builds",
    ),
    "other kind": (
        tensors(lambda h: h.update({first(h): h[first(h)].long()}), tell=True),
        "regard.json",
        "is not what the recipe builds",
    ),
    "tensor missing": (tensors(lambda h: h.pop(first(h)), tell=True), "regard.json", "misses a tensor"),
    "tensor beyond": (tensors(lambda h: h.update(odd=torch.zeros(1)), tell=True), "regard.json", "nothing uses"),
    "no class": (
        edit("config.json", lambda s: s.update(architectures=["os"])),
        "config.json",
        "no model of transformers",
    ),
    "no such model": (edit("config.json", lambda s: s.update(model_type="x")), "config.json", "model type"),
    "huge host": (edit("config.json", lambda s: s.update(vocab_size=10**12)), "config.json", "parameters"),
    "many layers": (edit("config.json", lambda s: s.update(num_hidden_layers=10**9)), "config.json", "too large"),
    "smaller host": (
        edit("config.json", lambda s: s.update(num_hidden_layers=1)),
        "model.safetensors",
        "unexpected keys",
    ),
    "plain weights": (
        lambda f: tiny("llama", torch.float32).save_pretrained(f),
        "model.safetensors",
        "was not written by Swap.save_pretrained",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_end_in_one_line_that_names_the_file(what: str, saved: Path, tmp_path: Path):
    spoil, file, match = BAD[what]
    folder = tmp_path / "folder"
    shutil.copytree(saved, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=match) as caught:
        regard.load_swapped(folder)
    assert str(caught.value).startswith(str(folder / file))
    assert "\n" not in str(caught.value)


def test_a_mask_s_numbers_are_looked_at():
    good = mask_as_data(masks.window(3), {})
    for change in ({"step": 0}, {"step": 2**80}, {"back": 1.5}, {"mask": "Predicate"}, {"words": 3}, {"more": 1}):
        with pytest.raises((ValueError, TypeError), match="recipe: "):
            mask_from_data({**good, **change}, {})
    for data in (None, 3, [], {}, {"mask": "And", "parts": []}, {"mask": "Dense", "tensor": "x"}, {"mask": ["And"]}):
        with pytest.raises((ValueError, TypeError), match="recipe: "):
            mask_from_data(data, {})

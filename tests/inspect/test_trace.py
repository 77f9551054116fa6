"""A trace changes no bit of what it watches, and its weights are those of transformers' own eager attention."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.inspect.hosts import HOSTS, IDS, LEFT, made
from tests.inspect.minilm import minilm, needs_minilm
from torch import Tensor, nn
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import regard
from regard import masks
from regard.inspect import layers as layers_of_traces
from regard.inspect.capture.masks import as_mask
from regard.inspect.layers import LayerTrace
from regard.inspect.statistics import head_statistics
from regard.inspect.trace import Trace, trace
from regard.integrations.transformers import scale_heads, swap
from regard.laws.agreement import close
from regard.models.lm import LMConfig, language_model

CASES = [(name, kernel) for name, host in HOSTS.items() for kernel in host.kernels]


def tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output, caches included."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "layers") and not isinstance(output, nn.Module):
        return [t for layer in output.layers for t in (layer.keys, layer.values)]
    if hasattr(output, "self_attention_cache"):
        return tensors(output.self_attention_cache) + tensors(output.cross_attention_cache)
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return [t for part in parts for t in tensors(part)]


@pytest.mark.parametrize(("name", "kernel"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_no_bit_changes(name: str, kernel: str, training: bool) -> None:
    model = made(name, kernel).train(training)
    torch.manual_seed(3)
    want = tensors(model(**HOSTS[name].inputs))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    got = trace(model, HOSTS[name].inputs)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(module.training is training for module in model.modules())
    assert len(want) > 0
    for a, b in zip(tensors(got.output), want, strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_weights_are_those_of_eager_attention(name: str, kernel: str) -> None:
    got = trace(made(name, kernel), HOSTS[name].inputs)
    with torch.no_grad():
        out = made(name, "eager")(**HOSTS[name].inputs, output_attentions=True)
    wanted = HOSTS[name].attentions(out)
    assert sum(map(len, wanted.values())) == len(got.layers)
    for (kind, side), maps in wanted.items():
        layers = got.select(kind=kind, side=side)
        assert [layer.index for layer in layers] == list(range(len(maps)))
        for layer, want in zip(layers, maps, strict=True):
            alive = (
                torch.ones_like(want[..., 0]).bool()
                if layer.mask is None
                else layer.mask.any(-1).expand(want.shape[:3])
            )
            weights = layer.weights()
            assert (weights[~alive] == 0).all()
            assert (layer.lse[~alive] == -torch.inf).all()
            # Some models take their softmax in float32.
            torch.testing.assert_close(weights[alive], want[alive].to(weights), rtol=1e-5, atol=1e-6)


def test_groups_stay_groups() -> None:
    layer = trace(made("llama"), HOSTS["llama"].inputs).layers[1]
    assert layer.q.shape[1] == 4
    assert layer.k.shape[1] == layer.v.shape[1] == 2
    assert layer.name == "model.layers.1.self_attn"


@pytest.mark.parametrize("name", ["llama", "t5", "gemma2", "bert"])
def test_parts_of_a_layer_are_parts_of_the_whole(name: str) -> None:
    for layer in trace(made(name, "eager"), HOSTS[name].inputs).layers:
        whole = layer.weights().double()
        close(layer.weights(heads=[2, 0], rows=[3, 1]).double(), whole[:, [2, 0]][:, :, [3, 1]])
        close(layer.weights(heads=-1, rows=slice(1, 3)).double(), whole[:, 3:, 1:3])
        close(layer.logits(heads=[1]).double(), layer.logits()[:, 1:2].double())
        assert layer.weights(rows=[]).shape == (2, 4, 0, whole.shape[3])
    with pytest.raises(ValueError, match=r"LayerTrace: heads is out of range \(got 4\); expected numbers from -4 to 3"):
        layer.weights(heads=4)
    with pytest.raises(ValueError, match="one head at least"):
        layer.logits(heads=[])
    with pytest.raises(TypeError, match="whole numbers"):
        layer.weights(rows=[0.5])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-decoder", "t5"])
def test_outputs_are_what_goes_into_the_projection(name: str) -> None:
    model = made(name)
    seen: dict[str, Tensor] = {}
    projections = {"gpt2": "c_proj", "llama": "o_proj", "t5": "o", "bert-decoder": "dense"}
    handles = []
    for path, module in model.named_modules():
        owner, _, last = path.rpartition(".")
        if last == projections[name] and ("att" in owner.rpartition(".")[2].lower() or "output" in owner):
            handles.append(module.register_forward_pre_hook(lambda m, args, owner=owner: seen.update({owner: args[0]})))
    got = trace(model, HOSTS[name].inputs)
    for layer in got.layers:
        owner = layer.name.replace(".self", ".output") if name == "bert-decoder" else layer.name
        close(layer.outputs().transpose(1, 2).flatten(2), seen[owner].flatten(2).detach())
        close(layer.outputs(heads=[2]), layer.outputs()[:, 2:3])


def test_no_block_of_rows_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = trace(made("gpt2"), HOSTS["gpt2"].inputs).layers[0]
    want, lse = layer.outputs(), layer.lse
    monkeypatch.setattr(layers_of_traces, "ELEMENTS", 100)
    again = replace(layer)
    close(again.lse, lse)
    close(again.outputs(), want)


def test_autocast_makes_weights_no_coarser() -> None:
    model = made("llama").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(**HOSTS["llama"].inputs).logits
        got = trace(model, HOSTS["llama"].inputs)
        weights, outputs = got.weights(1), got.layers[1].outputs()
    assert torch.equal(got.output.logits, want)
    assert weights.dtype == outputs.dtype == torch.float32
    assert torch.equal(weights, got.weights(1))


def test_a_cache_goes_before_the_new_tokens() -> None:
    model = made("llama")
    whole = trace(model, {"input_ids": IDS})
    for past in (5, 6):
        with torch.no_grad():
            cache = model(input_ids=IDS[:, :past]).past_key_values
        got = trace(model, {"input_ids": IDS[:, past:], "past_key_values": cache})
        for layer, want in zip(got.layers, whole.layers, strict=True):
            close(layer.weights(), want.weights(rows=slice(past, None)))
    static = StaticCache(config=model.config, max_cache_len=16)
    got = trace(model, {"input_ids": IDS, "past_key_values": static})
    close(got.weights(1)[..., :7], whole.weights(1))
    assert (got.weights(1)[..., 7:] == 0).all()


def test_packed_texts_do_not_see_each_other() -> None:
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(2, -1)
    got = trace(made("llama"), {"input_ids": IDS, "position_ids": places, "use_cache": False})
    apart = trace(made("llama"), {"input_ids": IDS[:, 4:]})
    close(got.weights(1)[..., 4:, 4:], apart.weights(1))
    assert (got.weights(1)[..., 4:, :4] == 0).all()


@pytest.mark.slow  # it compiles
def test_flex_masks_are_read() -> None:
    inputs = HOSTS["llama-left"].inputs
    with torch.no_grad():
        got, want = trace(made("llama-left", "flex_attention"), inputs), trace(made("llama-left"), inputs)
    torch.testing.assert_close(got.weights(1), want.weights(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_what_flash_kernels_are_given(causal: bool) -> None:
    """They run on GPUs only: padding (B, S), causality and a window, aligned bottom-right."""
    q, k = torch.zeros(2, 4, 3, 4), torch.zeros(2, 4, 5, 4)
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    options = {"is_causal": causal, "sliding_window": 2}
    mask, bias = as_mask(keep, "flash_attention_2", nn.Identity(), q, k, options)
    assert bias is None
    assert mask is not None
    for b in range(2):
        for i in range(3):
            for j in range(5):
                near = (0 <= i + 2 - j < 2) if causal else abs(i + 2 - j) < 2
                assert bool(mask[b, 0, i, j]) == (near and bool(keep[b, j]))
    assert as_mask(None, "flash_attention_2", nn.Identity(), q, k, {"is_causal": False}) == (None, None)
    with pytest.raises(ValueError, match="packed sequences"):
        as_mask(None, "flash_attention_2", nn.Identity(), q, k, {"cu_seq_lens_q": keep})


def test_layers_that_share_a_mask_share_its_copy() -> None:
    first, second = trace(made("llama-left"), HOSTS["llama-left"].inputs).layers
    assert first.mask is not None
    assert first.mask is second.mask


def test_what_the_model_does_later_changes_nothing() -> None:
    model = made("llama")
    got = trace(model, HOSTS["llama"].inputs)
    before = [layer.weights() for layer in got.layers]
    for entry in got.output.past_key_values.layers:
        entry.keys.zero_()
        entry.values.zero_()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for layer, want in zip(got.layers, before, strict=True):
        assert torch.equal(layer.weights(), want)
        assert not layer.q.requires_grad


# --- bounds


def stored(layer: LayerTrace) -> int:
    return sum(t.untyped_storage().nbytes() for t in (layer.q, layer.k, layer.v))


def test_what_is_kept_is_what_was_asked_for() -> None:
    model, inputs = made("llama"), HOSTS["llama"].inputs
    whole = trace(model, inputs)
    some = trace(model, inputs, layers=[1], heads=[3, 0], dtype=torch.bfloat16)
    (layer,) = some.layers
    assert layer.index == 1
    assert layer.heads == (3, 0)
    # 2 texts x 7 tokens x 4 features x 2 bytes; of each of q, k and v the two heads asked for.
    assert stored(layer) == 3 * 2 * 2 * 7 * 4 * 2
    assert layer.mask is not None
    assert layer.mask.shape[1] == 1
    close(layer.weights().double(), trace(model, inputs, dtype=torch.bfloat16).layers[1].weights(heads=[3, 0]).double())
    assert (layer.weights() - whole.layers[1].weights(heads=[3, 0])).abs().max() < 0.1
    assert stored(whole.layers[0]) == 2 * 7 * 4 * 8 * (4 + 2 + 2)


@pytest.mark.parametrize("name", ["t5", "gemma2", "llama-left"])
def test_heads_carry_their_bias_and_mask(name: str) -> None:
    model, inputs = made(name, "eager"), HOSTS[name].inputs
    for layer, whole in zip(trace(model, inputs, heads=[2]).layers, trace(model, inputs).layers, strict=True):
        close(layer.weights().double(), whole.weights(heads=[2]).double())


def test_layers_can_go_to_disk(tmp_path: Path) -> None:
    model, inputs = made("t5"), HOSTS["t5"].inputs
    got, want = trace(model, inputs, to=tmp_path / "a"), trace(model, inputs)
    again = Trace.from_dir(tmp_path / "a")
    third = Trace.from_dir(want.to_dir(tmp_path / "b"))
    for other in (got, again, third):
        for a, b in zip(other.layers, want.layers, strict=True):
            assert (a.name, a.index, a.kind, a.side, a.scale) == (b.name, b.index, b.kind, b.side, b.scale)
            assert torch.equal(a.weights(), b.weights())
            assert torch.equal(a.outputs(), b.outputs())
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {path.name for path in (tmp_path / "b").iterdir()}
    assert {"trace.json", "layer-0000.safetensors"} <= files
    with pytest.raises(ValueError, match=r"trace: the folder is not empty \(got .*; expected a new or an empty"):
        trace(model, inputs, to=tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "text"),
    [("trace.json", "{"), ("trace.json", '{"format": "regard.trace/9"}'), ("layer-0000.safetensors", "x")],
)
def test_damaged_folders_are_refused(tmp_path: Path, name: str, text: str) -> None:
    trace(made("gpt2"), HOSTS["gpt2"].inputs).to_dir(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="holds no trace of regard"):
        Trace.from_dir(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        Trace.from_dir(tmp_path / "nowhere")


def json_with(**changed: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        said = json.loads((folder / "trace.json").read_text())
        layers = {name[6:]: changed.pop(name) for name in list(changed) if name.startswith("layer_")}
        said["layers"][0] |= layers
        (folder / "trace.json").write_text(json.dumps(said | changed))

    return act


def tensors_with(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        held = load_file(folder / "layer-0000.safetensors")
        held[name] = change(held[name]).contiguous()
        save_file(held, folder / "layer-0000.safetensors")

    return act


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "layers are a number": (json_with(layers=3), "trace.json: trace: layers are no list"),
    "layers of numbers": (json_with(layers=[3]), "trace.json: trace: layers are no list"),
    "no layers": (lambda f: (f / "trace.json").write_text('{"format": "regard.trace/1"}'), "trace.json: it has no"),
    "tokens are text": (json_with(tokens="ab"), "tokens are no rows"),
    "tokens are numbers": (json_with(tokens=[1, 2]), "tokens are no rows"),
    "a grid of words": (json_with(grid=["a", "b"]), "grid has the wrong type"),
    "a grid of three": (json_with(grid=[1, 2, 3]), "grid has the wrong form"),
    "more before the patches than there is": (json_with(extra_tokens=2**70), "extra_tokens is too large"),
    "a name of numbers": (json_with(layer_name=3), "name of a layer is no text"),
    "a kind of its own": (json_with(layer_kind="other"), "kind is unknown"),
    "a scale of words": (json_with(layer_scale="x"), "scale has the wrong type"),
    "heads of words": (json_with(layer_heads=["x"]), "heads has the wrong type"),
    "one head of four": (json_with(layer_heads=[1]), "heads are not as many"),
    "a mask outside": (json_with(layer_mask="../../x"), "mask has the wrong type"),
    "a mask that is not there": (json_with(layer_bias=3), "shared-0003.safetensors: there is no such file"),
    "deep": (lambda folder: (folder / "trace.json").write_text("[" * 100_000), "trace.json: it is nested too deep"),
    "queries of whole numbers": (tensors_with("q", lambda t: t.long()), "layer-0000.safetensors: trace: q has"),
    "queries of three axes": (tensors_with("q", lambda t: t[0]), "q has the wrong shape"),
    "fewer keys than values": (tensors_with("k", lambda t: t[:, :, :1]), "v has the wrong shape"),
    "narrow keys": (tensors_with("k", lambda t: t[..., :1]), "k has the wrong shape"),
    "three of four heads": (tensors_with("q", lambda t: t[:, :3]), "multiple of G"),
    "cut": (
        lambda folder: (folder / "layer-0001.safetensors").write_bytes(
            (folder / "layer-0001.safetensors").read_bytes()[:-9]
        ),
        "layer-0001.safetensors: its tensors are",
    ),
    "a layer is a folder": (
        lambda folder: ((folder / "layer-0001.safetensors").unlink(), (folder / "layer-0001.safetensors").mkdir()),
        "layer-0001.safetensors: it is no plain file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", SPOILT)
def test_traces_that_no_trace_wrote_name_the_file(way: str, tmp_path: Path) -> None:
    spoil, words = SPOILT[way]
    trace(made("gpt2"), HOSTS["gpt2"].inputs).to_dir(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words) as refused:
        Trace.from_dir(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path} holds no trace of regard: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 600


# --- errors


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = made("bert")
    table = ALL_ATTENTION_FUNCTIONS
    before = {name: table[name] for name in table}
    last = model.encoder.layer[1].output
    handle = last.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        trace(model, HOSTS["bert"].inputs, to=tmp_path / "a")
    handle.remove()
    assert list((tmp_path / "a").iterdir()) == []
    assert {name: table[name] for name in table} == before
    assert "eager" not in table
    assert model.config._attn_implementation == "sdpa"
    assert len(trace(model, HOSTS["bert"].inputs, to=tmp_path / "a").layers) == 2


def test_functions_registered_during_a_trace_are_found_afterwards() -> None:
    trace(made("bert"), HOSTS["bert"].inputs)
    kept = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", len)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is len
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", kept)


def test_a_function_that_one_table_has_for_itself_is_called_and_kept() -> None:
    model, inputs = made("bert"), HOSTS["bert"].inputs
    shared, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return shared(*args, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counted
    try:
        trace(model, inputs)
        assert len(calls) == 2
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counted
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is shared


def test_other_models_are_not_recorded() -> None:
    model, other = made("bert"), made("gpt2", "eager")
    model.encoder.layer[0].register_forward_hook(lambda *_: other(**HOSTS["gpt2"].inputs) and None)
    got = trace(model, HOSTS["bert"].inputs)
    assert [layer.name for layer in got.layers] == [f"encoder.layer.{n}.attention.self" for n in range(2)]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": [5]}, ValueError, r"layers .* did not run \(got \[5\]\); expected some of \[0, 1\]"),
        ({"heads": [4]}, ValueError, r"heads is out of range \(got \[4\]\); expected numbers from -4 to 3"),
        ({"dtype": torch.int64}, ValueError, "floating"),
        ({"inputs": "text"}, ValueError, "needs a tokenizer"),
        ({"model": len}, TypeError, "torch.nn.Module"),
        (
            {"model": torch.compile(nn.Linear(2, 2)), "inputs": torch.ones(2)},
            ValueError,
            r"model is compiled.* \(got Linear\)",
        ),
        (
            {"model": nn.Linear(2, 2), "inputs": torch.ones(2)},
            ValueError,
            r"ran no attention layer that is watched \(got Linear\)",
        ),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], words: str) -> None:
    call = {"model": made("bert"), "inputs": HOSTS["bert"].inputs} | options
    with pytest.raises(error, match=words):
        trace(call.pop("model"), call.pop("inputs"), **call)


# --- text, pictures, other functions


class Words:
    """A tokenizer of words, as transformers' are called."""

    def __call__(self, texts: list[str], *, return_tensors: str, padding: bool) -> dict[str, Tensor]:
        rows = [[4 + len(word) for word in text.split()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["[PAD]" if n == 0 else "▁" + "x" * (n - 4) for n in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_text_is_read_by_the_tokenizer() -> None:
    got = trace(made("bert"), ["a bb ccc", "dddd"], tokenizer=Words())
    assert got.tokens == ((" x", " xx", " xxx"), (" xxxx", "[PAD]", "[PAD]"))
    assert got.tokens_of(got.layers[0]) == (got.tokens, got.tokens)
    assert got.layers[0].mask is not None
    assert got.layers[0].mask[:, 0, 0].tolist() == [[True, True, True], [True, False, False]]
    with pytest.raises(ValueError, match=r"longer than the model's positions \(got 600 tokens\); expected at most 512"):
        trace(made("bert"), "a " * 600, tokenizer=Words())


def test_the_decoder_has_tokens_of_its_own() -> None:
    got = trace(made("t5"), "a bb ccc", tokenizer=Words())
    assert got.decoder_tokens == (("[PAD]",),)
    (cross, _) = got.select(kind="cross")
    assert got.tokens_of(cross) == (got.decoder_tokens, got.tokens)
    assert cross.shape[2:] == (1, 3)


def test_pictures_have_a_grid() -> None:
    got = trace(made("vit"), HOSTS["vit"].inputs["pixel_values"])
    assert (got.grid, got.extra_tokens) == ((3, 3), 1)
    assert got.images is not None
    assert torch.equal(got.images, HOSTS["vit"].inputs["pixel_values"])
    both = trace(made("clip"), HOSTS["clip"].inputs)
    assert (both.grid, both.extra_tokens) == ((2, 2), 1)
    assert [layer.side for layer in both.layers] == ["vision", "vision", "text", "text"]


def test_functions_of_others_are_measured() -> None:
    """Halved weights, and a key in three hidden: nothing that queries and keys could tell."""

    def odd(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        keep = torch.arange(k.shape[2]) % 3 != 1
        weights = (q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1) / 2
        return (weights @ v).transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("odd_test", odd)
    AttentionMaskInterface.register("odd_test", lambda **_: None)
    layer = trace(made("bert", "odd_test"), HOSTS["bert"].inputs).layers[1]
    keep = torch.arange(7) % 3 != 1
    close(layer.weights(), (layer.q @ layer.k.mT).masked_fill(~keep, -torch.inf).softmax(-1) / 2)
    close(layer.weights(heads=[1], rows=[0]), layer.weights()[:, 1:2, :1])
    with pytest.raises(ValueError, match="its weights were measured"):
        layer.logits()


def test_gated_heads_are_traced_beneath_the_gate() -> None:
    model = made("llama")
    want = trace(model, HOSTS["llama"].inputs).weights(0)
    with scale_heads(model, torch.zeros(2, 4)):
        got = trace(model, HOSTS["llama"].inputs)
    assert len(got.layers) == 2
    close(got.weights(0), want)
    assert got.layers[0].has_logits


# --- regard's layers and torch's


def test_own_layers() -> None:
    torch.manual_seed(0)
    x, memory = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    layer = regard.create("alibi", dim=16, num_heads=4, num_kv_heads=2, causal=True, dropout=0.5, dtype=torch.float64)
    torch.manual_seed(1)
    want = layer(x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    got = trace(layer, x)
    assert torch.equal(got.output, want)
    assert torch.equal(torch.get_rng_state(), after)
    assert layer.training
    (one,) = got.layers
    close(layer.eval()(x), layer.o_proj(one.outputs().transpose(1, 2).flatten(2)))
    close(one.weights(rows=[4, 1, 2]), one.weights()[:, :, [4, 1, 2]])
    close(one.logits().softmax(-1), one.weights())
    assert one.mask is not None
    assert torch.equal(one.mask[0, 0], torch.ones(6, 6).tril().bool())
    cross = regard.Attention(16, 4, dtype=torch.float64)
    (two,) = trace(cross, (x, memory)).layers
    assert two.kind == "cross"
    assert two.shape == (2, 4, 6, 9)
    close(cross(x, memory), cross.o_proj(two.outputs().transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("mechanism", ["entmax", "cope", "kerple", "linear", "softmax"])
def test_a_language_model_of_bytes(mechanism: str, tmp_path: Path) -> None:
    config = LMConfig(mechanism, 16, 2, 4, 16)
    model = language_model(config).double().eval()
    got = trace(model, "Hé!")
    assert got.tokens == (("H", "<C3>", "<A9>", "!"),)
    assert torch.equal(got.output, model(torch.tensor([list("Hé!".encode())])))
    assert [layer.name for layer in got.layers] == ["blocks.0.mixer", "blocks.1.mixer"]
    mixer, block = model.blocks[1].mixer, got.layers[1]
    x = model.blocks[1].mixer_norm(model.blocks[0](model.embedding(torch.tensor([list("Hé!".encode())]))))
    close(mixer(x), mixer.o_proj(block.outputs().transpose(1, 2).flatten(2)))
    again = Trace.from_dir(got.to_dir(tmp_path / "a"))
    assert torch.equal(again.weights(1), block.weights())
    assert again.layers[1].has_logits == block.has_logits == (mechanism != "linear")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "bool", "float"])
def test_torch_multihead_attention(batch_first: bool, masks: str) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6, vdim=5, dtype=torch.float64)
    q, k, v = (torch.randn(3, n, w, dtype=torch.float64) for n, w in ((4, 8), (5, 6), (5, 5)))
    given = (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
    call: dict[str, Any] = {}
    if masks == "bool":
        call = {"attn_mask": torch.ones(4, 5).triu(2).bool(), "key_padding_mask": torch.arange(5).eq(3).expand(3, 5)}
    if masks == "float":
        call = {"attn_mask": torch.randn(6, 4, 5, dtype=torch.float64)}
    want, weights = layer(*given, **call, average_attn_weights=False)
    got = trace(Calls(layer, call), given)
    assert torch.equal(got.output[0], want)
    (one,) = got.layers
    assert one.kind == "cross"
    close(one.weights(), weights.detach())


def test_torchs_fused_encoder_keeps_its_kernel() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        with pytest.raises(ValueError, match="set_fastpath_enabled"):
            trace(layer, x)
        assert torch.equal(layer(x), want)
    assert trace(layer.train(), x).layers[0].kind == "self"


class Calls(nn.Module):
    """A module that hands keywords on."""

    def __init__(self, layer: nn.Module, call: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.layer(*inputs, **self.call, average_attn_weights=False)


# --- what a trace offers


def test_statistics_by_hand() -> None:
    """One head: the first query on itself, the second on the first and half on itself, the third on the mark."""
    weights = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1.0]]]], dtype=torch.float64)
    seen = torch.ones(1, 3, dtype=torch.bool)
    found = head_statistics(weights, seen=seen, marks=torch.tensor([[True, False, True]]))
    want = {
        "entropy": math.log(2) / 3,
        "maximum": 2.5 / 3,
        "first": 0.5,
        "separators": 1 / 3,
        "distance": 0.5 / 3,
        "itself": 2.5 / 3,
        "previous": 0.5 / 3,
        "following": 0.0,
    }
    assert {name: float(value[0]) for name, value in found.items() if value is not None} == pytest.approx(want)


def test_padding_does_not_count() -> None:
    model, ids = made("llama-left"), IDS[1:]
    alone = trace(model, {"input_ids": ids[:, 3:], "position_ids": torch.arange(3, 7)[None]}).statistics()
    padded = trace(
        model, {"input_ids": ids, "attention_mask": LEFT[1:], "position_ids": torch.arange(7)[None]}
    ).statistics()
    assert len(alone) == len(padded) == 8
    for a, b in zip(alone, padded, strict=True):
        for field in ("entropy", "maximum", "first", "distance", "itself", "previous", "following"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), abs=1e-5)
        assert a.separators is None


def test_analyses_are_one_call_away(tmp_path: Path) -> None:
    got = trace(made("bert"), "a bb ccc", tokenizer=Words())
    assert got.rollout().shape == (2, 1, 3, 3)
    close(got.rollout().sum(-1), torch.ones(2, 1, 3, dtype=torch.float64))
    close(got.flow(rows=[0], layers=[1]).sum(-1), torch.ones(1, 1, 1, dtype=torch.float64))
    close(got.relevance([torch.zeros_like(one) for one in got.maps()])[0], torch.eye(3, dtype=torch.float64))
    page = got.save(tmp_path / "page.html", title="<b>").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert got._repr_html_().lstrip().startswith("<iframe")
    assert repr(got) == "Trace(model='BertModel', layers=2)"
    two = trace(made("clip"), HOSTS["clip"].inputs)
    assert two.rollout(side="vision").shape == (2, 2, 5, 5)
    with pytest.raises(
        ValueError, match=r"side is needed.* several stacks \(got None\); expected one of 'vision', 'text'"
    ):
        two.rollout()
    with pytest.raises(ValueError, match=r"trace: layer is too large \(got 7\); expected an int from -2 to 1"):
        got.weights(7)


@needs_minilm
def test_the_real_encoder_has_an_offset_head_and_sinks() -> None:
    model, tokenizer = minilm()
    got = trace(model, "The quick brown fox jumps over the lazy dog because it was bored.", tokenizer=tokenizer)
    assert got.tokens is not None
    assert got.tokens[0][:3] == ("[CLS]", "the", "quick")
    table = {(row.index, row.head): row for row in got.statistics()}
    assert table[0, 2].previous is not None
    assert table[0, 2].previous > 0.9
    assert max(row.first for row in table.values()) > 0.8


# --- swapped models


@pytest.mark.parametrize("mechanism", ["softmax", "entmax", "alibi", masks.window(3) & masks.causal()])
@pytest.mark.parametrize("name", ["llama-left", "bert"])
def test_swapped_models(name: str, mechanism: Any) -> None:
    model = made(name)
    with swap(model, mechanism, check=False) as swapped:
        want = model(**HOSTS[name].inputs)
        weights = model(**HOSTS[name].inputs, output_attentions=True).attentions
        calls = swapped.report().rows[0].calls
        got = trace(model, HOSTS[name].inputs)
        got.weights(0)
        for a, b in zip(tensors(got.output), tensors(want), strict=True):
            assert torch.equal(a, b)
        assert swapped.report().rows[0].calls == calls + 1
    assert len(got.layers) == 2
    for layer, one in zip(got.layers, weights, strict=True):
        torch.testing.assert_close(layer.weights(), one.detach(), rtol=1e-5, atol=1e-6)
        assert layer.has_logits
    assert trace(model, HOSTS[name].inputs).layers[0].logit_rule is None


def test_layers_and_heads_that_are_not_swapped() -> None:
    model, inputs = made("llama"), HOSTS["llama"].inputs
    plain = trace(model, inputs)
    with swap(model, "entmax", layers=[1], heads=[0, 2], check=False) as swapped:
        got = trace(model, inputs)
        weights = model(**inputs, output_attentions=True).attentions[-1]
        counted = swapped.report().rows[0].calls
        got.weights(1)
        assert swapped.report().rows[0].calls == counted
    assert torch.equal(got.weights(0), plain.weights(0))
    assert got.layers[0].has_logits
    assert not got.layers[1].has_logits
    close(got.weights(1), weights.detach())
    close(got.weights(1, heads=[1, 3]), plain.weights(1, heads=[1, 3]))
    assert (got.weights(1, heads=[0, 2]) - plain.weights(1, heads=[0, 2])).abs().max() > 1e-3

"""Layers of other libraries as layers of regard: equal outputs, weights there and back, and what is refused."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import regard
from integrations import conversions
from integrations.conversions import (
    Case,
    D,
    H,
    M,
    T,
    case,
    cls,
    config_of,
    difference,
    filled,
    module_of,
    names,
    normal,
    rope,
    tokens,
)
from regard.integrations import files
from regard.laws.agreement import close
from vision.shared import vectors

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", names())
def test_computes_the_same_and_gives_the_weights_back(name: str) -> None:
    """Outputs, to float64's last digits where theirs has no parts in float32 or is made to do without them, and every
    bit of every weight."""
    made = case(name)
    before = copy.deepcopy(made.theirs.state_dict())
    ours = regard.convert_layer(made.theirs)
    assert not ours.training
    assert difference(made, wide=False) <= (1e-6 if made.fp32 else 1e-10)
    assert difference(made, wide=True) <= 1e-10
    if not made.exact:
        with pytest.raises(ValueError, match=r"layer_state: q_norm.weight was rounded on the way here"):
            regard.layer_state(ours, made.theirs)
        return
    other = case(name).theirs
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(regard.layer_state(ours, other))
    assert before.keys() == other.state_dict().keys()
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())


def test_every_library_is_there_but_timm() -> None:
    """Else the cases above would be fewer without anybody noticing."""
    assert {name.split(" ")[0].split(".")[0] for name in names()} >= {"transformers", "torch", "torch_geometric"}


def stand_in(where: str, name: str, **held: object) -> nn.Module:
    """A module that goes for one of timm's, which need not be installed."""
    made = type(name, (nn.Module,), {"__module__": where})()
    for key, value in held.items():
        setattr(made, key, value)
    return made


def given(kind: type[nn.Module], z: dict[str, torch.Tensor], name: str, **options: object) -> nn.Module:
    """A projection with timm's numbers."""
    weight, bias = z[f"p_{name}.weight"], z.get(f"p_{name}.bias")
    made = kind(weight.shape[1], weight.shape[0], bias=bias is not None, **options).double()
    made.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return made


@pytest.mark.parametrize("numbers", ["halo", "halobias", "stride2"])
def test_gives_the_numbers_of_timms_halo_attention(numbers: str) -> None:
    """Two of the three put out another width than they take, which is refused."""
    z = vectors("A041", numbers)
    heads, D, block, halo, stride, scaled = (int(n) for n in z["cfg"])
    tables = nn.Module()
    for name in ("height_rel", "width_rel"):
        tables.register_parameter(name, nn.Parameter(z[f"p_pos_embed.{name}"]))
    width = z["out"].shape[1]
    sizes = {"num_heads": heads, "dim_head_qk": D, "dim_head_v": width // heads, "dim_out_v": width}
    sizes |= {"block_size": block, "halo_size": halo, "block_stride": stride, "scale_pos_embed": bool(scaled)}
    q, kv = (given(nn.Conv2d, z, name, kernel_size=1) for name in ("q", "kv"))
    theirs = stand_in("timm.layers.halo_attn", "HaloAttn", q=q, kv=kv, pos_embed=tables, pool=nn.Identity(), **sizes)
    if width != z["x"].shape[1]:
        with pytest.raises(ValueError, match=r"HaloAttn: dim_out_v has no counterpart here \(got 6\)"):
            regard.convert_layer(theirs)
        return
    ours = regard.convert_layer(theirs)
    close(ours(z["x"]), z["out"])
    state = regard.layer_state(ours, theirs)
    assert all(torch.equal(t, state[name]) for name, t in theirs.state_dict().items())


@pytest.mark.parametrize("numbers", ["channel", "window"])
def test_gives_the_numbers_of_davits_authors_under_timms_names(numbers: str) -> None:
    z = vectors("A062", numbers)
    width = z["x"].shape[-1]
    held = {name: given(nn.Linear, z, name) for name in ("qkv", "proj")}
    if numbers == "channel":
        theirs = stand_in("timm.models.davit", "ChannelAttention", num_heads=int(z["groups"]), **held)
    else:
        sizes = {"dim": width, "num_heads": 2, "window_size": (int(z["size"]),) * 2}
        theirs = stand_in("timm.models.davit", "WindowAttention", **sizes, **held)
    ours = regard.convert_layer(theirs)
    close(ours(z["x"].movedim(-1, 1)).movedim(1, -1), z["out"])


@pytest.mark.parametrize("normed", [False, True])
def test_timms_attention_by_hand(normed: bool) -> None:
    """qkv stacked, heads outermost in each; a norm that isn't of root mean squares is refused."""
    norms = {f"{n}_norm": nn.LayerNorm(D) if normed else nn.Identity() for n in "qk"}
    theirs = stand_in(
        "timm.layers.attention", "Attention", num_heads=H, head_dim=D, scale=D**-0.5, attn_drop=nn.Dropout(0.0),
        qkv=nn.Linear(M, 3 * M), norm=nn.Identity(), gate=None, proj=nn.Linear(M, M), **norms,
    )  # fmt: skip
    filled(theirs)
    if normed:
        with pytest.raises(ValueError, match=r"Attention: q_norm is another norm \(got LayerNorm\)"):
            regard.convert_layer(theirs)
        return
    x = normal(3, 2, T, M)
    q, k, v = (z.unflatten(-1, (H, D)).transpose(1, 2) for z in theirs.qkv(x).chunk(3, -1))
    want = theirs.proj(((q @ k.mT * D**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    close(regard.convert_layer(theirs)(x), want)


def test_the_layer_stands_on_its_own() -> None:
    theirs = filled(module_of("LlamaAttention")).train().to(torch.bfloat16)
    ours = regard.convert_layer(theirs)
    assert ours.training
    assert ours.q_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        theirs.q_proj.weight.zero_()
    assert ours.q_proj.weight.abs().min() >= 0
    assert ours.q_proj.weight.any()
    assert ours.q_proj.weight.requires_grad


def test_draws_no_random_numbers() -> None:
    theirs = filled(module_of("LlamaAttention"))
    torch.manual_seed(3)
    regard.convert_layer(theirs)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0},
        {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0]},
    ],
    ids=lambda said: said["rope_type"],
)
def test_scaled_rotations(scaling: dict) -> None:
    """Lengths on this side of the trained one for longrope, beyond it for dynamic."""
    kind, dynamic = scaling["rope_type"], scaling["rope_type"] == "dynamic"
    trained = {"max_position_embeddings": 5} if dynamic else {}
    if kind in ("llama3", "yarn", "longrope"):
        trained = {"max_position_embeddings": 128}
        scaling = {**scaling, "original_max_position_embeddings": 16}
    theirs = filled(module_of("LlamaAttention", rope_parameters={**scaling, "rope_theta": 500.0}, **trained))
    ours = regard.convert_layer(theirs)
    unscaled = {"rope_type": "default", "rope_theta": 500.0}
    plain = regard.convert_layer(filled(module_of("LlamaAttention", rope_parameters=unscaled)))
    got, want = tokens(ours, theirs)
    assert (got - want).abs().max() <= 1e-6 * (1 + want.abs().max())
    assert (tokens(plain, theirs)[0] - want).abs().max() > 1e-4


STRETCHED = {
    "Phi3Attention": {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    "GlmAttention": {"rope_type": "yarn", "factor": 4.0},
    "GPTNeoXAttention": {"rope_type": "linear", "factor": 4.0},
}


@pytest.mark.parametrize("name", STRETCHED)
def test_stretched_rotations_of_some_channels(name: str) -> None:
    """Phi-4-mini's, and others: pairs and factors are those of the channels that turn."""
    said = {"rope_theta": 500.0, "partial_rotary_factor": 2 / 3, **STRETCHED[name]}
    lengths = {"max_position_embeddings": 128}
    if said["rope_type"] != "linear":
        said["original_max_position_embeddings"] = 16
        lengths |= {"original_max_position_embeddings": 16} if name == "Phi3Attention" else {}
    theirs = filled(module_of(name, rope_parameters=said, **lengths))
    agree(theirs)
    position = regard.convert_layer(theirs).position
    assert position.rotary_dim == 4
    assert position.scaling is not None


def test_gpt_oss_rounds_no_ends() -> None:
    said = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    said |= {"truncate": False, "original_max_position_embeddings": 64}
    theirs = filled(module_of("GptOssAttention", rope_parameters=said, max_position_embeddings=2048))
    agree(theirs)
    assert not regard.convert_layer(theirs).position.scaling.truncate


@pytest.mark.parametrize("name", ["DeepseekV2Attention", "DeepseekV3Attention"])
@pytest.mark.parametrize("more", [{"q_lora_rank": None}, {"attention_bias": False}, {"rope_interleave": False}, "yarn"])
def test_deepseeks_settings(name: str, more: dict | str) -> None:
    """V2 has no `rope_interleave`: neighbours turn."""
    if more == "yarn":
        said = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 16}
        more = {"rope_parameters": {**said, "mscale": 0.7, "mscale_all_dim": 1.0}, "max_position_embeddings": 640}
    if name == "DeepseekV2Attention":
        more.pop("rope_interleave", None)
    theirs = filled(module_of(name, **(conversions.LATENT | more)))
    agree(theirs)
    state = regard.layer_state(regard.convert_layer(theirs), theirs)
    assert all(torch.equal(t, state[key]) for key, t in theirs.state_dict().items())


@pytest.mark.parametrize("layer", [0, 3])
def test_lambda_starts_where_the_layer_stands(layer: int) -> None:
    theirs = filled(module_of("DiffLlamaAttention", layer=layer, num_hidden_layers=4))
    agree(theirs)
    assert regard.convert_layer(theirs).lambda_init == theirs.lambda_init


def agree(theirs: nn.Module) -> None:
    """All in float64 to its last digits, and as it is to float32's."""
    made = Case(theirs, tokens)
    assert difference(made, wide=False) <= 1e-6
    assert difference(made, wide=True) <= 1e-10


def rotary_of(kind: str) -> bool:
    """Whether all layers turn."""
    some = ("AfmoeAttention", "Cohere2Attention", "Exaone4Attention", "ExaoneMoeAttention", "SmolLM3Attention")
    return kind not in some


@pytest.mark.parametrize("name", [name for name, own in conversions.OWN.items() if "layer_types" in own])
def test_layers_of_one_model_may_differ(name: str) -> None:
    """Windows in some layers, and no rotation in others."""
    windows = []
    for layer, kind in enumerate(conversions.OWN[name]["layer_types"]):
        theirs = filled(module_of(name, layer=layer))
        agree(theirs)
        ours = regard.convert_layer(theirs)
        windows.append(ours.mask)
        assert (ours.position is not None) == (kind == "sliding_attention" or rotary_of(name))
    assert windows == [regard.masks.window(3), None]


@pytest.mark.parametrize(("layer", "window", "base"), [(0, 3, 1e4), (1, None, 1e6)])
def test_rotations_differ_by_layer(layer: int, window: int | None, base: float) -> None:
    """Gemma 3's, as its config has it where nothing is said."""
    ours = regard.convert_layer(module_of("Gemma3Attention", layer=layer))
    assert ours.mask == (None if window is None else regard.masks.window(window))
    assert ours.position.base == base


def test_gemma_4_leaves_slow_pairs_where_they_are() -> None:
    said = {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 2 / 3}
    kinds = {"full_attention": said, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    theirs = filled(module_of("Gemma4TextAttention", layer=1, rope_parameters=kinds))
    agree(theirs)
    assert regard.convert_layer(theirs).position.scaling.kept == 2 / 3


@pytest.mark.parametrize(
    ("name", "more", "slot"),
    [
        ("Gemma2Attention", {"attn_logit_softcapping": None}, "score_mix"),
        ("CohereAttention", {"use_qk_norm": False}, "heads"),
        ("Glm4MoeAttention", {"use_qk_norm": False}, "heads"),
        ("PhiAttention", {"qk_layernorm": False}, "heads"),
        ("PersimmonAttention", {"qk_layernorm": False}, "heads"),
        ("StableLmAttention", {"qk_layernorm": False}, "heads"),
    ],
)
def test_parts_that_are_switched_off(name: str, more: dict, slot: str) -> None:
    theirs = filled(module_of(name, **more))
    assert getattr(regard.convert_layer(theirs), slot) is None
    agree(theirs)
    assert getattr(regard.convert_layer(module_of(name)), slot) is not None


def test_later_layers_of_t5_take_the_position_of_the_first() -> None:
    """They hold no table, and their model hands them what the first one made."""
    first = filled(conversions.case("transformers T5Attention").theirs)
    later = filled(type(first)(first.config, layer_idx=1), seed=3)
    x = normal(2, 2, T, M)
    with conversions.Wide():
        alone, want = later(x)[0], later(x, position_bias=first(x)[1])[0]
    ours = regard.convert_layer(later)
    assert ours.position is None
    close(ours(x), alone)
    ours.position = regard.convert_layer(first).position
    close(ours(x), want)
    assert (want - alone).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Gemma2Attention", lambda ours: setattr(ours, "score_mix", None)),
        ("GptOssAttention", lambda ours: setattr(ours, "normalizer", None)),
        ("Qwen2VLAttention", lambda ours: setattr(ours.position, "axis", (0, 1, 2, 0, 1, 2))),
        ("Qwen3VLTextAttention", lambda ours: setattr(ours.position, "axis", (0, 0, 0, 1, 1, 2))),
        ("PhiAttention", lambda ours: setattr(ours.position, "rotary_dim", D)),
        ("Olmo2Attention", lambda ours: setattr(ours.heads, "weights", "per_head")),
        ("Gemma4TextAttention", lambda ours: setattr(ours.heads, "value_norm", False)),
        ("DiffLlamaAttention", lambda ours: setattr(ours, "pairing", "adjacent")),
        ("Qwen3NextAttention", lambda ours: setattr(ours, "gate", None)),
    ],
)
def test_each_part_counts(name: str, change) -> None:
    """Else the comparisons above would not see it."""
    made = case(f"transformers {name}")
    ours = regard.convert_layer(made.theirs)
    change(ours)
    got, want = made.outputs(ours, made.theirs)
    assert (got - want).abs().max() > 1e-3 * want.abs().max()


def test_a_swapped_in_layer_gives_the_models_logits() -> None:
    """The whole model, with one of its layers replaced by a wrapper around ours."""
    from transformers import LlamaForCausalLM

    kind = cls("LlamaAttention")
    model = LlamaForCausalLM(config_of(kind)).double().eval()
    ids = torch.randint(16, (2, T), generator=torch.Generator().manual_seed(1))
    want = model(ids).logits
    ours = regard.convert_layer(model.model.layers[1].self_attn)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ours

        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
            return self.inner(hidden_states), None

    model.model.layers[1].self_attn = Wrapped()
    got = model(ids).logits
    assert (got - want).abs().max() <= 1e-6 * (1 + want.abs().max())


# --- what is refused -----------------------------------------------------------------------------------------


def test_unknown_classes_are_told_with_near_ones() -> None:
    with pytest.raises(TypeError, match=r"no mechanism loads torch.nn.modules.linear.Linear; expected"):
        regard.convert_layer(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"it has one at 'inner'"):
        regard.convert_layer(nn.ModuleDict({"inner": nn.MultiheadAttention(4, 2)}))
    with pytest.raises(TypeError, match=r"the layer has the wrong type \(got str\)"):
        regard.convert_layer("LlamaAttention")

    class LlamaAttention(nn.Module):
        """Somebody's own, of the same name."""

    with pytest.raises(TypeError, match=r"no mechanism loads .*LlamaAttention"):
        regard.convert_layer(LlamaAttention())


PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1 / 3}


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("OlmoAttention", {"clip_qkv": 4.0}, r"clip_qkv has no counterpart here \(got 4.0\)"),
        ("OlmoeAttention", {"clip_qkv": 4.0}, r"clip_qkv has no counterpart here \(got 4.0\)"),
        ("LlamaAttention", {"rope_parameters": PART}, r"partial_rotary_factor has no counterpart here"),
        ("DiffLlamaAttention", rope(rope_type="linear", factor=2.0), r"rope_type has no counterpart here"),
        ("Gemma4TextAttention", {"attention_k_eq_v": True, "layer": 1}, r"use_alternative_attention has no"),
        (
            "Gemma3nTextAttention",
            {"num_kv_shared_layers": 1, "layer": 1, "layer_types": ["full_attention"] * 2},
            r"is_kv_shared_layer has no counterpart",
        ),
    ],
)  # fmt: skip
def test_settings_without_a_counterpart(name: str, more: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        regard.convert_layer(module_of(name, **more))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 3, "vdim": 5}])
def test_kinds_of_multihead_attention_without_a_counterpart(options: dict) -> None:
    with pytest.raises(ValueError, match=r"MultiheadAttention: \w+ (has no counterpart here|is not kdim)"):
        regard.convert_layer(nn.MultiheadAttention(8, 2, **options))


def test_tensors_too_many_missing_and_misshaped_are_named() -> None:
    theirs = filled(module_of("LlamaAttention"))
    theirs.lora = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"lora.bias is too many \(got 10 tensors\); expected 8: k_proj"):
        regard.convert_layer(theirs)
    del theirs.lora
    theirs.k_proj = nn.Linear(M, 7)
    with pytest.raises(ValueError, match=r"convert_layer: .*k_proj.weight.*\(7, 24\)"):
        regard.convert_layer(theirs)


def test_a_layer_of_another_kind_has_no_such_names() -> None:
    like = module_of("LlamaAttention")
    with pytest.raises(ValueError, match=r"layer_state: layer (misses a tensor|has a tensor too many)"):
        regard.layer_state(regard.Attention(M, H), like)
    with pytest.raises(ValueError, match=r"k_proj.weight has the wrong shape \(got \(24, 24\)\); expected \(12, 24\)"):
        regard.layer_state(regard.Attention(M, H, bias=True), like)


def test_the_table_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python tools/conversions.py`, of two classes."""
    from tools import conversions as table

    few = ["torch.nn MultiheadAttention", "transformers Gemma3Attention"]
    monkeypatch.setattr(table.conversions, "names", lambda: few)
    table.main()
    head, line, first, second = capsys.readouterr().out.splitlines()
    assert head.count("|") == line.count("|") == first.count("|") == second.count("|") == 7
    assert first.startswith("| torch.nn | `MultiheadAttention` | softmax | bit by bit | ")
    assert second.startswith("| transformers | `Gemma3Attention` | ")
    assert "| no | " in second


# --- folders -------------------------------------------------------------------------------------------------

MODELS = {
    "LlamaForCausalLM": ("LlamaAttention", "model.layers.1.self_attn"),
    "BertModel": ("BertSelfAttention", "encoder.layer.1.attention.self"),
    "Qwen3Model": ("Qwen3Attention", "layers.1.self_attn"),
    "GPT2LMHeadModel": ("GPT2Attention", "transformer.h.1.attn"),
    "NystromformerModel": ("NystromformerSelfAttention", "encoder.layer.1.attention.self"),
    "ViTModel": ("ViTAttention", "layers.1.attention"),
    "DiffLlamaModel": ("DiffLlamaAttention", "layers.1.self_attn"),
    "Gemma2Model": ("Gemma2Attention", "layers.1.self_attn"),
    "StableLmModel": ("StableLmAttention", "layers.1.self_attn"),
    "Olmo2Model": ("Olmo2Attention", "layers.1.self_attn"),
}


def saved(name: str, folder: Path) -> nn.Module:
    kind = cls(MODELS[name][0])
    more = {"num_landmarks": 5, "segment_means_seq_len": 20, "conv_kernel_size": 7, "inv_coeff_init_option": False}
    config = config_of(kind, **(more | {"attn_implementation": "eager"} if name == "NystromformerModel" else {}))
    model = filled(getattr(importlib.import_module("transformers"), name)(config)).float()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", list(MODELS))
def test_loads_from_a_folder(name: str, tmp_path: Path) -> None:
    """By number and by path, bit by bit what the module itself gives; only this layer's tensors are read."""
    model = saved(name, tmp_path)
    _, path = MODELS[name]
    want = regard.convert_layer(model.get_submodule(path)).state_dict()
    read: list[str] = []
    original = files.read_tensors

    def noted(file: Path, wanted: list[str]) -> dict:
        read.extend(wanted)
        return original(file, wanted)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "read_tensors", noted)
        layers = [regard.load_layer(tmp_path, path), regard.load_layer(tmp_path, 1)]
    assert all(one.startswith(path + ".") for one in read)
    for layer in layers:
        assert not layer.training
        got = layer.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(t, want[key]) for key, t in got.items())


def edited(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(K), r"model.layers.0.self_attn: k_proj.weight is missing \(got 7 tensors\); expected 8"),
        (lambda t: t.update({K + "s": t[K].clone()}), r"model.layers.0.self_attn: k_proj.weights is too many"),
        (lambda t: t.update({K: t[K][:5].clone()}), r"k_proj.weight does not fit .*\(got F32 \[5, 24\]\).*\[12, 24\]"),
        (lambda t: t.update({K: t[K].long()}), r"k_proj.weight does not fit config.json \(got I64"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named_and_nothing_is_built(
    change, words: str, tmp_path: Path, monkeypatch
) -> None:
    saved("LlamaForCausalLM", tmp_path)
    edited(tmp_path, change)
    monkeypatch.setattr(files, "read_tensors", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=words) as caught:
        regard.load_layer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere"):
        regard.load_layer(tmp_path / "nowhere")
    saved("LlamaForCausalLM", tmp_path)
    with pytest.raises(ValueError, match=r"layer is out of range \(got 2\); expected 0 to 1: model.layers.0.self_attn"):
        regard.load_layer(tmp_path, 2)
    with pytest.raises(ValueError, match=r"layer is unknown \(got 'lm_head'\)"):
        regard.load_layer(tmp_path, "lm_head")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "other.Model"}}))
    with pytest.raises(ValueError, match="auto_map"):
        regard.load_layer(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    model = saved("LlamaForCausalLM", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read"):
        regard.load_layer(tmp_path)

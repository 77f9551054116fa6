"""Attention layers of transformers, tiny and random, and `regard.Attention` with parts that make it the same layer."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import regard
from regard.heads import QKNorm
from regard.positions import MRope, Rotary
from regard.positions.rotary_scaling import Linear, Proportional

B, T, M, H, G, D = 2, 11, 32, 4, 2, 8
BASE = 500.0
"""Of the frequencies: small, so that every pair turns."""


class Like(NamedTuple):
    """One class of transformers, and how to build it here."""

    model: str
    """The folder, and the module in it."""
    names: tuple[str, str, str]
    """Of the config, the attention and the rotary classes."""
    config: dict[str, Any]
    rope: dict[str, Any]
    parts: Callable[[], dict[str, Any]]
    """What `regard.Attention` is told beside its sizes."""
    layer_type: str | None = None
    offset: float = 0.0
    """What their norms' weights are less than ours."""
    pictures: bool = False
    """Whether tokens stand at (t, y, x)."""


def rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": BASE, **more}


def partial(**more: Any) -> Rotary:
    return Rotary(D, base=BASE, partial_rotary_factor=0.5, **more)


HALF = rope(partial_rotary_factor=0.5)
FULL_SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}

LIKES: dict[str, Like] = {
    "Phi": Like(
        "phi", ("PhiConfig", "PhiAttention", "PhiRotaryEmbedding"), {"qk_layernorm": True}, HALF,
        lambda: {"position": partial(), "heads": QKNorm(D, norm="layer", bias=True, eps=1e-5)},
    ),
    "StableLM": Like(
        "stablelm", ("StableLmConfig", "StableLmAttention", "StableLmRotaryEmbedding"), {"qk_layernorm": True}, HALF,
        lambda: {"position": partial(), "heads": QKNorm(D, H, G, norm="layer", weights="per_head", eps=1e-5)},
    ),
    "GPT-NeoX": Like(
        "gpt_neox", ("GPTNeoXConfig", "GPTNeoXAttention", "GPTNeoXRotaryEmbedding"), {}, HALF,
        lambda: {"position": partial(), "num_kv_heads": H},
    ),
    "Persimmon": Like(
        "persimmon", ("PersimmonConfig", "PersimmonAttention", "PersimmonRotaryEmbedding"), {"qk_layernorm": True},
        HALF,
        lambda: {
            "position": partial(), "heads": QKNorm(D, norm="layer", bias=True, eps=1e-5),
            "num_kv_heads": H,
        },
    ),
    "GLM": Like(
        "glm", ("GlmConfig", "GlmAttention", "GlmRotaryEmbedding"), {"head_dim": D}, HALF,
        lambda: {"position": partial(interleaved=True)},
    ),
    "Cohere": Like(
        "cohere", ("CohereConfig", "CohereAttention", "CohereRotaryEmbedding"), {"use_qk_norm": True}, rope(),
        lambda: {
            "position": Rotary(D, base=BASE, interleaved=True),
            "heads": QKNorm(D, H, G, norm="layer", weights="per_head", eps=1e-5),
        },
    ),
    "Chameleon": Like(
        "chameleon", ("ChameleonConfig", "ChameleonAttention", "ChameleonRotaryEmbedding"), {"swin_norm": False},
        rope(),
        lambda: {
            "position": Rotary(D, base=BASE),
            "heads": QKNorm(D, H, G, norm="layer", weights="per_head", bias=True, eps=1e-5),
        },
    ),
    "OLMo 2": Like(
        "olmo2", ("Olmo2Config", "Olmo2Attention", "Olmo2RotaryEmbedding"), {"rms_norm_eps": 1e-5}, rope(),
        lambda: {"position": Rotary(D, base=BASE), "heads": QKNorm(D, H, G, weights="joint", eps=1e-5)},
    ),
    "OLMoE": Like(
        "olmoe", ("OlmoeConfig", "OlmoeAttention", "OlmoeRotaryEmbedding"), {"rms_norm_eps": 1e-5}, rope(),
        lambda: {"position": Rotary(D, base=BASE), "heads": QKNorm(D, H, G, weights="joint", eps=1e-5)},
    ),
    "Qwen3": Like(
        "qwen3", ("Qwen3Config", "Qwen3Attention", "Qwen3RotaryEmbedding"), {"head_dim": D, "rms_norm_eps": 1e-5},
        rope(),
        lambda: {"position": Rotary(D, base=BASE), "heads": QKNorm(D, eps=1e-5)},
    ),
    "Gemma 3": Like(
        "gemma3", ("Gemma3TextConfig", "Gemma3Attention", "Gemma3RotaryEmbedding"),
        {"head_dim": D, "query_pre_attn_scalar": 20, **FULL_SLIDING},
        {"full_attention": {**rope(), "rope_type": "linear", "factor": 8.0}, "sliding_attention": rope()},
        lambda: {"position": Rotary(D, base=BASE, scaling=Linear(8.0)), "heads": QKNorm(D), "scale": 20**-0.5},
        layer_type="full_attention", offset=1.0,
    ),
    "Gemma 3n": Like(
        "gemma3n", ("Gemma3nTextConfig", "Gemma3nTextAttention", "Gemma3nRotaryEmbedding"),
        {"head_dim": D, "num_kv_shared_layers": 0, **FULL_SLIDING},
        {"full_attention": rope(), "sliding_attention": rope()},
        lambda: {"position": Rotary(D, base=BASE), "heads": QKNorm(D, value_norm=True), "scale": 1.0},
        layer_type="full_attention",
    ),
    "Gemma 4": Like(
        "gemma4", ("Gemma4TextConfig", "Gemma4TextAttention", "Gemma4TextRotaryEmbedding"),
        {"head_dim": D, "global_head_dim": D, "num_kv_shared_layers": 0, "attention_k_eq_v": False, **FULL_SLIDING},
        {
            "full_attention": {**rope(partial_rotary_factor=0.5), "rope_type": "proportional"},
            "sliding_attention": rope(),
        },
        lambda: {
            "position": Rotary(D, base=BASE, scaling=Proportional(1.0, 0.5)),
            "heads": QKNorm(D, value_norm=True), "scale": 1.0,
        },
        layer_type="full_attention",
    ),
    "Qwen2-VL": Like(
        "qwen2_vl", ("Qwen2VLTextConfig", "Qwen2VLAttention", "Qwen2VLRotaryEmbedding"), {},
        rope(mrope_section=[1, 2, 1]),
        lambda: {"position": MRope(D, base=BASE, mrope_section=(1, 2, 1))}, pictures=True,
    ),
    "Qwen2.5-VL": Like(
        "qwen2_5_vl", ("Qwen2_5_VLTextConfig", "Qwen2_5_VLAttention", "Qwen2_5_VLRotaryEmbedding"), {},
        rope(mrope_section=[1, 1, 2]),
        lambda: {"position": MRope(D, base=BASE, mrope_section=(1, 1, 2))}, pictures=True,
    ),
    "Qwen3-VL": Like(
        "qwen3_vl", ("Qwen3VLTextConfig", "Qwen3VLTextAttention", "Qwen3VLTextRotaryEmbedding"),
        {"head_dim": D}, rope(mrope_section=[2, 1, 1]),
        lambda: {
            "position": MRope(D, base=BASE, mrope_section=(2, 1, 1), order="interleaved"), "heads": QKNorm(D),
        },
        pictures=True,
    ),
    "Ernie 4.5 VL": Like(
        "ernie4_5_vl_moe",
        ("Ernie4_5_VLMoeTextConfig", "Ernie4_5_VLMoeTextAttention", "Ernie4_5_VLMoeTextRotaryEmbedding"), {},
        rope(mrope_section=[1, 1, 2]),
        lambda: {
            "position": MRope(D, base=BASE, mrope_section=(2, 1, 1), order="alternating", interleaved=True),
        },
        pictures=True,
    ),
    "GLM-4V": Like(
        "glm4v", ("Glm4vTextConfig", "Glm4vTextAttention", "Glm4vTextRotaryEmbedding"), {},
        rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5),
        lambda: {
            "position": MRope(D, base=BASE, mrope_section=(1, 1, 0), interleaved=True, partial_rotary_factor=0.5),
        },
        pictures=True,
    ),
}  # fmt: skip


def places(like: Like) -> Tensor:
    """(B, T), each row from a place of its own; or (B, T, 3), with a picture of 2 x 3 between text."""
    text = torch.arange(T)[None] + torch.tensor([[0], [40]])
    if not like.pictures:
        return text
    at = text[..., None].expand(B, T, 3).clone()
    at[:, 3:9] = at[:, 3:4] + regard.positions.grid(1, 2, 3)
    at[:, 9:] = at[:, 3:9].amax((1, 2), keepdim=True) + 1 + torch.arange(2)[:, None]
    return at


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[regard.Attention, Callable[[Tensor], Tensor], Tensor]:
    """The layer here, transformers' as a function of the tokens, with the same weights, and the positions of both."""
    like = LIKES[name]
    module = importlib.import_module(f"transformers.models.{like.model}.modeling_{like.model}")
    sizes = {
        "hidden_size": M, "num_attention_heads": H, "num_key_value_heads": G, "num_hidden_layers": 2,
        "intermediate_size": 40, "vocab_size": 61, "pad_token_id": 0, "attn_implementation": "eager",
    }  # fmt: skip
    config_class, attention, rotary = (getattr(module, n) for n in like.names)
    config = config_class(**{**sizes, **like.config}, rope_parameters=like.rope)
    theirs, turn = attention(config, layer_idx=0).to(dtype).eval(), rotary(config)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.25, generator=generator)
    biased = any(name.endswith("bias") and "norm" not in name for name in theirs.state_dict())
    ours = regard.Attention(M, H, **{"num_kv_heads": G, **like.parts()}, causal=True, bias=biased, dtype=dtype)
    ours.load_state_dict(translated(theirs.state_dict(), ours, like.offset))
    at = places(like)

    def call(x: Tensor) -> Tensor:
        ids = at.movedim(-1, 0) if like.pictures else at
        told = {} if like.layer_type is None else {"layer_type": like.layer_type}
        embeddings = turn(x, ids, **told)
        more = {"shared_kv_states": {}} if "shared_kv_states" in inspect.signature(theirs.forward).parameters else {}
        hidden = torch.full((T, T), -torch.inf, dtype=dtype).triu(1)
        return theirs(x, position_embeddings=embeddings, attention_mask=hidden[None, None], **more)[0]

    return ours, call, at


def translated(state: dict[str, Tensor], ours: regard.Attention, offset: float) -> dict[str, Tensor]:
    """Their parameters under our names."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("query_key_value"):
            kind = name.split(".")[1]
            for key, part in zip("qkv", value.unflatten(0, (H, 3, D)).unbind(1), strict=True):
                found[f"{key}_proj.{kind}"] = part.flatten(0, 1)
        elif "norm" in name:
            which, kind = name[0], name.split(".")[-1]
            key = f"heads.{which}_{kind}"
            many = key in found and ".norms." in name  # a module for each head
            found[key] = torch.cat((found[key], value)) if many else value + offset * (kind == "weight")
        else:
            found[name.replace("dense", "o_proj")] = value
    wanted = ours.state_dict()
    for name in wanted.keys() - found.keys():  # a layer here has all four biases or none
        assert name.endswith("proj.bias"), name
        found[name] = torch.zeros_like(wanted[name])
    return {name: value.reshape(wanted[name].shape) for name, value in found.items()}

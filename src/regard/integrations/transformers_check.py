"""A swap checks itself on a few tokens before it is trusted: regard's exact attention against the model's eager one."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from regard.integrations.interface import Interception, Layer, layers, resolve
from regard.integrations.slots import About
from regard.integrations.transformers_call import compute, maps, read
from regard.integrations.transformers_masks import lazy_mask
from regard.integrations.transformers_samples import sample_batches
from regard.shapes import HeadShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the largest output. Eager attention rounds otherwise (in float64 too, where a model takes its softmax in float32),
and every layer passes that on."""


@dataclass(frozen=True)
class Checked:
    """What the check found out."""

    inputs: Mapping[str, Tensor]
    about: dict[str, About]
    """By layer name."""
    outputs: dict[str, Tensor]
    """The exact outputs, to compare a changed mechanism's with."""
    difference: float
    """Of regard's exact attention from eager, relative to the largest output."""


def self_check(model: "PreTrainedModel", inputs: Mapping[str, Tensor] | None) -> Checked:
    """Run the model on a few tokens, padded left and right and with a cache, under eager and under regard.

    Weights, caches, training modes and random generators stay as they are.

    Raises:
        ValueError: if the two disagree, or no inputs are known for a model of this kind.
    """
    about: dict[str, About] = {}
    with quiet(model):
        with under_eager(model):
            inputs, expected = _sampled(model) if inputs is None else (inputs, outputs(model, inputs))
        with Interception(model, _exact, mask=lazy_mask), _watched(model, about):
            got = outputs(model, inputs)
    worst = 0.0
    for name, reference in expected.items():
        tolerance = TOLERANCE.get(reference.dtype, 1e-4)
        off = difference(got[name], reference)
        worst = max(worst, off)
        if not off <= tolerance:
            raise ValueError(
                f"swap: regard's exact attention does not give what {type(model).__name__} gives with eager attention "
                f"({name} differs by {off:.2g} of its largest value, allowed {tolerance:.0e}); something in this "
                "model's attention is not known here. Nothing was changed"
            )
    return Checked(inputs, about, got, worst)


def about_layers(model: "PreTrainedModel") -> dict[str, About]:
    """The same of each layer as its attributes and config tell, without running the model."""
    return {layer.name: _told(layer, _rotates(model)) for layer in layers(model)}


def _told(layer: Layer, rotary: bool) -> About:
    module, config = layer.module, cast(Any, layer.module.config)
    H, dim = config.num_attention_heads, config.hidden_size
    held = (getattr(module, name, None) for name in ("head_dim", "attention_head_size", "key_value_proj_dim"))
    return About(
        shape=HeadShape(
            dim,
            H,
            getattr(config, "num_key_value_heads", None) or H,
            next((width for width in held if isinstance(width, int)), dim // H),
        ),
        causal=bool(getattr(module, "is_causal", True)),
        windowed=getattr(module, "sliding_window", None) is not None,
        cross=layer.kind == "cross",
        rotary=rotary,
        capped=getattr(module, "attn_logit_softcapping", None) is not None,
        sinks=getattr(module, "sinks", None) is not None,
    )


def _rotates(model: nn.Module) -> bool:
    return any("rotary" in name or "rope" in name for name, _ in model.named_modules())


def difference(got: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if not reference.numel():
        return 0.0
    got, reference = got.double(), reference.double()
    return float((got - reference).abs().max() / (reference.abs().max() + 1e-30))


def changed_outputs(model: "PreTrainedModel", checked: Checked) -> float:
    """How far the model's outputs are now from the exact ones, on the same inputs."""
    with quiet(model):
        got = outputs(model, checked.inputs, cached=False)
    return max((difference(t, checked.outputs[name]) for name, t in got.items()), default=0.0)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training modes and random generators are put back."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def under_eager(model: "PreTrainedModel") -> Interception:
    """The model with the eager attention of its own file."""
    return Interception(model, _eager, mask=_eager_mask)


def _eager(original: Any, module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Any]:
    return resolve(module, "eager")(module, *args, **options)


def _eager_mask(original: Any, **asked: Any) -> Any:
    from transformers.masking_utils import eager_mask

    # Many models take the softmax in float32, where float64's least number is -inf, and rows of it alone are NaN.
    return eager_mask(**{**asked, "dtype": torch.float32 if asked["dtype"] == torch.float64 else asked["dtype"]})


def _exact(
    original: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    call = read(module, query, key, value, attention_mask, **options)
    return compute(call.problem), maps(call.problem, "auto", key) if call.wants_weights else None


@contextmanager
def _watched(model: "PreTrainedModel", about: dict[str, About]) -> Iterator[None]:
    """Learn every attention layer's widths and kind from what its function is given and its module takes in."""
    rotary = _rotates(model)
    named = {layer.module: layer for layer in layers(model)}
    widths: dict[nn.Module, int] = {}

    def tokens(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = incoming(args, kwargs)
        widths[module] = 0 if x is None else x.shape[-1]

    def watch(original: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        layer = named.get(module)
        if layer is not None and q.shape[2] > 1 and layer.name not in about:
            call = read(module, q, k, v, mask, **options)
            heads = HeadShape(widths.get(module, 0) or q.shape[1] * q.shape[3], q.shape[1], k.shape[1], q.shape[3])
            about[layer.name] = About(
                shape=heads,
                causal=call.causal,
                windowed=call.windowed or options.get("sliding_window") is not None,
                cross=layer.kind == "cross",
                rotary=rotary,
                capped=call.problem.score_mix is not None,
                sinks=call.problem.normalizer is not None,
            )
        return original(module, q, k, v, mask, **options)

    hooks = [module.register_forward_pre_hook(tokens, with_kwargs=True) for module in named]
    try:
        with Interception(model, watch):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def incoming(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tokens (B, T, M) among a layer's arguments."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) and first.dim() == 3 else None


def _sampled(model: "PreTrainedModel") -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """Inputs that the model runs with, and what it gives."""
    failed: list[str] = []
    for inputs in sample_batches(model):
        try:
            return inputs, outputs(model, inputs)
        except Exception as error:  # models say in many ways that an input is missing
            said = str(error).partition("\n")[0]
            failed.append(f"{', '.join(inputs)}: {type(error).__name__}: {said}")
    raise ValueError(
        f"swap: no inputs are known for {type(model).__name__} to check the swap with ({'; '.join(failed)}); pass a "
        "small batch as check={'input_ids': ...}, or check=False"
    )


def outputs(model: "PreTrainedModel", inputs: Mapping[str, Tensor], *, cached: bool = True) -> dict[str, Tensor]:
    """What the model gives for these inputs, at real tokens alone; and again with the last two tokens after a cache."""
    given = {**inputs, "return_dict": True}
    out = model(**given)
    found = _real(out, inputs, "")
    keep = inputs.get("attention_mask")
    if keep is not None and not any(_by_token(t, keep) for t in out.values()):
        # A head that reads one row hides what padding does to the others.
        found |= _real(_last_states(model(**given, output_hidden_states=True)), inputs, "")
    ids = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    if not cached or not takes_cache or out.get("past_key_values") is None or ids not in inputs:
        return found
    # The last two tokens come one at a time, each with what the cache holds.
    T = inputs[ids].shape[1]
    past = None
    for end in (T - 2, T - 1, T):
        start = 0 if past is None else end - 1
        given[ids] = inputs[ids][:, start:end]
        if ids == "input_ids" and keep is not None:
            given["attention_mask"] = keep[:, :end]
        out = model(**given, past_key_values=past, use_cache=True)
        past = out["past_key_values"]
        real = {} if ids != "input_ids" or keep is None else {"attention_mask": keep[:, start:end]}
        found |= _real(out, real, f" after {start} cached tokens")
    return found


def _last_states(out: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of each stack of hidden states the last."""
    return {name: t[-1] for name, t in out.items() if name.endswith("hidden_states") and isinstance(t, tuple) and t}


def _by_token(t: Any, keep: Tensor) -> bool:
    """Whether it has a row for each token."""
    return isinstance(t, Tensor) and t.is_floating_point() and t.shape[:2] == keep.shape


def _real(out: Mapping[str, Any], inputs: Mapping[str, Tensor], when: str) -> dict[str, Tensor]:
    """The floating tensors among the outputs.

    Of those with a row for each token, the rows of real ones; of those with one for each sequence, the rows of
    sequences without padding, as what they are read from may be a padded token.
    """
    keep = inputs.get("attention_mask")
    found = {}
    for name, t in out.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            continue
        if keep is not None and _by_token(t, keep):
            t = t[keep.bool()]
        elif keep is not None and keep.dim() == 2 and t.dim() and t.shape[0] == len(keep):
            t = t[keep.bool().all(1)]
        found[name + when] = t
    return found

"""One call of an attention function of transformers, in regard's words, and how it is computed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard import normalizers, scores
from regard.integrations.transformers_masks import LazyMask
from regard.kernels import Problem, execute
from regard.kernels.check import check_bias, check_inputs, check_mask
from regard.masks import Mask, dense, packed, padding, predicate
from regard.masks.patterns import Diagonals


@dataclass(frozen=True, eq=False)
class Call:
    """What a model asks of one attention layer. Positions count as the model's do; the last query is the last key's."""

    problem: Problem
    """Queries, keys, values, mask and bias, with a soft-cap or sinks as stages: exactly the model's own attention."""
    keep: Bool[Tensor, "B S"] | None
    """The padding in the mask, where it is known by itself."""
    wants_weights: bool
    """Whether the model was asked for its attention weights."""

    @property
    def windowed(self) -> bool:
        """Whether the layer sees the last few tokens alone."""
        mask = self.problem.mask
        return self.problem.first_key > 0 or (mask is not None and mask.reach is not None)

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        _, _, _, T, S = self.problem.shape
        return (T == 1 and S > 1) if self.problem.mask is None else _never_ahead(self.problem)


def read(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S V"],
    attention_mask: Any,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Float[Tensor, "#B H T S"] | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " H"] | None = None,
    output_attentions: bool = False,
    **options: Any,
) -> Call:
    """The call as a problem. Options that change the result and are not known here raise ValueError."""
    for name in ("cache", "indices", "block_indices"):
        if options.get(name) is not None:
            raise ValueError(
                f"swap: {type(module).__name__} attends with {name}=, which regard's attention doesn't read"
            )
    query, key, value = same_dtype(query, key, value)
    if query.shape[:1] == (1,) != key.shape[:1] and query.dim() == 4:  # learned queries that serve every batch entry
        query = query.expand(key.shape[0], -1, -1, -1)
    check_inputs(query, key, value)
    mask, bias, first, keys, keep = _mask(module, query, key, attention_mask, is_causal)
    if options.get("cu_seq_lens_q") is not None:
        documents = _documents(module, query, keys, options["cu_seq_lens_q"], options.get("cu_seq_lens_k"))
        mask = documents if mask is None else mask & documents
    key, value = key[:, :, :keys], value[:, :, :keys]
    if position_bias is not None:
        position_bias = position_bias[..., :keys]
        bias = position_bias if bias is None else bias + position_bias
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if softcap is not None and bias is not None:
        raise ValueError(f"swap: {type(module).__name__} has both a soft-cap and a bias; their order is not known")
    B, H, T, D = query.shape
    problem = Problem(
        q=query,
        k=key,
        v=value,
        scale=D**-0.5 if scaling is None else float(scaling),
        mask=check_mask(mask, B, H, T, key.shape[2], query.device),
        bias=bias,
        score_mix=None if softcap is None else scores.SoftCap(cap=softcap),
        normalizer=None if sinks is None else normalizers.Sinks(sinks),
        dropout=dropout,
        first_key=first,
    )
    return Call(check_bias(problem), keep, bool(output_attentions))


def compute(problem: Problem, kernel: str = "auto") -> Float[Tensor, "B T H V"]:
    """The outputs as transformers wants them."""
    return execute(problem, kernel).transpose(1, 2).contiguous()


def weights(problem: Problem, kernel: str = "auto") -> Float[Tensor, "B H T S"] | None:
    """The attention weights before dropout: the outputs for one-hot values. None where outputs are not weights @ v."""
    if problem.position_values is not None:
        return None
    B, _, G, _, S = problem.shape
    one_hot = torch.eye(S, dtype=problem.v.dtype, device=problem.v.device).expand(B, G, S, S)
    return execute(replace(problem, v=one_hot, dropout=0.0), kernel)


def maps(problem: Problem, kernel: str, key: Float[Tensor, "B G S D"]) -> Float[Tensor, "B H T S"] | None:
    """`weights`, with a column for every key that the layer was given, of which a static cache has some to spare."""
    seen = weights(problem, kernel)
    return None if seen is None else torch.nn.functional.pad(seen, (0, key.shape[2] - seen.shape[3]))


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast rotation leaves queries and keys wider than values; a matrix product would narrow them."""
    if len({t.dtype for t in tensors}) == 1:
        return tensors
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return tuple(t.to(dtype) for t in tensors)


def _mask(
    module: nn.Module, q: Tensor, k: Tensor, given: Any, is_causal: bool | None
) -> tuple[Mask | None, Tensor | None, int, int, Tensor | None]:
    """The mask, what else it adds to scores, the first key's position, how many keys count, and the padding."""
    T, S = q.shape[2], k.shape[2]
    if isinstance(given, LazyMask) and (known := given.structure) is not None and known.keys <= S:
        return known.mask, None, known.first_key, known.keys, known.keep
    if given is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # transformers aligns this top-left: the first query sees the first key.
        return Diagonals(math.inf, T - S, 1, "causal()") if causal and T > 1 else None, None, 0, S, None
    given = given.formed() if isinstance(given, LazyMask) else given
    if not isinstance(given, Tensor):  # FlexAttention's BlockMask, whose queries count from 0
        mod: Callable[..., Tensor] = given.mask_mod
        batch, heads = given.shape[:2]
        rule = predicate(lambda b, h, i, j: mod(b, h, i - (S - T), j), batch=batch, heads=heads)
        return rule, None, 0, S, None
    if given.dim() == 2:
        return padding(given.bool()), None, 0, S, given.bool()
    given = given[..., :S]
    if given.dtype == torch.bool:
        return dense(given.expand(-1, -1, T, -1)), None, 0, S, None
    # Numbers to add; the least of a dtype, or of a narrower one that the mask was made in, hides.
    hidden = given <= torch.finfo(torch.float16).min
    if not bool(hidden.any()):
        return None, given, 0, S, None
    rest = given.masked_fill(hidden, 0.0)
    return dense((~hidden).expand(-1, -1, T, -1)), rest if bool(rest.any()) else None, 0, S, None


def _documents(module: nn.Module, q: Tensor, keys: int, ends: Tensor, key_ends: Tensor | None) -> Mask:
    """The sequences that lie end to end, as the flash kernels of transformers are told of them."""
    if q.shape[2] != keys or (key_ends is not None and not torch.equal(ends, key_ends)):
        raise ValueError(
            f"swap: {type(module).__name__} is given cu_seq_lens_q and other keys than queries (got {q.shape[2]} "
            f"queries, {keys} keys); expected packed sequences that attend to themselves, without a cache"
        )
    return packed(ends)


def _never_ahead(p: Problem) -> bool:
    """Whether the mask allows no later key; a tensor is looked through."""
    assert p.mask is not None
    if p.mask.is_causal:
        return True
    _, _, _, T, S = p.shape
    if T * S > 2**20:
        return False
    return not bool((p.mask.at(p.i, p.j) & (p.j > p.i[:, None])).any())

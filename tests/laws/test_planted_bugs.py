"""L47: the laws are tested too. Bugs that libraries have shipped are planted; each must be caught."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from laws.test_kernel_formula import test_kernel_is_the_formula as kernel_is_the_formula
from regard.kernels import block_sparse, chunked, eager, online, plan, problem, sdpa, window
from regard.laws import (
    Broken,
    DoesNotApply,
    gradients,
    masking,
    modules,
    numerics,
    of,
    packing,
    reference,
    streaming,
    structure,
    symmetry,
)
from regard.linear import _shared as linear_shared
from regard.masks import patterns, tensors
from regard.pipeline import head_mixer
from regard.pipeline.kv_cache import KVCache

# By name: some packages export functions of the same names as their modules.
linear_scan = importlib.import_module("regard.kernels.linear_scan")
mega = importlib.import_module("regard.mixers.mega")
performer = importlib.import_module("regard.linear.performer")
moba = importlib.import_module("regard.routing.moba")
point_transformer = importlib.import_module("regard.graph.point_transformer")
davit = importlib.import_module("regard.vision.davit")

Patch = pytest.MonkeyPatch
Laws = list[tuple[Any, ...]]
BUGS: dict[str, tuple[Callable[[Patch], None], Laws]] = {}


def bug(*laws: tuple[Any, ...]) -> Callable[[Callable[[Patch], None]], None]:
    """A way to break the library, and the laws (function, card) of which one at least must notice."""

    def add(plant: Callable[[Patch], None]) -> None:
        BUGS[plant.__name__] = (plant, list(laws))

    return add


def look(check: Callable[..., None], *arguments: str) -> None:
    """Run a law on a card, or the formula on what it is given."""
    check(*arguments if check is kernel_is_the_formula else map(of, arguments))


def everywhere(patch: Patch, name: str, changed: Callable[..., Any]) -> None:
    """Replace a function of `regard.kernels` in every kernel that imported it."""
    for module in (problem, eager, chunked, online, block_sparse, sdpa, plan):
        if hasattr(module, name):
            patch.setattr(module, name, changed)


def fused(patch: Patch, change: Callable[..., dict[str, Any]]) -> None:
    """Change the arguments of torch's fused kernel."""
    real = torch.nn.functional.scaled_dot_product_attention

    def changed(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> Tensor:
        given = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), options)), **named}
        return real(**{"query": q, "key": k, "value": v, **given, **change(q, k, v, **given)})

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", changed)


# --- scale, heads, axes -------------------------------------------------------------------------------------


@bug((kernel_is_the_formula, "eager", "none"))
def scale_2_percent_too_large(patch):
    real = problem.dots
    everywhere(patch, "dots", lambda q, k: 1.02 * real(q, k))


@bug((kernel_is_the_formula, "sdpa", "none"))
def fused_scale_half_a_percent_too_large(patch):
    fused(patch, lambda q, k, v, *, scale, **rest: {"scale": 1.005 * scale})


@bug((reference.kernels_agree, "alibi"))
def bias_is_scaled_too(patch):
    real = sdpa._term
    patch.setattr(sdpa, "_term", lambda p, rows, keys: p.scale * real(p, rows, keys))


@bug((symmetry.grouped_keys_are_repeated, "cope"), (kernel_is_the_formula, "eager", "none"))
def grouped_keys_are_tiled(patch):
    def tiled(k, H):
        return k.repeat(1, H // k.shape[1], 1, 1)

    everywhere(patch, "dots", lambda q, k: q @ tiled(k, q.shape[1]).mT)
    everywhere(patch, "combine", lambda weights, v: weights @ tiled(v, weights.shape[1]))


@bug((reference.kernels_agree, "gqa"))
def group_gradients_are_averaged(patch):
    real = online._per_key
    patch.setattr(online, "_per_key", lambda w, z, G: real(w, z, G) * G / w.shape[1])


@bug((kernel_is_the_formula, "eager", "none"), (symmetry.heads_do_not_meet, "cope"))
def softmax_over_queries(patch):
    patch.setattr(problem, "softmax", lambda scores, allowed: scores.softmax(-2))


@bug((symmetry.heads_do_not_meet, "window"))
def heads_share_their_first_query(patch):
    fused(patch, lambda q, k, v, **rest: {"query": q[:, :1].expand_as(q)})


# --- what may see what --------------------------------------------------------------------------------------


@bug((structure.future_changes_nothing, "alibi"))
def one_future_key_leaks(patch):
    patch.setattr(regard.Attention, "receptive_field", lambda self: patterns.Diagonals(math.inf, 1, 1, "causal()"))


@bug((structure.receptive_field, "alibi"), (structure.receptive_field, "cope"))
def last_query_misses_first_key(patch):
    real = problem.rectangle

    def changed(p, rows, keys, **options):
        part = real(p, rows, keys, **options)
        if part.allowed is not None:
            allowed = part.allowed.clone()
            allowed[..., -1, 0] = False
            part = replace(part, allowed=allowed)
        return part

    everywhere(patch, "rectangle", changed)


@bug((structure.receptive_field, "window"), (streaming.token_by_token, "window"))
def window_one_too_wide(patch):
    real = patterns.Diagonals.__call__
    patch.setattr(patterns.Diagonals, "__call__", lambda m, b, h, i, j: real(replace(m, back=m.back + 1), b, h, i, j))


@bug((structure.receptive_field, "softmax"))
def one_key_dropped_without_mask(patch):
    def change(q, k, v, *, attn_mask, is_causal, **rest):
        return {} if is_causal or attn_mask is not None else {"key": k[:, :, 1:], "value": v[:, :, 1:]}

    fused(patch, change)


@bug(
    (structure.alignment_of_unequal_lengths, "cope"),
    (structure.one_query_is_the_last, "cope"),
)
def causality_aligned_top_left(patch):
    start = property(lambda p: torch.arange(p.first_key, p.first_key + p.q.shape[2]))
    patch.setattr(problem.Problem, "i", start)


@bug((reference.kernels_agree, "softmax"))
def partial_blocks_taken_for_full(patch):
    real = block_sparse.run

    def changed(p, layout=None):
        layout = p.mask.layout(*p.shape[3:], block=block_sparse.BLOCK) if layout is None else layout
        return real(p, replace(layout, full=torch.ones_like(layout.full)))

    patch.setattr(block_sparse, "run", changed)


@bug((structure.batch_rows_do_not_meet, "softmax"))
def batch_rows_meet(patch):
    fused(patch, lambda q, k, v, **rest: {"key": k.mean(0, keepdim=True).expand_as(k)})


# --- padding, empty rows, NaN -------------------------------------------------------------------------------


@bug((masking.padding_changes_nothing, "alibi"))
def padding_unmasked_in_last_row(patch):
    real = tensors.Kept.__call__
    patch.setattr(tensors.Kept, "__call__", lambda m, b, h, i, j: real(m, b, h, i, j) | ((i == i.max()) & (j >= 0)))


@bug((masking.padding_changes_nothing, "entmax"))
def padding_of_the_first_row_for_all(patch):
    real = tensors.Kept.__call__
    patch.setattr(tensors.Kept, "__call__", lambda m, b, h, i, j: real(m, 0 * b, h, i, j))


@bug((masking.padding_changes_nothing, "learned"))
def positions_count_left_pads(patch):
    Attention = regard.Attention
    patch.setattr(Attention, "_positions", lambda self, positions, B, T, device: torch.arange(T, device=device))


@bug(
    (kernel_is_the_formula, "chunked", "dense"),
    (kernel_is_the_formula, "chunked", "window"),
)
def infinity_minus_infinity_in_the_running_softmax(patch):
    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def where(condition, a, b):
            return b if isinstance(a, float) and a == 0.0 else torch.where(condition, a, b)

    patch.setattr(online, "torch", Torch())


@bug((masking.rows_that_see_nothing, "cope"), (masking.masks_as_biases, "cope"))
def empty_rows_average_their_values(patch):
    def softmax(scores, allowed):
        return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)

    patch.setattr(problem, "softmax", softmax)


@bug((masking.nan_reaches_what_sees_it_on_every_kernel, "softmax"))
def nan_becomes_zero(patch):
    patch.setattr(plan, "honest", lambda p, run: run(p).nan_to_num())


@bug((masking.nan_reaches_what_sees_it_on_every_kernel, "cope"))
def nan_leaks_through_masks(patch):
    patch.setattr(plan, "honest", lambda p, run: run(p))


# --- states, randomness, gradients, dtypes ------------------------------------------------------------------


@bug((streaming.a_state_is_a_value, "alibi"))
def a_second_append_overwrites_the_first(patch):
    real = KVCache.append

    def changed(self, **new):
        self.written[0] = self.length
        return real(self, **new)

    patch.setattr(KVCache, "append", changed)


@bug((streaming.token_by_token, "window"))
def window_cache_one_too_short(patch):
    real = regard.Attention.init_state
    patch.setattr(
        regard.Attention, "init_state", lambda m, *a, **o: replace(c := real(m, *a, **o), window=c.window - 1)
    )


@bug((streaming.token_by_token, "rotary"), (streaming.token_by_token, "learned"))
def each_step_starts_at_position_zero(patch):
    real = regard.Attention._project

    def changed(self, x, source, where, where_keys, cross):
        return real(self, x, source, where - where[:1], where_keys - where_keys[:1], cross)

    patch.setattr(regard.Attention, "_project", changed)


@bug((streaming.cache_algebra, "alibi"))
def crop_forgets_nothing(patch):
    patch.setattr(KVCache, "crop", lambda self, length: self)


@bug((modules.dropout_is_for_training, "softmax"))
def dropout_in_eval(patch):
    real = regard.Attention._problem
    patch.setattr(
        regard.Attention, "_problem", lambda self, *a, **o: replace(real(self, *a, **o), dropout=self.dropout)
    )


@bug((modules.no_randomness_unasked, "softmax"))
def generator_advances(patch):
    real = regard.Attention._finish
    patch.setattr(regard.Attention, "_finish", lambda self, out, x: real(self, out, x) + 0 * float(torch.rand(())))


@bug((gradients.every_parameter_has_a_gradient, "cope"))
def values_get_no_gradient(patch):
    real = problem.combine
    everywhere(patch, "combine", lambda weights, v: real(weights, v.detach()))


@bug((gradients.second_derivatives, "memory_efficient"))
def second_derivatives_are_silently_zero(patch):
    real = online._with_graph
    patch.setattr(online, "_with_graph", lambda *a: [None if g is None else g.detach() for g in real(*a)])


@bug((numerics.bfloat16_precision, "cope"), (numerics.large_logits, "cope"))
def exponentials_without_a_maximum(patch):
    def softmax(scores, allowed):
        weights = scores.exp() if allowed is None else scores.exp().masked_fill(~allowed, 0)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)

    patch.setattr(problem, "softmax", softmax)


@bug((numerics.float64_is_float64, "cope"))
def softmax_in_float32(patch):
    real = problem.softmax
    patch.setattr(problem, "softmax", lambda scores, allowed: real(scores.float(), allowed).to(scores.dtype))


@bug((numerics.float64_is_float64, "memory_efficient"))
def backward_in_float32(patch):
    real = online._per_key
    patch.setattr(online, "_per_key", lambda w, z, G: real(w, z, G).float().to(z.dtype))


@bug((modules.purity, "softmax"))
def inputs_are_overwritten(patch):
    real = regard.Attention._project

    def changed(self, x, *rest):
        x.detach().mul_(1.0)
        return real(self, x, *rest)

    patch.setattr(regard.Attention, "_project", changed)


# --- beyond the pipeline ------------------------------------------------------------------------------------


@bug((streaming.token_by_token, "linear"))
def the_past_is_forgotten_between_chunks(patch):
    real = linear_shared.linear_scan
    patch.setattr(linear_shared, "linear_scan", lambda *a, state, **options: real(*a, state=None, **options))


@bug((packing.packed_is_one_by_one, "linear"))
def the_state_goes_on_into_the_next_document(patch):
    patch.setattr(linear_scan, "forgetting", lambda g, starts: g)


@bug((packing.packed_is_one_by_one, "learned"))
def positions_go_on_into_the_next_document(patch):
    patch.setattr(tensors.Packed, "positions_of", lambda self, T: torch.arange(T))


@bug((packing.documents_do_not_meet, "mega"))
def documents_are_one_row(patch):
    patch.setattr(mega, "apart", lambda layer, x, packed, keep: layer(x))


@bug((packing.packed_is_one_by_one, "mta"))
def convolutions_reach_over_borders(patch):
    patch.setattr(regard.Attention, "_crosses_borders", lambda self: False)


@bug((structure.future_changes_nothing, "linear"))
def recurrence_sees_the_future(patch):
    def both_ways(q, k, v, decay=None, *, state=None, starts=None):
        whole = k.mT @ v
        return linear_scan.Scan(q @ whole, whole)

    patch.setattr(linear_shared, "linear_scan", both_ways)


@bug((structure.prefixes, "performer"))
def stabiliser_looks_ahead(patch):
    real = performer.softmax_features

    def changed(x, z, top, eps):
        return real(x, z, z.amax((-2, -1), keepdim=True), 1e-2)

    patch.setattr(performer, "softmax_features", changed)


@bug((masking.padding_changes_nothing, "linear"))
def padding_is_read(patch):
    patch.setattr(head_mixer, "key_mask", lambda who, mask, x: (None, None))


@bug((masking.nan_tokens, "linear"))
def nan_is_hidden(patch):
    patch.setattr(head_mixer, "spoil", lambda out, *rest: out)


@bug((streaming.token_by_token, "moba"))
def chosen_blocks_are_the_neighbours(patch):
    real = moba.Chosen
    patch.setattr(moba, "Chosen", lambda tiles, *rest: real(tiles.roll(1, 2), *rest))


@bug((kernel_is_the_formula, "window", "window"))
def window_keys_one_off(patch):
    real = window._blocks
    patch.setattr(window, "_blocks", lambda z, first, *rest: real(z, first + 1, *rest))


@bug((kernel_is_the_formula, "block_sparse", "dense"))
def mask_inside_blocks_is_lost(patch):
    real = block_sparse._allowed
    patch.setattr(block_sparse, "_allowed", lambda *a: torch.ones_like(real(*a)))


@bug((structure.order_of_nodes_and_edges_is_free, "point_transformer"))
def last_edge_wins(patch):
    """A scatter that overwrites where it should add."""

    def overwritten(values, target, num_nodes):
        return values.new_zeros(num_nodes, *values.shape[1:]).index_copy(0, target, values)

    patch.setattr(point_transformer, "edge_sum", overwritten)


@bug((structure.batch_rows_do_not_meet, "davit_channel"))
def channels_of_the_whole_batch(patch):
    real = davit.channel_attention
    patch.setattr(davit, "channel_attention", lambda q, k, v, **rest: real(q, k.roll(1, 0), v, **rest))


@pytest.mark.parametrize("name", list(BUGS))
def test_planted_bug_is_caught(name: str, monkeypatch: Patch) -> None:
    plant, laws = BUGS[name]
    plant(monkeypatch)
    caught = []
    for check, *arguments in laws:
        try:
            look(check, *arguments)
        except DoesNotApply:
            raise
        except Broken as error:  # no crash, which may be the plant's own
            caught.append(f"{check.__name__}: {error}")
    assert caught, f"no law noticed: {name}"


@pytest.mark.parametrize("name", list(BUGS))
def test_those_laws_hold_without_the_bug(name: str) -> None:
    for check, *arguments in BUGS[name][1]:
        look(check, *arguments)

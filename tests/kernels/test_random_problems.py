"""Every kernel that calls itself able of a problem gives what its naive form gives: values and all gradients.

Problems are drawn at random (`problems`), and each seed is a test. One problem again:

    make test ARGS="tests/kernels/test_random_problems.py -k 'test_problem[17]'"
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from kernels.agreement_of_kernels import SLOW, able, failures, simpler_than, smallest
from kernels.problems import ALONE, DTYPES, JOINED, LAYOUTS, NUMBERED, RELAID, STAGES, TENSORS, Description, build, draw
from regard.kernels import KERNELS, eager, native, online, problem, sdpa
from regard.kernels.native import build as native_build
from regard.masks import patterns, tensors

FIXED = range(192)
"""The seeds of `make test`."""
MORE = [range(start, start + 100) for start in range(1000, 3500, 100)]
"""Those of the slow test."""

FOUND = {
    "masks of numbers by head, chunked": Description(0, H=2, T=5, S=5, mask=("per_head", ("window", 2), ("window", 3))),
    "blocks chosen or else": Description(
        14, B=3, H=2, T=2, D=4, V=1, mask=("or", ("causal",), ("chosen", True, True, 16, 16, 691))
    ),
    "blocks chosen by some heads": Description(
        1, H=2, T=21, S=21, D=4, mask=("per_head", ("chosen", False, False, 16, 16, 3), ("causal",))
    ),
    "a rule for each batch row": Description(40, B=3, T=5, S=5, D=4, mask=("predicate", 3, True, False)),
    "a rule for each head": Description(40, H=3, T=5, S=5, D=4, mask=("predicate", 3, False, True)),
    "neighbouring keys of blocks that are none": Description(
        45, T=9, S=9, D=4, mask=("dilated", 2, 4), score_mix="key_conv", cut=4
    ),
    "a mix where no key can be seen": Description(
        45, T=33, S=5, D=4, mask=("window", 2), score_mix="key_conv", weight_mix="key_conv", cut=4
    ),
    "tokens that share numbers in memory": Description(
        1088, T=2, D=12, V=12, layouts=("overlapping", "plain", "plain", "plain")
    ),
}
"""What random problems found, made small."""


def report(d: Description, wrong: dict[str, str]) -> str:
    """What failed, on what, and the smallest problem on which it still does."""
    lines = [f"seed {d.seed}: {d!r}"]
    for kernel, error in wrong.items():
        small = smallest(d, kernel)
        lines += [f"{kernel}: {error}", f"  smallest: {small!r}: {failures(small, (kernel,)).get(kernel)}"]
    again = f"tests/kernels/test_random_problems.py -k 'test_problem[{d.seed}]'"
    return "\n".join([*lines, f'again: make test ARGS="{again}"'])


@pytest.mark.parametrize("seed", FIXED)
def test_problem(seed: int) -> None:
    d = draw(seed)
    if wrong := failures(d):
        pytest.fail(report(d, wrong), pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", MORE, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_problems(seeds: range) -> None:
    reports = [report(d, wrong) for d in map(draw, seeds) if (wrong := failures(d))]
    if reports:
        pytest.fail("\n\n".join(reports), pytrace=False)


@pytest.mark.parametrize("name", FOUND)
def test_found_before(name: str) -> None:
    assert not failures(FOUND[name])


# --- that it is no empty promise ----------------------------------------------------------------------------------


def test_everything_occurs() -> None:
    """Over the fixed seeds every kernel, dtype, layout, part of a mask, filler of a slot and kind of size."""
    kernels: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    occurs: Counter[str] = Counter()
    for d in map(draw, FIXED):
        for kernel, grads in able(d, [build(d)]):
            kernels[kernel] += 1
            trained[kernel] += grads
        occurs.update({d.dtype, *d.layouts, *d.parts, *(f"{slot} {name}" for slot, name in d.stages.items())})
        occurs.update(f"bias {axis}" for axis in d.bias)
        occurs.update([f"bias lies {d.bias_layout}"] if d.bias else [])
        occurs.update([f"mask lies {d.mask_layout}"] if d.parts & {*TENSORS} else [])
        occurs.update(f"no {name}" for name in "BTS" if getattr(d, name) == 0)
        kinds = {
            "one query": d.T == 1 < d.S,
            "more queries": d.T > d.S > 0,
            "fewer queries": 0 < d.T < d.S,
            "grouped heads": 1 < d.G < d.H,
            "values of another width": d.V != d.D,
            "keys dropped": d.first_key > 0,
            "a scale": d.scale is not None,
            "numbers only, by head": "per_head" in d.parts and not d.parts & {*TENSORS, *ALONE},
        }
        occurs.update(kind for kind, holds in kinds.items() if holds)
    wanted = {*DTYPES, *LAYOUTS, *NUMBERED, *TENSORS, *JOINED, *ALONE, *kinds, "no B", "no T", "no S"}
    wanted |= {f"{slot} {name}" for slot, names in STAGES.items() for name in names}
    wanted |= {f"bias {axis}" for axis in "BHTS1-"}
    wanted |= {f"bias lies {layout}" for layout in LAYOUTS} | {f"mask lies {layout}" for layout in RELAID}
    assert not wanted - occurs.keys(), "never drawn"
    fewer = {**dict.fromkeys(SLOW, 2), "grouped": 4, "listed": 4, "neighborhood": 4}
    runs = {name: fewer.get(name, 12) for name in KERNELS if name != "paged"}  # which is asked by caches alone
    if native.build.why_not():
        runs = {name: count for name, count in runs.items() if name not in ("few", "native", "grouped")}
    assert all(kernels[name] >= count for name, count in runs.items()), kernels
    # On the CPU torch has no gradients for FlexAttention, and few queries are not for training.
    assert all(trained[name] >= count for name, count in runs.items() if name not in ("flex", "few")), trained


def test_a_description_is_its_problem() -> None:
    for seed in (3, 14, 15, 92):
        d = draw(seed)
        assert eval(repr(d), {"Description": Description}) == d
        one, other = build(d), build(d)
        assert all(torch.equal(a, b) for a, b in zip(one.wanted.values(), other.wanted.values(), strict=True))


# --- that it notices ----------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch
BUGS: dict[str, tuple[Callable[[Patch], None], str]] = {}


def bug(kernel: str) -> Callable[[Callable[[Patch], None]], None]:
    """A way to break that kernel."""

    def add(plant: Callable[[Patch], None]) -> None:
        BUGS[plant.__name__] = (plant, kernel)

    return add


def everywhere(patch: Patch, name: str, changed: Callable[..., object]) -> None:
    """Replace a function of `regard.kernels.problem` in all kernels that imported it."""
    for module in (problem, eager, online, sdpa):
        if hasattr(module, name):
            patch.setattr(module, name, changed)


@bug("eager")
def groups_are_tiled(patch: Patch) -> None:
    def tiled(z: torch.Tensor, H: int) -> torch.Tensor:
        return z.repeat(1, H // z.shape[1], 1, 1)

    everywhere(patch, "dots", lambda q, k: q @ tiled(k, q.shape[1]).mT)
    everywhere(patch, "combine", lambda weights, v: weights @ tiled(v, weights.shape[1]).to(weights.dtype))


@bug("sdpa")
def a_window_is_one_off(patch: Patch) -> None:
    real = patterns.Diagonals.__call__

    def changed(m: patterns.Diagonals, b: object, h: object, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return real(m, b, h, i - (m.back not in (0, torch.inf)), j)  # type: ignore[arg-type]

    patch.setattr(patterns.Diagonals, "__call__", changed)


@bug("chunked")
def a_bias_is_that_of_the_first_batch_row(patch: Patch) -> None:
    real = online._slice
    patch.setattr(online, "_slice", lambda bias, at, part: real(bias[:1].expand_as(bias), at, part))


@bug("eager")
def values_have_no_gradient(patch: Patch) -> None:
    real = problem.combine
    everywhere(patch, "combine", lambda weights, v: real(weights, v.detach()))


@bug("chunked")
def masks_by_head_are_head_0s(patch: Patch) -> None:
    real = tensors.PerHead.__call__
    patch.setattr(tensors.PerHead, "__call__", lambda m, b, h, i, j: real(m, b, 0 * h, i, j))


@bug("chunked")
def a_learned_bias_is_not_summed(patch: Patch) -> None:
    def last(total: torch.Tensor, ds: torch.Tensor, at: slice, part: slice) -> None:
        target = online._slice(total, at, part)
        target.copy_(ds.sum_to_size(target.shape))

    patch.setattr(online, "_add_bias_grad", last)


@bug("native")
def strides_are_forgotten(patch: Patch) -> None:
    real = native._vectors
    patch.setattr(
        native, "_vectors", lambda x, lanes: real(x.mT.contiguous().view(x.shape) if x.stride(3) != 1 else x, lanes)
    )


@bug("native")
def a_bias_is_read_as_if_its_keys_lay_side_by_side(patch: Patch) -> None:
    real = native.call

    def changed(
        name: str, scale: float, walk: object, table: object, bias: torch.Tensor | None, **rest: object
    ) -> None:
        if bias is not None and bias.shape[3] > 1 and bias.stride(3) > 1:
            bias = bias.as_strided(bias.shape, (*bias.stride()[:3], 1))
        real(name, scale, walk, table, bias, **rest)  # type: ignore[arg-type]

    patch.setattr(native, "call", changed)


@bug("sdpa")
def an_explicit_scale_is_ignored(patch: Patch) -> None:
    real = sdpa._torch

    def changed(p: problem.Problem, q: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        return real(problem.replace(p, scale=q.shape[3] ** -0.5), q, *rest, **options)  # type: ignore[arg-type]

    patch.setattr(sdpa, "_torch", changed)


@pytest.mark.parametrize("name", list(BUGS))
def test_a_planted_bug_is_found(name: str, monkeypatch: Patch) -> None:
    plant, kernel = BUGS[name]
    if KERNELS[kernel] is native and native_build.why_not():
        pytest.skip("; ".join(native_build.why_not()))
    plant(monkeypatch)
    assert any(failures(draw(seed), (kernel,)) for seed in FIXED), f"no problem noticed: {name}"


def test_what_fails_is_made_small(monkeypatch: Patch) -> None:
    BUGS["values_have_no_gradient"][0](monkeypatch)
    d = next(d for d in map(draw, FIXED) if d.mask and d.stages and failures(d, ("eager",)))
    small = smallest(d, "eager")
    assert failures(small, ("eager",))
    assert not small.mask
    assert not small.stages
    assert small.B == small.H == small.T == small.S == 1
    assert f"'test_problem[{d.seed}]'" in report(d, {"eager": "wrong"})
    assert small not in simpler_than(small)

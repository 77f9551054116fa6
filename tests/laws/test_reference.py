"""L1, L2, L39: every kernel gives what the formula gives, in every dtype, and runs when named."""

import math

import pytest
import torch
from torch import Tensor

import regard
from laws.subject import (
    ALL,
    B,
    T,
    build,
    causalities,
    close,
    close_all,
    form,
    inputs,
    law,
    no_worse_than_naive,
    run,
    says,
    small_tiles,
    tokens,
)
from regard import masks
from regard.kernels import KERNELS
from regard.pipeline.function import problem

LONG = 37  # three query chunks of 16, the last one ragged


def formula(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, entry by entry."""
    (n, H, Q, D), (_, G, S, _) = q.shape, k.shape
    out = q.new_zeros(n, H, Q, v.shape[3])
    for b in range(n):
        for h in range(H):
            g = h // (H // G)
            for t in range(Q):
                seen = [s for s in range(S) if allowed is None or allowed[b % len(allowed), h % allowed.shape[1], t, s]]
                logits = [
                    sum(float(q[b, h, t, d]) * float(k[b, g, s, d]) for d in range(D)) / math.sqrt(D)
                    + (0.0 if bias is None else float(bias.expand(n, H, Q, S)[b, h, t, s]))
                    for s in seen
                ]
                top = max(logits, default=0.0)
                total = sum(math.exp(z - top) for z in logits)
                for s, z in zip(seen, logits, strict=True):
                    out[b, h, t] += math.exp(z - top) / total * v[b, g, s]
    return out


def cases() -> dict[str, masks.Mask | None]:
    generator = torch.Generator().manual_seed(0)
    ragged = torch.rand(2, 4, 6, 9, generator=generator) < 0.5
    ragged[0, 1, 2] = False  # a query that may see nothing
    return {
        "none": None,
        "causal": masks.causal(),
        "window": masks.causal() & masks.window(3),
        "padding": masks.padding(lengths=torch.tensor([9, 4])),
        "dense": masks.dense(ragged),
    }


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("case", [*cases()])
def test_kernel_is_the_formula(kernel: str, case: str) -> None:
    """The second oracle: Python floats, written without the pipeline. T != S, grouped keys, V != D."""
    mask = cases()[case]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, h, n, w, generator=generator, dtype=torch.float64)
        for h, n, w in ((4, 6, 3), (2, 9, 3), (2, 9, 5))
    )
    bias = torch.randn(1, 4, 1, 9, generator=generator, dtype=torch.float64)
    allowed = None if mask is None else mask.dense(6, 9)
    ran = []
    with small_tiles():
        for given in (None, bias):
            try:
                got = regard.attention(q, k, v, mask=mask, bias=given, kernel=kernel)
            except ValueError as error:
                reason = "only plain softmax" if case == "window" else "how far a query sees"
                words = {
                    "block_sparse": "no mask",
                    "window": reason,
                    "neighborhood": "neighborhood",
                    "decode": "not one",
                }
                words |= {"native": "float64", "grouped": "every query chose", "triton": "float64", "flex": "float64"}
                says(error, f"kernel {kernel!r} can't run this", words[kernel])
                continue
            close(got, formula(q, k, v, allowed, given))
            ran.append((case, given is not None))
    never = dict.fromkeys(("neighborhood", "decode", "native", "grouped", "triton"), False)
    able = (never | {"block_sparse": case != "none", "window": case == "window"}).get(kernel, True)
    assert len(ran) == able * (1 if kernel == "window" else 2)


def long_mask(name: str) -> masks.Mask:
    mask = masks.window(11) | masks.global_tokens(2)
    return mask & masks.padding(lengths=torch.tensor([LONG, 20]))


@law("L1", pipeline=True)
def test_kernels_agree(name: str) -> None:
    """Every kernel that can run the layer gives the reference's output and all its gradients."""
    for causal in causalities(name):
        module, x = build(name, causal=causal), tokens(B, LONG)
        options = {"mask": long_mask(name)} if "mask" in module.supports else {}
        module.kernel, ran = "eager", []
        want = run(module, x, **options)
        for kernel in (*KERNELS, "auto"):
            module.kernel = kernel
            with small_tiles():
                try:
                    got = run(module, x, **options)
                except ValueError as error:
                    says(error, "can't run this")
                    continue
            close_all(got, want)
            ran.append(kernel)
        assert {"eager", "chunked", "auto"} <= set(ran)


@law("L2", where=lambda card: "routed" not in card.traits)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Forward and backward are no worse than a plain computation in that dtype.

    Not for what content routes: in half precision it may choose other keys, which is another output altogether.
    """
    no_worse_than_naive(name, dtype, [(tokens(dtype=dtype, seed=100 + n),) for n in range(4)])


@law("L2", protocols=ALL)
def test_single_precision(name: str) -> None:
    no_worse_than_naive(name, torch.float32, [inputs(name, torch.float32)])


@law("L39", function=True)
def test_named_kernels_run_or_refuse(name: str) -> None:
    """`plan` names the kernel that runs, and why not the others; a refused kernel raises with the reason."""
    f = form(name)
    q, k, v = f.qkv()
    for causal in causalities(name):
        arguments = f.arguments(causal, kernel="auto")
        plan = regard.plan(q, k, v, **arguments)
        assert {plan.kernel, *plan.why_not} == set(KERNELS)
        assert all(reasons for reasons in plan.why_not.values())
        assert plan.kernel in str(plan)
        p = problem(q, k, v, **{n: value for n, value in arguments.items() if n != "kernel"})
        for kernel, module in KERNELS.items():
            launched = []
            with pytest.MonkeyPatch.context() as patch:
                real = module.run
                patch.setattr(module, "run", lambda *a, real=real, log=launched: log.append(1) or real(*a))
                reasons = module.why_not(p)
                if reasons:
                    with pytest.raises(ValueError) as caught:
                        f(q, k, v, causal=causal, kernel=kernel)
                    assert all(reason in str(caught.value) for reason in reasons)
                    assert plan.why_not[kernel] == reasons
                else:
                    f(q, k, v, causal=causal, kernel=kernel)
                assert bool(launched) != bool(reasons)


def test_lengths_are_what_the_tests_assume() -> None:
    assert LONG > 32
    assert T < 16

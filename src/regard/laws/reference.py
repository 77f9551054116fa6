"""L1, L39: every kernel gives what the reference gives, and runs when named."""

from typing import Any
from unittest import mock

import torch

from regard import masks
from regard.kernels import KERNELS
from regard.laws.agreement import close_all, hold, refused, run, says
from regard.laws.registry import law
from regard.laws.subject import Subject, small_tiles
from regard.pipeline import plan
from regard.pipeline.function import problem

LONG = 37
"""Tokens: three chunks of 16 queries, the last one ragged."""


@law("L1", pipeline=True, weight="heavy")
def kernels_agree(s: Subject) -> None:
    """Every kernel that can run the layer gives the reference's output and all its gradients."""
    agree(s, s.causalities[-1:])


@law("L1", pipeline=True, where=lambda s: "" if s.causalities[1:] else "it has one direction", weight="heavy")
def kernels_agree_in_both_directions(s: Subject) -> None:
    """Where it may be built causal or not, every kernel gives the reference's outputs and gradients for both."""
    agree(s, s.causalities[:-1])


def agree(s: Subject, causalities: list[bool]) -> None:
    mask = (masks.window(11) | masks.global_tokens(2)) & masks.padding(
        lengths=torch.tensor([LONG, 20]).repeat(s.batch)[: s.batch]
    )
    for causal in causalities:
        module, x = s.build(causal=causal), s.tokens(length=LONG)
        options: dict[str, Any] = {"mask": mask} if "mask" in module.supports else {}
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
        lacking = {"eager", "chunked", "auto"} - set(ran)
        hold(not lacking, f"{', '.join(sorted(lacking))} can't run it")


@law("L39", pipeline=True, function=True)
def named_kernels_run_or_refuse(s: Subject) -> None:
    """`plan` names the kernel that runs, and why not the others; a refused kernel raises with the reason."""
    f: Any = s.form()
    q, k, v = f.qkv()
    for causal in s.causalities:
        arguments = f.arguments(causal, kernel="auto")
        planned = plan(q, k, v, **arguments)
        hold({planned.kernel, *planned.why_not} == set(KERNELS), "the plan does not speak of every kernel")
        hold(all(planned.why_not.values()), "the plan leaves out kernels without a reason")
        hold(planned.kernel in str(planned), f"the plan does not say {planned.kernel}: {planned}")
        p = problem(q, k, v, **{n: value for n, value in arguments.items() if n != "kernel"})
        for kernel, module in KERNELS.items():
            reasons = module.why_not(p)
            with mock.patch.object(module, "run", wraps=module.run) as launched:
                if reasons:
                    for reason in reasons:
                        with refused(ValueError, reason, what=f"kernel {kernel!r}"):
                            f(q, k, v, causal=causal, kernel=kernel)
                    hold(planned.why_not[kernel] == reasons, f"the plan has other reasons against {kernel}")
                else:
                    f(q, k, v, causal=causal, kernel=kernel)
            hold(launched.called != bool(reasons), f"{kernel} was {'' if launched.called else 'not '}launched")

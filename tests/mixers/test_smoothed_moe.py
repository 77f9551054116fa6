"""Routing of experts by votes, against loops whose author saw only the paper's account, neither code nor test."""

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_smoothed_moe as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.smoothed_router import SmoothedRouter, voting


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options: Any) -> Any:
    small = {"dim": 6, "num_heads": 2, "num_experts": 5, "hidden": 4}
    made = regard.create("smoothed_moe", **{**small, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.add_(0.5 * normal(n, *p.shape))
    return made


def loops(module: Any, x: Tensor, keep: Tensor | None, **router: Any) -> Any:
    maps = [getattr(module, f"{n}_proj").weight for n in "qkvo"]
    norms = [lambda z, n=n: naive.layer_norm(z, n.weight, n.bias) for n in (module.norm1, module.norm2)]
    e = module.experts
    experts = [
        naive.feed_forward(*weights, torch.nn.functional.gelu)
        for weights in zip(e.up, e.up_bias, e.down, e.down_bias, strict=True)
    ]
    gate, metric = module.router.gate, module.metric
    given = {"temperature": module.temperature, "Ws": None if metric is None else metric.weight.mT}
    rest = {"causal": module.causal, "keep": keep, "top_k": 2, "similarity": module.similarity, **given, **router}
    return naive.block(x, maps, *norms, gate.weight, gate.bias, experts, 2, **rest)


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"causal": True}, {}),
    ({"space": "logits"}, {"space": "logits"}),
    ({"renormalise": False, "weigh": "own"}, {"renormalise": False, "weight_from": "own"}),
    ({"similarity": "tokens", "temperature": 0.7, "causal": True}, {}),
    ({"similarity": "tokens", "metric": "learned", "space": "logits"}, {"space": "logits"}),
    ({"similarity": "none"}, {}),
]


@pytest.mark.parametrize(("options", "theirs"), OPTIONS)
def test_is_the_definition(options: dict[str, Any], theirs: dict[str, Any]) -> None:
    module, x = layer(**options), normal(50, 2, 5, 6).requires_grad_()
    keep = torch.arange(5) < torch.tensor([[5], [3]])
    want, index, weight, probs = loops(module, x, keep, **theirs)
    got, routes = module(x, mask=masks.padding(keep)), module.routes(x, mask=keep)
    assert torch.equal(routes.experts[keep], index[keep])
    close(routes.probs[keep], probs[keep], "probs")
    close(routes.weights[keep], weight[keep], "weights")
    close(got[keep], want[keep], "out")
    leaves, direction = [x, *module.parameters()], normal(51, 2, 5, 6) * keep[..., None]
    sums = ((o * direction).sum() for o in (got, want))
    for mine, other in zip(*(torch.autograd.grad(s, leaves, allow_unused=True) for s in sums), strict=True):
        zero = torch.zeros(())
        close(zero if mine is None else mine, zero if other is None else other, "gradient")


def test_the_balance() -> None:
    module, x = layer(), normal(1, 2, 5, 6)
    _, index, _, probs = loops(module, x, None)
    close(module.balance_loss(x), naive.balance_loss(probs, index))
    keep = torch.arange(5) < torch.tensor([[3], [3]])
    close(module.balance_loss(x, mask=keep), module.balance_loss(x[:, :3]))


def test_weights_of_any_layer_are_a_vote() -> None:
    """As a tensor of all heads, and as what would form none: the same routes."""
    torch.manual_seed(0)
    router, u = SmoothedRouter(6, num_experts=5).double(), normal(0, 2, 7, 6)
    q, k = normal(1, 2, 2, 7, 3), normal(2, 2, 2, 7, 3)
    weights = regard.attention(q, k, torch.eye(7).double().expand(2, 2, -1, -1), mask=masks.causal())
    close(router(u, weights).probs, router(u, voting(q, k, masks.causal())).probs)
    want, _, probs = naive.route(u, router.gate.weight, router.gate.bias, similarity="attention", attention=weights)
    assert torch.equal(router(u, weights).experts, want)
    close(router(u, weights).probs, probs)


def test_votes_steady_the_choice() -> None:
    """Tokens of six noisy groups: fewer change their first expert when disturbed, and more of a group share one."""
    centres, group = 2 * normal(0, 6, 16), torch.arange(96) % 6

    def measured(similarity: str) -> tuple[float, float]:
        torch.manual_seed(0)
        made = regard.create("smoothed_moe", dim=16, num_heads=2, similarity=similarity, top_k=1, temperature=4.0)
        made = made.double()
        x = centres[group] + normal(1, 1, 96, 16)
        with torch.no_grad():
            for p in (made.o_proj.weight, made.experts.down):
                p.zero_()
            made.experts.down_bias.copy_(torch.eye(8, 16))  # experts say who they are
            first, other = ((made(z) - z)[0, :, :8].argmax(-1) for z in (x, x + 0.3 * normal(2, 1, 96, 16)))
            assert torch.equal(first, made.routes(x).experts[0, :, 0])
        shared = sum(torch.bincount(first[group == g]).max() for g in range(6)) / 96
        return float((first != other).double().mean()), float(shared)

    changed, shared = measured("tokens")
    changed_alone, shared_alone = measured("none")
    assert changed < 0.6 * changed_alone
    assert shared > shared_alone + 0.1


def test_a_token_that_sees_nobody_votes_for_itself() -> None:
    module, x = layer(causal=True), normal(3, 1, 4, 6)
    keep = torch.tensor([[False, True, True, True]])
    own = module.router.says(module.norm2(x))
    close(module.routes(x, mask=keep).probs[:, 0], own[:, 0])


@pytest.mark.parametrize("similarity", ["attention", "tokens"])
def test_a_stream_may_be_cut_anywhere(similarity: str) -> None:
    module, x = layer(causal=True, similarity=similarity), normal(6, 2, 11, 6)
    state, outs = module.init_state(2, 11), []
    for piece in x.split([1, 5, 1, 4], 1):
        out, state = module.step(piece, state)
        outs.append(out)
    close(torch.cat(outs, 1), module(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 6}, "top_k is too large"),
        ({"temperature": 0.0}, "temperature is out of range"),
        ({"similarity": "x"}, "similarity is unknown"),
        ({"hidden": 0}, "hidden is too small"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**options)
    with pytest.raises(ValueError, match="causal is off"):
        layer().init_state(1, 3)

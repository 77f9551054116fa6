"""HeadMask against loops, and that it makes heads matter more equally."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close, same
from regard.laws.subject import tokens
from regard.training import HeadMask, head_importance, mask_important, mask_random, unmask
from training.naive_headmask import naive_head_importance, naive_headmask, naive_most_important


class Model(nn.Module):
    """Two layers of attention with residuals."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(regard.create("headmask", dim=12, num_heads=heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def silent(model: nn.Module) -> list[int]:
    xi = torch.cat([part.xi for part in model.modules() if isinstance(part, HeadMask)])
    assert set(xi.tolist()) <= {0.0, 1.0}
    return (xi == 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("masked", [[], [1], [0, 2], [0, 1, 2]])
def test_equals_the_loops(masked: list[int]) -> None:
    gate = HeadMask(3).train()
    gate.xi[masked] = 0
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    got, want = gate(z, tokens(2, 4), "output"), naive_headmask(z, masked)
    close(got, want)
    w = torch.randn_like(want)
    close(torch.autograd.grad((got * w).sum(), z)[0], torch.autograd.grad((want * w).sum() + 0 * z.sum(), z)[0])
    for at in ("query", "key", "value", "dense"):
        assert gate(z, tokens(2, 4), at) is z  # type: ignore[arg-type]
    assert gate.eval()(z, tokens(2, 4), "output") is z


def test_random_heads_of_all_layers() -> None:
    model, x = Model().double().train(), tokens(2, 5, dim=12)
    plain = model(x)
    counts = torch.zeros(6)
    for seed in range(60):
        mask_random(model, 2, generator=torch.Generator().manual_seed(seed))
        heads = silent(model)
        assert len(heads) == 2
        counts[heads] += 1
        assert not torch.allclose(model(x), plain)
    assert counts.min() >= 8  # 20 expected for each
    same(model.eval()(x), plain)
    unmask(model)
    same(model.train()(x), plain)
    state = torch.get_rng_state()
    mask_random(model, 6, generator=torch.Generator().manual_seed(0))
    same(model(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_importance_equals_the_loops() -> None:
    model, x = Model().double().train(), tokens(3, 5, dim=12)
    target = tokens(3, 5, dim=12, seed=8)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        return ((model(x) - target) ** 2).mean()

    hooks = [
        layer.gate.register_forward_hook(lambda m, args, z: seen.append(z) if args[2] == "output" else None)
        for layer in model.layers
    ]
    value = loss()
    grads = torch.autograd.grad(value, seen)
    want = torch.cat([naive_head_importance(z.detach(), g) for z, g in zip(seen, grads, strict=True)])
    for hook in hooks:
        hook.remove()
    mask_random(model, 3)
    before = silent(model)
    close(head_importance(model, loss), want)
    assert silent(model) == before
    mask_important(model, 2, loss)
    assert silent(model) == naive_most_important(want, 2)


def test_importance_is_the_change_of_the_loss() -> None:
    """For a loss that is linear in the heads, silencing one changes it by its importance."""
    model, x = Model().double().train(), tokens(1, 5, dim=12)
    last, w = model.layers[1], tokens(1, 5, dim=12, seed=8)

    def loss() -> Tensor:
        return (model(x) * w).sum()

    importance, full = head_importance(model, loss), loss()
    for h in range(3):
        unmask(model)
        last.gate.xi[h] = 0
        close((loss() - full).abs().detach(), importance[3 + h])


def test_heads_come_to_matter_more_equally() -> None:
    """Two equal heads, one with a head start: without masks it stays the important one, with masks the other
    learns as well."""

    def imbalance(masked: str) -> float:
        torch.manual_seed(0)
        layer = regard.create("headmask", dim=8, num_heads=2).train()
        with torch.no_grad():
            layer.o_proj.weight[:, 4:] *= 0.02
            layer.v_proj.weight[4:] *= 0.02
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
        x = torch.randn(64, 6, 8)
        target = x.mean(1, keepdim=True).expand(-1, 6, -1)

        def loss() -> Tensor:
            return ((layer(x) - target) ** 2).mean() * 8

        for step in range(150):
            if masked == "random":
                mask_random(layer, 1, generator=torch.Generator().manual_seed(step))
            if masked == "important":
                mask_important(layer, 1, loss)
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        unmask(layer)
        with torch.no_grad():
            parts = []
            for h in range(2):
                unmask(layer)
                layer.gate.xi[1 - h] = 0
                parts.append(float(layer(x).norm()))
        return max(parts) / min(parts) - 1

    plain = imbalance("none")
    assert imbalance("random") < 0.3 * plain
    assert imbalance("important") < 0.3 * plain


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"num_heads is too small \(got 0\); expected an int >= 1"):
        HeadMask(0)
    with pytest.raises(ValueError, match=r"model has no HeadMask gate \(got Linear\)"):
        mask_random(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match=r"mask_random: count is too large \(got 7\); expected an int from 0 to 6"):
        mask_random(Model(), 7)
    model = Model()
    with pytest.raises(ValueError, match="1 layers missing"):
        head_importance(model, lambda: model.layers[0](torch.ones(1, 2, 12)).sum())
    assert not silent(model)

"""Mixture-of-head attention against loops (naive_moh.py), and the authors' numbers (B161)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from heads import naive_moh
from regard.bench.auxiliary import auxiliary_losses
from regard.heads.moh import MixtureOfHeads
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[1] / "vectors" / "B161.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int, heads: int, seed: int = 0, **options) -> MixtureOfHeads:
    part = MixtureOfHeads(dim, heads, **options).double()
    with torch.no_grad():
        for n, p in enumerate(part.parameters()):
            p.copy_(normal(100 * seed + n, *p.shape))
    return part


COUNTS = [(6, 2, 3), (6, 2, 4), (5, 0, 2), (3, 3, 0), (4, 1, 2), (4, 2, 0), (2, 0, 2)]
FORMS = ["code", "paper"]


def routers(gate: MixtureOfHeads) -> dict[str, Tensor | None]:
    parts = {"W_r": gate.router, "W_s": gate.shared, "W_h": gate.kind}
    given = {name: None if part is None else part.weight for name, part in parts.items()}
    if gate.router is None and gate.num_heads > gate.shared_heads:
        given["W_r"] = normal(8, gate.num_heads - gate.shared_heads, gate.dim)  # never read
    return given


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "shared", "active"), COUNTS)
def test_gates_are_the_definition(heads: int, shared: int, active: int, form: str) -> None:
    part = filled(7, heads, shared_heads=shared, active=active, form=form)
    x = normal(1, 2, 5, 7).requires_grad_()
    rule = {"code": naive_moh.gates_code, "paper": naive_moh.gates_paper}[form]
    rows = [[torch.stack(rule(token, shared, active, **routers(part))[0]) for token in row] for row in x]
    want = torch.stack([torch.stack(row) for row in rows])
    got = part.gates(x)
    close(got, want, "gates")
    same_gradients(got, want, [x, *part.parameters()])
    z = normal(3, 2, heads, 5, 4)
    close(part(z, x, "output"), z * want.transpose(1, 2)[..., None])
    assert all(part(z, x, site) is z for site in ("query", "key", "value", "dense"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("causal", "groups", "cross"),
    [(True, 2, False), (False, 4, False), (False, 2, True)],
    ids=["causal", "all", "cross"],
)
def test_the_layer_is_the_definition(causal: bool, groups: int, cross: bool, form: str) -> None:
    sizes = {"dim": 12, "num_heads": 4, "num_kv_heads": groups, "shared_heads": 1, "active": 2}
    layer = regard.create("moh", causal=causal, form=form, bias=True, **sizes).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.5 * normal(40 + n, *p.shape))
    x = normal(1, 2, 4, 12).requires_grad_()
    context = normal(2, 2, 5, 12).requires_grad_() if cross else None
    hidden = torch.rand(2, 4, 5 if cross else 4, generator=torch.Generator().manual_seed(3)) < 0.7
    allowed = hidden.tril() if causal else hidden
    own = dict(layer.named_parameters())
    weights = [own[f"{n}_proj.weight"] for n in "qkvo"]
    biases = {f"b{n}": own[f"{n}_proj.bias"] for n in "qkvo"}
    counts = {"num_heads": 4, "num_kv_heads": groups, "num_shared": 1, "top_k": 2}
    given = {"allowed": allowed, "form": form, **biases, **counts, **routers(layer.gate)}
    want, _, _ = naive_moh.moh(x, *weights, context=context, **given)
    got = layer(x, context, mask=hidden[:, None])
    close(got, want, "out")
    same_gradients(got, want, [x, *([context] if cross else []), *own.values()])


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_the_definition(form: str) -> None:
    part, x, z = filled(7, 6, shared_heads=2, active=3, form=form), normal(1, 2, 5, 7), normal(2, 2, 6, 5, 4)
    rule = {"code": naive_moh.load_balance, "paper": naive_moh.load_balance_paper}[form]
    want = rule(x, part.router.weight, 3)
    got = part.balance_loss(z, x, "output")
    close(got, want)
    close(*(torch.autograd.grad(loss, part.router.weight)[0] for loss in (got, want)))
    one = x[:1, :1]
    close(part.balance_loss(one, one, "output"), rule(one, part.router.weight, 3))
    assert part.balance_loss(z, x, "query") == 0
    assert filled(7, 3, shared_heads=3, active=0).balance_loss(z, x, "output") == 0


def test_training_adds_the_loss_once_for_each_call() -> None:
    layer = regard.create("moh", dim=12, num_heads=4, causal=True, shared_heads=2, active=1).double()
    x = normal(1, 2, 5, 12)
    with auxiliary_losses(layer) as losses:
        layer(x)
        layer(2 * x)
        got = sum(losses())
    want = sum(layer.gate.balance_loss(x, n * x, "output") for n in (1, 2))
    close(got, 0.01 * want)


@pytest.mark.parametrize(("case", "shared", "active"), [("c1", 2, 3), ("c2", 0, 2), ("c3", 3, 0)])
def test_gives_the_authors_numbers(case: str, shared: int, active: int) -> None:
    with np.load(VECTORS) as file:
        n = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    x, H = n["x"].requires_grad_(), n["gates"].shape[2]
    M, D = x.shape[2], n["Wo"].shape[1] // H
    gate = MixtureOfHeads(M, H, shared_heads=shared, active=active)
    layer = regard.Attention(M, H, head_dim=D, bias=True, gate=gate).double()
    state = {"o_proj.weight": n["Wo"], "o_proj.bias": n["bo"]}
    for name, weight, bias in zip("qkv", n["W_qkv"].chunk(3), n["b_qkv"].chunk(3), strict=True):
        state |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": bias}
    theirs = {"gate.router.weight": "W_router", "gate.kind.weight": "W_type", "gate.shared.weight": "W_shared"}
    layer.load_state_dict(state | {mine: n[name] for mine, name in theirs.items() if name in n})
    out = layer(x)
    close(gate.gates(x), n["gates"], "gates")
    close(out, n["out"], "out")
    (gx,) = torch.autograd.grad((out * n["w"]).sum(), x)
    close(gx, n["grad_x"], "gradient of x")
    if active:
        loss = gate.balance_loss(out, x, "output")
        close(loss, n["l_aux"], "loss")
        close(torch.autograd.grad(loss, gate.router.weight)[0], n["grad_l_aux_W_router"], "gradient of the router")
        assert torch.equal(gate.gates(x)[..., shared:] > 0, n["selected"])


@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_token_uses_the_shared_heads_and_those_it_picks(form: str) -> None:
    """With heads side by side in the output, all others' features are exactly 0, and tokens differ in their picks."""
    layer = regard.create("moh", dim=24, num_heads=8, shared_heads=2, active=3, form=form, causal=True).double()
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(24))
    out = layer(normal(1, 2, 9, 24)).unflatten(-1, (8, 3))
    used = out.ne(0).any(-1)
    assert torch.equal(used.sum(-1), torch.full((2, 9), 5))
    assert used[..., :2].all()
    assert len({tuple(row.tolist()) for row in used.flatten(0, 1)}) > 1


def test_a_trained_layer_goes_on_as_it_was() -> None:
    """Converted with all heads active and flat routers it is plain attention; with fewer, only those are lost."""
    plain = regard.create("softmax", dim=12, num_heads=4, causal=True).double()
    x = normal(1, 2, 5, 12)
    for shared, active in ((1, 3), (0, 4), (4, 0), (2, 2)):
        layer = regard.create("moh", dim=12, num_heads=4, causal=True, shared_heads=shared, active=active).double()
        layer.load_state_dict(plain.state_dict(), strict=False)
        assert layer.gate.start_neutral()
        assert (layer(x) - plain(x)).abs().max() < 1e-12
    few = filled(12, 4, shared_heads=2, active=1)
    few.start_neutral()
    assert set(few.gates(x).unique().tolist()) == {0.0, 1.0}


def test_training_on_the_loss_evens_out_the_picks() -> None:
    """A router that sends all tokens to one head learns to spread them."""
    torch.manual_seed(0)
    part, x = filled(4, 6, shared_heads=2, active=1), torch.cat([normal(1, 1, 64, 3), torch.ones(1, 64, 1)], -1)
    with torch.no_grad():
        part.router.weight.mul_(0.1)[0, 3] = 3.0
    optimiser = torch.optim.Adam(part.parameters(), 0.1)
    losses = []
    for _ in range(60):
        loss = part.balance_loss(x, x, "output")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 1.2, "1 is even"


def test_defaults_are_the_papers_llama() -> None:
    part = MixtureOfHeads(64, 32)
    assert (part.shared_heads, part.active, part.auxiliary_weight) == (16, 8, 0.01)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="active is too large"):
        MixtureOfHeads(8, 4, shared_heads=2, active=3)
    with pytest.raises(ValueError, match="active leaves no head"):
        MixtureOfHeads(8, 4, shared_heads=0, active=0)
    with pytest.raises(ValueError, match="form is unknown"):
        MixtureOfHeads(8, 4, form="papers")

"""Gated slot attention against loops and numbers of the authors' functions and layer.

The loops' author has read neither code nor test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_gsa import abc, gates, gsa, layer
from regard import masks
from regard.laws.agreement import close
from regard.linear import GatedSlotAttention, Slots, slot_attention
from regard.linear._running import means

VECTORS = Path(__file__).parents[1] / "vectors"
NAMES = {f"{own}_proj.weight": f"{own}_proj.weight" for own in "qkvo"} | {"slot_proj.weight": "f_proj.weight"}
NAMES |= {"norm_weight": "g_norm.weight"}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> GatedSlotAttention:
    made = regard.create("gsa", dim=8, num_heads=2, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return made


def vectors(file: str, case: str) -> dict[str, Tensor]:
    with np.load(VECTORS / file) as held:
        return {k.removeprefix(case): torch.from_numpy(held[k]) for k in held if k.startswith(case)}


def turned(*tensors: Tensor) -> list[Tensor]:
    return [z.transpose(1, 2) for z in tensors]


def test_authors_numbers() -> None:
    """Outputs and all gradients, of gated slots and of those that are means."""
    z = vectors("S-gsa.npz", "g_")
    names = ("q", "k", "v", "slot_write", "log_decay")
    given = {n: z[n].clone().requires_grad_() for n in names}
    out = slot_attention(*turned(*given.values())).out.transpose(1, 2)
    close(out.detach(), z["out"])
    for n, g in zip(names, torch.autograd.grad((out * z["w"]).sum(), list(given.values())), strict=True):
        close(g, z[f"g{n}"])
    z = vectors("gsa_layer.npz", "a_")
    given = {n: z[n].clone().requires_grad_() for n in "qkvs"}
    q, k, v, s = turned(*given.values())
    out = slot_attention(q, k, v, *means(s)[:2]).out.transpose(1, 2)
    close(out.detach(), z["out"])
    for n, g in zip("qkvs", torch.autograd.grad((out * z["w"]).sum(), list(given.values())), strict=True):
        close(g, z[f"g{n}"])


def test_gives_the_numbers_of_the_authors_layer() -> None:
    z = vectors("gsa_layer.npz", "l_")
    made = GatedSlotAttention(8, 4, num_kv_heads=2, slots=5).double()
    made.load_state_dict({own: z[their] for own, their in NAMES.items()})
    x = z["x"].clone().requires_grad_()
    out = made(x)
    close(out.detach(), z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    for own, p in made.named_parameters():
        close(p.grad, z[f"g_{NAMES[own]}"], own)


@pytest.mark.parametrize(
    "options", [{}, {"slots": 3, "temperature": 2.0, "eps": 0.1}, {"key_expand": 0.5, "value_expand": 2.0}], ids=str
)
def test_layer_equals_the_loops(options: dict) -> None:
    made, x = filled(1, **options), normal(1, 2, 6, 8)
    p = dict(made.named_parameters())
    w = [p[f"{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "slot_proj", "o_proj")]
    sizes = {"heads": 2, "temperature": options.get("temperature", 8.0), "eps": options.get("eps", 1e-5)}
    want, keys, values = layer(x, *w, made.norm_weight, **sizes)
    out, state = made.step(x, made.init_state(2, 9, dtype=torch.float64))
    close(made(x).detach(), want.detach())
    close(out.detach(), want.detach())
    close(state.kv.detach(), torch.cat([keys, values], -1).detach())


@pytest.mark.parametrize("scale", [1.0, 200.0], ids=["small", "large"])
def test_means_are_those_of_the_loops(scale: float) -> None:
    """Whatever the logits, in one go and with a state between."""
    q, k, v, s = normal(1, 1, 5, 2, 3), normal(2, 1, 5, 2, 3), normal(3, 1, 5, 2, 4), scale * normal(4, 1, 5, 2, 3)
    want = abc(q, k, v, s).transpose(1, 2)
    q, k, v, s = turned(q, k, v, s)
    close(slot_attention(q, k, v, *means(s)[:2]).out, want)
    write, decay, total = means(s[:, :, :2])
    first = slot_attention(q[:, :, :2], k[:, :, :2], v[:, :, :2], write, decay)
    close(total, s[:, :, :2].logsumexp(2))
    write, decay, total = means(s[:, :, 2:], total)
    second = slot_attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], write, decay, state=first.state)
    close(torch.cat([first.out, second.out], 2), want)
    close(total, s.logsumexp(2))
    close(write + decay.exp(), torch.ones_like(write))


def test_features_values_and_the_scale() -> None:
    made, x = filled(2, feature_map="relu", scale=0.3, slots=3), normal(1, 2, 6, 8)
    q, k, v, f = (getattr(made, f"{n}_proj")(x).unflatten(-1, (2, -1)) for n in ("q", "k", "v", "slot"))
    decay, write = gates(f)
    out = gsa(0.3 * 2 * q.relu(), k.relu(), F.silu(v), write, decay)[0].transpose(1, 2)
    close(made(x).detach(), made.merge(made.normed(out, x)).detach())
    plain = filled(2, feature_map=None, slots=3)
    out = gsa(2 * q, k, F.silu(v), write, decay)[0].transpose(1, 2)
    close(plain(x).detach(), plain.merge(plain.normed(out, x)).detach())


def test_one_slot_is_a_running_mean() -> None:
    """A query has no choice: the value of a token, d steps on, counts its share and what was kept since."""
    q, k, v, f = normal(1, 1, 2, 7, 3), normal(2, 1, 2, 7, 3), normal(3, 1, 2, 7, 4), -normal(4, 1, 2, 7, 1).abs()
    mean, rows = 0.0, []
    for t in range(7):
        mean = f[:, :, t].exp() * mean + (1 - f[:, :, t].exp()) * v[:, :, t]
        rows.append(mean)
    for queries in (q, -3 * q):
        close(slot_attention(queries, k, v, 1 - f.exp(), f).out, torch.stack(rows, 2))
    two = 1 - f.exp().expand(-1, -1, -1, 2)
    two = two * torch.tensor([1.0, 0.3], dtype=torch.float64)
    outs = [slot_attention(queries, k, v, two, f.expand_as(two)).out for queries in (q, -3 * q)]
    assert (outs[0] - outs[1]).abs().max() > 1e-2, "with two it has"


@pytest.mark.parametrize("options", [{}, {"abc": True}, {"abc": True, "num_kv_heads": 1, "conv_size": 3}], ids=str)
def test_hidden_tokens_documents_and_steps(options: dict) -> None:
    made, x = filled(4, slots=3, **options), normal(1, 1, 9, 8)
    real = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 0]]).bool()
    close(made(x, mask=real)[real].detach(), made(x[real][None])[0].detach())
    got = made(x, mask=masks.packed(torch.tensor([0, 3, 5, 7, 9])) & masks.padding(real))
    for first, last in ((0, 3), (3, 5), (5, 7), (7, 9)):
        here = real[0, first:last]
        close(got[0, first:last][here].detach(), made(x[:, first:last][:, here])[0].detach())
    state, outs = made.init_state(1, 9, dtype=torch.float64), []
    for t in range(9):
        out, state = made.step(x[:, t : t + 1], state, mask=real[:, t : t + 1])
        outs.append(out)
    close(torch.cat(outs, 1)[real].detach(), made(x, mask=real)[real].detach())


def test_means_of_long_sequences_stay_means_in_single_precision() -> None:
    s, v = normal(1, 1, 1, 20000, 2), 1 + normal(2, 1, 1, 20000, 1)
    wide, single = (slot_attention(z, z, z, *means(u)[:2]).out for z, u in ((v, s), (v.float(), s.float())))
    assert (wide - single).abs().max() < 1e-5


def test_starting_values_and_refusals() -> None:
    made = regard.create("gsa", dim=32, num_heads=4, causal=True, num_kv_heads=2)
    assert made.slot_proj.weight.shape == (16, 32)
    assert torch.equal(made.norm_weight, torch.ones(32))
    assert all(name.endswith("weight") for name, _ in made.named_parameters())
    for option, value in (("slots", 0), ("temperature", 0.0), ("scale", 0.0), ("feature_map", "elu"), ("abc", 1)):
        with pytest.raises((ValueError, TypeError), match=f"GatedSlotAttention: {option} "):
            GatedSlotAttention(8, 2, **{option: value})
    x, gate = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)
    with pytest.raises(ValueError, match="slot_attention: decay"):
        slot_attention(x, x, x, gate, gate[..., :2])
    with pytest.raises(ValueError, match="state"):
        slot_attention(x, x, x, gate, gate, state=Slots(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 4)))

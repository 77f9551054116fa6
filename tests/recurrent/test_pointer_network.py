"""The pointer network: loops and public numbers for its decoder (A190, case b), and that it learns to sort."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recurrent.naive_pointer import naive_ptr_net
from regard.laws.agreement import close, same
from regard.laws.subject import perturb, tokens
from regard.recurrent import PointerNetwork

VECTORS = Path(__file__).parents[1] / "vectors" / "A190.npz"


def network(input_dim: int, hidden: int, *, repeats: bool = True) -> PointerNetwork:
    torch.manual_seed(4)
    model = PointerNetwork(input_dim, hidden, repeats=repeats).double()
    perturb(model)
    return model


def test_decoder_gives_the_numbers_of_the_public_code() -> None:
    """Its elements are 3 wide and its states 5, and its projections have biases: such layers are put in."""
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith("b_")}
    model = PointerNetwork(2, 5, repeats=False).double()
    model.decoder = torch.nn.LSTM(3, 5, batch_first=True).double()
    with torch.no_grad():
        for name, key in (("weight_ih", "Wih"), ("weight_hh", "Whh"), ("bias_ih", "bih"), ("bias_hh", "bhh")):
            getattr(model.decoder, f"{name}_l0").copy_(z[key])
        model.pointer.k_proj = torch.nn.Linear(5, 5).double()
        model.pointer.q_proj = torch.nn.Linear(5, 5).double()
        for layer, n in ((model.pointer.k_proj, 1), (model.pointer.q_proj, 2)):
            layer.weight.copy_(z[f"W{n}"])
            layer.bias.copy_(z[f"b{n}"])
        model.pointer.score.copy_(z["v"])
    ctx, emb, tours = z["ctx"].requires_grad_(), z["emb"].requires_grad_(), z["tours"].long()
    chosen = emb.gather(1, tours[:, :-1, None].expand(-1, -1, 3))
    state = (z["h0"][None], z["c0"][None])
    decoded, _ = model.decoder(torch.cat([z["x0"][:, None], chosen], 1), state)
    got = model.pointer(decoded, ctx, mask=model._unvisited(tours, 7))
    same(got == -torch.inf, z["logp"] == -torch.inf)
    close(got.detach().exp(), z["logp"].exp())
    loss = (z["w"] * got.gather(-1, tours[..., None])[..., 0]).sum()
    grads = torch.autograd.grad(loss, (ctx, emb))
    close(grads[0], z["grad_ctx"])
    close(grads[1], z["grad_emb"])


@pytest.mark.parametrize("repeats", [True, False])
def test_equals_the_loops(repeats: bool) -> None:
    model, inputs = network(2, 4, repeats=repeats), tokens(2, 5, dim=2)
    targets = torch.tensor([[4, 0, 1, 3], [2, 1, 0, 4]])
    embedded = model.embed(inputs)
    encoded, (h, c) = model.encoder(embedded)
    lstm, pointer = model.decoder, model.pointer
    want = naive_ptr_net(
        embedded,
        encoded,
        model.start.expand(2, -1),
        h[0],
        c[0],
        targets,
        lstm.weight_ih_l0,
        lstm.weight_hh_l0,
        lstm.bias_ih_l0,
        lstm.bias_hh_l0,
        pointer.k_proj.weight,
        pointer.q_proj.weight,
        pointer.score,
        once=not repeats,
    )
    got = model(inputs, targets)
    close(got, want)
    parameters = list(model.parameters())
    pick = targets[..., None]
    for a, b in zip(
        torch.autograd.grad(got.gather(-1, pick).sum(), parameters, retain_graph=True),
        torch.autograd.grad(want.gather(-1, pick).sum(), parameters),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("repeats", [True, False])
def test_decoding_takes_the_most_probable_input(repeats: bool) -> None:
    """Greedy choices, fed back as targets, are the greatest log-probabilities; without repeats they are an order."""
    model, inputs = network(2, 6, repeats=repeats), tokens(3, 7, dim=2)
    tour = model.decode(inputs)
    same(model(inputs, tour).argmax(-1), tour)
    if not repeats:
        same(tour.sort(-1).values, torch.arange(7).expand(3, 7))
        close(model(inputs, tour)[:, -1].max(-1).values, torch.zeros(3, dtype=torch.float64))  # one input is left
    assert model.decode(inputs, 2).shape == (3, 2)
    assert model.decode(inputs, 0).shape == (3, 0)


def lists(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    numbers = torch.rand(count, length, 1, generator=torch.Generator().manual_seed(seed))
    return numbers, numbers[..., 0].argsort(-1)


def test_learns_to_sort() -> None:
    """Random lists of five numbers: chance is one order in 120."""
    torch.manual_seed(0)
    model = PointerNetwork(1, 32, repeats=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(350):
        numbers, order = lists(128, 5, step)
        loss = -model(numbers, order).gather(-1, order[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    numbers, order = lists(500, 5, -1)
    right = (model.decode(numbers) == order).all(-1).float().mean()
    assert right > 0.9
    longer, order = lists(500, 7, -2)  # a length never seen: chance is one order in 5040
    assert (model.decode(longer) == order).all(-1).float().mean() > 0.7


def test_bad_input_raises() -> None:
    model = network(2, 4, repeats=False)
    with pytest.raises(ValueError, match=r"inputs has the wrong shape \(got \(2, 5, 3\)\); expected \(B, S, I = 2\)"):
        model(tokens(2, 5, dim=3), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets has the wrong shape \(got \(1, 3\)\); expected \(B = 2, T\)"):
        model(tokens(2, 5, dim=2), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"targets has the wrong dtype \(got torch.int32\); expected int64"):
        model(tokens(2, 5, dim=2), torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"inputs is empty \(got 0 of them\); expected at least 1"):
        model.decode(tokens(2, 0, dim=2))
    with pytest.raises(ValueError, match=r"steps is too large \(got 6\); expected an int from 0 to 5"):
        model.decode(tokens(2, 5, dim=2), 6)

"""NAtS: masks, values, gradients and drops against plain loops, and what is learned under a price.

The loops of naive_nats.py are by an author who saw only the paper's account and one of the authors' kernels, neither
this library's code nor its tests.
"""

import pytest
import torch
from torch import nn

from regard.laws.agreement import close
from regard.routing.nats import NAtS
from regard.routing.nats_attention import nats_attention, nats_mask, next_global, priced_types, token_types
from routing import naive_nats as naive


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_types(T=11, seed=0, B=2, G=2):
    kind = torch.randint(3, (B, G, T), generator=torch.Generator().manual_seed(seed))
    kind[:, :, 0] = 0
    kind[0, 0, 4:6] = 0  # two globals side by side
    return nn.functional.one_hot(kind, 3).double()


def heads(T=11):
    return drawn(2, 4, T, 3), drawn(2, 2, T, 3, seed=1), drawn(2, 2, T, 3, seed=2)


def test_types_and_their_gradient():
    x, W, noise = drawn(2, 5, 4), drawn(6, 4, seed=1), drawn(2, 2, 5, 3, seed=2)
    x.requires_grad_(), W.requires_grad_()
    logits = (x @ W.mT).unflatten(-1, (2, 3)).transpose(1, 2)
    forced = torch.tensor([[True, False, False, False, True]] * 2)
    got = token_types(logits, noise=noise, tau=0.7, forced=forced)
    want = naive.token_types(x, W, 2, noise, 0.7, last_global=True)
    close(got, want)
    aim = drawn(2, 2, 5, 3, seed=3)
    for a, b in zip(*(torch.autograd.grad((z * aim).sum(), (x, W)) for z in (got, want)), strict=True):
        close(a, b)
    plain = token_types(logits.detach(), forced=forced[:, :] & torch.tensor([True] + [False] * 4))
    close(plain, naive.token_types(x, W, 2).detach())


@pytest.mark.parametrize("after", [False, True])
def test_ends(after):
    is_global = some_types(seed=3)[..., 0] > 0.5
    got = next_global(is_global, torch.arange(11).expand(2, 2, 11), after=after).clamp(max=10)
    for b in range(2):
        for g in range(2):
            assert got[b, g].tolist() == naive.ends(is_global[b, g].tolist(), after)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_masks_and_values(window):
    types, (q, k, v) = some_types(), heads()
    assert torch.equal(nats_mask(types, window), naive.nats_mask(types, window))
    close(nats_attention(q, k, v, types, window=window), naive.nats_attention(q, k, v, types, window))


@pytest.mark.parametrize("local_end", ["own", "next"])
def test_gradients(local_end):
    """Queries, keys and values as of the masked softmax; types as the account has it."""
    leaves = [z.requires_grad_() for z in (*heads(), some_types())]
    q, k, v, types = leaves
    aim, window = drawn(2, 4, 11, 3, seed=5), 2
    got = torch.autograd.grad((nats_attention(q, k, v, types, window=window, local_end=local_end) * aim).sum(), leaves)
    want = torch.autograd.grad((naive.nats_attention(q, k, v, types, window) * aim).sum(), leaves[:3])
    for a, b in zip(got, want, strict=False):
        close(a, b)
    slopes = naive.mask_gradient(q, k, v, types, window, aim)
    expected = torch.zeros_like(types)
    for b in range(2):
        for h in range(4):
            e = naive.ends([naive.kind(z) == 0 for z in types[b, h // 2]], local_end == "next")
            for j in range(11):
                for i in range(j, 11):
                    slope = slopes[b, h, i, j]
                    expected[b, h // 2, j] += torch.stack([slope, slope * (i <= e[j]), slope * (i <= j + window)])
    close(got[3], expected)


def test_the_price():
    types = some_types()
    types[:, :, -1] = torch.tensor([1.0, 0, 0])  # as in training
    types.requires_grad_()
    nothing = torch.zeros(2, 4, 11, 11, dtype=torch.float64)
    want = naive.type_gradient(nothing, types, 2, sparsity=0.3)
    got = priced_types(types, 0.3 * 2)
    assert torch.equal(got, types)
    close(torch.autograd.grad(got.sum(), types)[0], want + 1)


def layer(**options):
    torch.manual_seed(0)
    made = NAtS(12, 4, num_kv_heads=2, window=2, base=None, **options).double().eval()
    nn.init.normal_(made.type_proj.weight)
    return made


@torch.no_grad()
def test_a_stream_drops_what_has_expired():
    made, x = layer(), drawn(2, 14, 12)
    want, (q, k, v) = made(x), made.split(x, x)
    types = made.types(k[..., 3:], None, torch.zeros(2, dtype=torch.bool))
    out, live = naive.nats_stream(q, k[..., :3], v, types, 2)
    close(made.merge(out), want)
    state, outs = made.init_state(2, 64), []
    for t in range(14):
        y, state = made.step(x[:, t : t + 1], state)
        outs.append(y)
        # What no later query can see is gone at once, where the loops drop it as the next token comes.
        kinds = types[:, :, : t + 1].argmax(-1)
        stale = ((kinds == 2) & (torch.arange(t + 1) + 2 < t + 1)).sum(-1)
        assert torch.equal(state.live, live[:, :, t] - stale.clamp(max=(kinds[:, :, max(t - 2, 0)] == 2).long()))
    close(torch.cat(outs, 1), want)
    assert (state.live < 14).all()


def test_learns_to_keep_what_is_asked_for():
    """A marked token's value is asked for at the end: it is found, and with a price on keys few others are held."""
    torch.manual_seed(0)
    T, M = 24, 16

    def batch(n):
        x = 0.3 * torch.randn(n, T, M)
        x[..., :6] = 0
        at, label = torch.randint(2, T - 6, (n,)), torch.randint(4, (n,))
        x[torch.arange(n), at, label] = 2.0
        x[torch.arange(n), at, 4] = 2.0
        x[:, -1, 5] = 2.0
        return x, label

    made, head = NAtS(M, 2, window=2, sparsity=0.02, base=None), nn.Linear(M, 4)
    optimizer = torch.optim.Adam([*made.parameters(), *head.parameters()], 1e-2)
    for _ in range(200):
        x, label = batch(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(made(x)[:, -1]), label).backward()
        optimizer.step()
    made.eval()
    with torch.no_grad():
        x, label = batch(256)
        right = float((head(made(x)[:, -1]).argmax(-1) == label).float().mean())
        _, state = made.step(x, made.init_state(256, T))
    share = float(state.live.float().mean()) / T
    assert right > 0.95, (right, share)
    assert share < 0.5, (right, share)


def test_what_it_can_not_do():
    with pytest.raises(ValueError, match="NAtS: tau is out of range"):
        NAtS(12, 4, tau=0.0)
    with pytest.raises(ValueError, match="NAtS: head_dim is odd"):
        NAtS(12, 4)
    made = NAtS(16, 4)
    with pytest.raises(TypeError, match="NAtS: state has the wrong type"):
        made.step(torch.zeros(1, 1, 16), None)

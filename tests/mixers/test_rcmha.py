"""RCMHA against loops by one who saw a summary only, no code and no test (naive_rcmha.py), and the authors' numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from mixers import naive_rcmha as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.rcmha import RelativeConvAttention, RelativeTable

VECTORS = Path(__file__).parents[1] / "vectors" / "A193.npz"
M, H, T, P = 12, 3, 6, 16


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(dim: int = M, heads: int = H, **options: Any) -> RelativeConvAttention:
    made = regard.create("rcmha", dim=dim, num_heads=heads, **{"max_distance": P, **options}).double().eval()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.5 * normal(n, *p.shape))
    return made


def oracle(made: RelativeConvAttention, x: Tensor, **given: Any) -> Tensor:
    heads, place = made.heads, made.position
    names = {"query": "q", "key": "k", "value": "v"}
    convs = {name: (getattr(heads, f"{n}_weight")[0], getattr(heads, f"{n}_bias")[0]) for name, n in names.items()}
    projections = (
        made.q_proj.weight,
        made.k_proj.weight,
        made.v_proj.weight,
        made.v_proj.bias,
        made.o_proj.weight,
        made.o_proj.bias,
    )
    return naive.rcmha(x, *projections, convs, place.u, place.table, place.table_bias, **given)[0]


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 2])
def test_is_the_definition(kernel_size: int, causal: bool, past: int) -> None:
    made = layer(kernel_size=kernel_size, causal=causal)
    x, memory = normal(50, 2, T, M).requires_grad_(), normal(51, 2, past, M).requires_grad_()
    allowed = torch.ones(T, past + T, dtype=torch.bool)
    allowed = allowed.tril(past) if causal else allowed
    got = made(x, memory=memory) if past else made(x)
    want = oracle(made, x, memory=memory if past else None, allowed=allowed)
    close(got, want, "out")
    same_gradients(got, want, [x, *made.parameters(), *([memory] if past else [])])


@pytest.mark.parametrize("case", ["causal", "mem", "bidir"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Their arrays are (T, B, M)."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    (S, _, dim), (length, _, _), (heads, _) = z["x"].shape, z["y"].shape, z["u"].shape
    made = layer(dim, heads, causal=case != "bidir", max_distance=S)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
        for name, given in {"q": "Wq", "k": "Wk", "v": "Wv", "o": "Wo"}.items():
            getattr(made, f"{name}_proj").weight.copy_(z[given])
        made.v_proj.bias.copy_(z["bv"])
        made.o_proj.bias.copy_(z["bo"])
        for name, given in {"q": "query", "k": "key", "v": "value"}.items():
            getattr(made.heads, f"{name}_weight").copy_(z[f"{given}_conv"])
            getattr(made.heads, f"{name}_bias").copy_(z[f"{given}_conv_bias"])
        made.position.table[: S + length] = z["E"]
        made.position.table_bias[: S + length] = z["Eb"]
        made.position.u.copy_(z["u"])
    x = z["x"].transpose(0, 1).clone().requires_grad_()
    past = S - length
    out = made(x[:, past:], memory=x[:, :past]) if past else made(x)
    close(out, z["y"].transpose(0, 1), "out")
    wanted = [x, made.position.table, made.heads.k_weight]
    of_x, of_table, of_conv = torch.autograd.grad((out * z["w"].transpose(0, 1)).sum(), wanted)
    close(of_x, z["grad_x"].transpose(0, 1), "gradient of x")
    close(of_table[: S + length], z["grad_E"], "gradient of the table")
    close(of_conv[0], z["grad_key_conv"][:, 0], "gradient of the kernel")


def test_starts_as_the_authors_code() -> None:
    made = regard.create("rcmha", dim=M, num_heads=H)
    assert made.position.table.shape == (8192, H, M // H)
    assert made.position.table_bias.shape == (8192, H)
    assert all((p == 0).all() for p in made.position.parameters())
    assert made.q_proj.bias is made.k_proj.bias is None
    without = regard.create("rcmha", dim=M, num_heads=H, bias=False)
    assert without.v_proj.bias is without.o_proj.bias is None
    assert made.v_proj.bias.shape == made.o_proj.bias.shape == (M,)
    assert made.heads.q_weight.shape == (1, M // H, 3)
    for p in made.heads.parameters():
        assert 0 < p.abs().max() <= 3**-0.5


def test_neutral_parts_are_plain_attention() -> None:
    made, x = layer(causal=True), normal(1, 2, T, M)
    assert made.heads.start_neutral()
    assert made.position.start_neutral()
    q, k, v = (made._split(p(x), H) for p in (made.q_proj, made.k_proj, made.v_proj))
    want = made.o_proj(regard.attention(q, k, v, mask=masks.causal()).transpose(1, 2).flatten(2))
    close(made(x), want, "out")


def test_without_queries_keys_and_distances_count() -> None:
    made, x = layer(causal=True), normal(1, 2, T, M)
    with torch.no_grad():
        made.q_proj.weight.zero_()
        made.heads.q_bias.zero_()
    out = made(x)
    with torch.no_grad():
        made.position.table.add_(1)
    close(made(x), out, "vectors of distances meet queries alone")
    with torch.no_grad():
        made.position.table_bias[P - 1] += 1
    assert (made(x) - out).abs().max() > 1e-2


@pytest.mark.parametrize("past", [0, 3])
def test_padding_is_as_if_cut_away(past: int) -> None:
    """Also in the memory, and whatever the pads hold."""
    made, x = layer(causal=True), normal(1, 2, past + T, M)
    keep = torch.ones(2, past + T, dtype=torch.bool)
    keep[0, :2] = False
    for hold in (7.0, torch.nan):
        given = x.masked_fill(~keep[..., None], hold)
        memory = {"memory": given[:, :past]} if past else {}
        out = made(given[:, past:], mask=masks.padding(keep), **memory)
        first = made(x[:1, max(past, 2) :], memory=x[:1, 2:past]) if past else made(x[:1, 2:])
        close(out[:1, -first.shape[1] :], first, "padded")
        close(out[1:], made(x[1:, past:], memory=x[1:, :past]) if past else made(x[1:]), "the other row")


def test_nan_in_the_memory_shows() -> None:
    made, x, memory = layer(causal=True), normal(1, 1, T, M), normal(2, 1, 3, M)
    memory[:, 1] = torch.nan
    assert made(x, memory=memory).isnan().all()


def test_a_stream_is_the_full_pass_and_a_memory_is_not() -> None:
    made, x = layer(causal=True), normal(4, 2, 9, M)
    want, state, outs = made(x), made.init_state(2, 9), []
    for size in (1, 3, 1, 4):
        y, state = made.step(x[:, sum(o.shape[1] for o in outs) :][:, :size], state)
        outs.append(y)
    close(torch.cat(outs, 1), want, "stream")
    segment = made(x[:, 5:], memory=x[:, :5])
    assert (segment[:, :2] - want[:, 5:7]).abs().amin(-1).max() > 1e-3, "their queries read zeros"
    close(segment[:, 2:], want[:, 7:], "the rest")


def test_grouped_keys_are_repeated_ones() -> None:
    made, full, x = layer(heads=6, num_kv_heads=2), layer(heads=6), normal(1, 2, T, M)
    with torch.no_grad():
        for name, p in full.named_parameters():
            given = dict(made.named_parameters())[name]
            if given.shape != p.shape:
                given = given.unflatten(0, (2, M // 6)).repeat_interleave(3, 0).flatten(0, 1)
            p.copy_(given)
    close(made(x), full(x), "out")


def test_refusals() -> None:
    made, x = layer(causal=True, max_distance=4), normal(1, 2, 6, M)
    made(x[:, :5])
    for call in (lambda: made(x), lambda: made(x[:, :4], memory=x[:, :2])):
        with pytest.raises(ValueError, match=r"max_distance is less than tokens are apart \(got 4\); expected .* 5"):
            call()
    with pytest.raises(ValueError, match=r"max_distance is less than tokens are apart"):
        layer(max_distance=4)(x[:, :5])
    with pytest.raises(ValueError, match="memory has another batch than x"):
        made(x[:, :2], memory=x[:1, :2])
    with pytest.raises(ValueError, match="memory has the wrong shape"):
        made(x[:, :2], memory=x[:, :2, :4])
    with pytest.raises(ValueError, match="packs documents beside a memory"):
        made(x[:, :2], memory=x[:, :2], mask=masks.packed(torch.tensor([0, 2, 4])))
    with pytest.raises(ValueError, match="context is not taken"):
        made(x[:, :2], x[:, :2], memory=x[:, :2])
    with pytest.raises(ValueError, match="kernel_size is too small"):
        regard.create("rcmha", dim=M, num_heads=H, kernel_size=0)
    with pytest.raises(ValueError, match="RelativeTable: max_distance is too small"):
        RelativeTable(4, 2, max_distance=0)
    z = normal(1, 1, 2, 3, 5)
    with pytest.raises(ValueError, match="RelativeTable: q has the wrong shape"):
        regard.attention(z, z, z, position=RelativeTable(4, 2).double())


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k1 v1 ... k6 v6, and the keys again in another order; the value of each."""
    keys, values = (torch.rand(count, 12, generator=generator).argsort(1)[:, :6] for _ in range(2))
    order, values = torch.rand(count, 6, generator=generator).argsort(1), 12 + values
    return torch.cat([torch.stack([keys, values], -1).flatten(1), keys.gather(1, order)], 1), values.gather(1, order)


def learned(**options: Any) -> float:
    """How often one layer names what followed each key, after 100 steps."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    mixer = regard.create("rcmha", dim=32, num_heads=1, causal=True, max_distance=32, **options)
    model = nn.Sequential(nn.Embedding(24, 32), mixer, nn.Linear(32, 24))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        given, values = pairs(64, generator)
        F.cross_entropy(model(given)[:, -6:].flatten(0, 1), values.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    given, values = pairs(256, generator)
    return float((model(given)[:, -6:].argmax(-1) == values).double().mean())


@pytest.mark.slow
def test_one_layer_looks_up_what_followed() -> None:
    """Keys must tell which token came before them: distances alone are of no use."""
    assert learned() > 0.9
    assert learned(kernel_size=1) < 0.4

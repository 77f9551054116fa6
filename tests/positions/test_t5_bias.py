"""T5's bucketed bias against loops, whose author saw the equations alone, and transformers' numbers (S-t5bias)."""

import pytest
import torch
from torch import Tensor

import regard
from positions import naive_t5_bias
from positions.naive import close, rows, vectors
from regard import masks
from regard.positions.t5_bias import T5Bias, bucket

NAMES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "position.table": "relative_attention_bias"}


def gradients(out: Tensor, of: list[Tensor]) -> list[Tensor]:
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return list(torch.autograd.grad((out * g).sum(), of))


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(
    ("causal", "bidirectional", "buckets", "longest"),
    [(False, None, 8, 6), (True, None, 7, 5), (True, True, 4, 2), (False, None, 32, 128)],
    ids=["both ways", "causal", "causal, both ways", "defaults"],
)
def test_the_layer_is_the_definition(
    causal: bool, bidirectional: bool | None, buckets: int, longest: int, scale: float | None
) -> None:
    options = {"buckets": buckets, "max_distance": longest, "bidirectional": bidirectional}
    layer = regard.create("t5_bias", dim=6, num_heads=2, causal=causal, dtype=torch.float64, **options)
    layer.scale = scale
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    real = torch.arange(8) < torch.tensor([[8], [5]])
    allowed = real[:, None].expand(2, 8, 8)
    allowed = allowed.tril() if causal else allowed
    matrices = [getattr(layer, f"{n}_proj").weight for n in "qkvo"]
    both = not causal if bidirectional is None else bidirectional
    want, _ = naive_t5_bias.attention(
        x, *matrices, layer.position.table, longest, both, allowed, 3**-0.5 if scale is None else scale
    )
    got = layer(x, mask=masks.padding(real))
    close(got, want)
    of = [x, *layer.parameters()]
    for mine, theirs in zip(gradients(got, of), gradients(want, of), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(4, 3), (6, 9), (8, 5), (16, 100), (32, 128), (32, 4096)])
def test_buckets_are_the_definition(buckets: int, longest: int, bidirectional: bool) -> None:
    options = {"buckets": buckets, "max_distance": longest, "bidirectional": bidirectional}
    offsets = [*range(-400, 401), -5000, 5000]
    want = [naive_t5_bias.bucket(r, buckets, longest, bidirectional) for r in offsets]
    assert bucket(torch.tensor(offsets), **options).tolist() == want


@pytest.mark.parametrize(("case", "causal"), [("a", False), ("b", True)])
def test_transformers_numbers(case: str, causal: bool) -> None:
    """T5Attention of transformers, with padding (a) and causal (b)."""
    z = {
        k.removeprefix(f"{case}_"): torch.tensor(v) for k, v in vectors("S-t5bias").items() if k.startswith(case + "_")
    }
    part = T5Bias(6, 2, causal, buckets=8, max_distance=6)
    layer = regard.Attention(6, 2, scale=1.0, position=part).double()
    theirs = {ours: z[f"{name}.weight"] for ours, name in NAMES.items()}
    layer.load_state_dict({n if "." in n else f"{n}.weight": w for n, w in theirs.items()})
    x = z["x"].requires_grad_()
    i = torch.arange(9)
    assert torch.equal(bucket(i - i[:, None], buckets=8, max_distance=6, bidirectional=not causal), z["bucket"])
    q = torch.zeros(1, 2, 9, 3, dtype=torch.float64)
    close(part.bias(rows(q, q))[0], z["bias"])
    out = layer(x, mask=z["allow"][:, None])
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    close(part.table.grad, z["gbias"])


@pytest.mark.parametrize("way", ["bidirectional", "causal"])
def test_transformers_buckets(way: str) -> None:
    z = vectors("S-t5bias")
    got = bucket(torch.tensor(z["bucket_relative_position"]), bidirectional=way == "bidirectional")
    assert torch.equal(got, torch.tensor(z[f"bucket32_{way}"]))


def test_each_side_has_its_buckets() -> None:
    """0 is on the side of the past; from L on all distances share the last; in one direction the future is at 0."""
    far = torch.tensor([-(10**6), -128, -8, -1, 0, 1, 8, 128, 10**6])
    assert bucket(far).tolist() == [15, 15, 8, 1, 0, 17, 24, 31, 31]
    assert bucket(far, bidirectional=False).tolist() == [31, 31, 8, 1, 0, 0, 0, 0, 0]
    wide = bucket(torch.arange(-5000, 5000))
    assert torch.equal(wide.unique(), torch.cat([torch.arange(16), torch.arange(17, 32)])), "no near 0 of the future"


def test_near_keys_have_a_number_each() -> None:
    """Up to e the bias is any function of the offset, as a table of all offsets is."""
    part = T5Bias(8, 3, buckets=32).double()
    q = torch.zeros(1, 3, 8, 4, dtype=torch.float64)
    bias = part.bias(rows(q, q))[0].detach()
    offsets = torch.arange(8) - torch.arange(8)[:, None]
    values = [bias[:, offsets == r] for r in range(-7, 8)]
    assert all(torch.equal(v, v[:, :1].expand_as(v)) for v in values), "one number an offset"
    assert len({float(v[0, 0]) for v in values}) == 15, "and another for each"


def test_beyond_the_largest_distance_nothing_changes() -> None:
    part = T5Bias(8, 3, buckets=8, max_distance=6)
    q, k = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 100, 4)
    bias = part.bias(rows(q, k))[0, :, 0]
    assert torch.equal(bias[:, :94], bias[:, :1].expand(3, 94))
    assert not torch.equal(bias[:, 93], bias[:, 99])


def test_a_fixed_look_back_learned_short_holds_at_length() -> None:
    """Each token must give the one three before it: trained at 24 tokens, where all buckets occur, tried at 400."""
    torch.manual_seed(0)
    part = T5Bias(8, 1, True, buckets=12, max_distance=16)
    optimizer = torch.optim.Adam(part.parameters(), 0.5)

    def off(length: int) -> Tensor:
        q, v = torch.zeros(1, 1, length, 4, requires_grad=True), torch.randn(1, 1, length, 6)
        got = regard.attention(q, q, v, mask=masks.causal(), position=part, kernel="eager")
        return (got[:, :, 3:] - v[:, :, :-3]).square().mean()

    for _ in range(60):
        optimizer.zero_grad()
        off(24).backward()
        optimizer.step()
    assert off(400) < 1e-3


def test_no_number_is_plain_attention() -> None:
    layer = regard.create("t5_bias", dim=12, num_heads=3)
    plain = regard.Attention(12, 3)
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "position.table"})
    x = torch.randn(1, 7, 12)
    assert (layer(x) - plain(x)).abs().max() > 1e-3
    assert layer.position.start_neutral()
    torch.testing.assert_close(layer(x), plain(x))


def test_starting_values_and_defaults() -> None:
    part = regard.create("t5_bias", dim=400, num_heads=100).position
    assert part.table.shape == (32, 100)
    assert abs(float(part.table.detach().std()) - 0.05) < 0.003
    assert (part.max_distance, part.bidirectional) == (128, True)
    assert not regard.create("t5_bias", dim=8, num_heads=2, causal=True).position.bidirectional


def test_layers_share_a_table_as_the_paper_has_it() -> None:
    one, two = (regard.create("t5_bias", dim=8, num_heads=2) for _ in range(2))
    assert one.position.table is not two.position.table
    regard.share(one, two)
    assert one.position.table is two.position.table


def test_sizes_that_leave_no_bucket_are_refused() -> None:
    for options, words in [
        ({"buckets": 2}, r"T5Bias: buckets is too small \(got 2\); expected an int >= 4"),
        ({"buckets": 7}, r"T5Bias: buckets is odd \(got 7\); expected an even number, half of it for each side"),
        ({"buckets": 1, "bidirectional": False}, r"T5Bias: buckets is too small \(got 1\); expected an int >= 2"),
        (
            {"max_distance": 8},
            r"T5Bias: max_distance is no farther than the near ones of buckets = 32 \(got 8\); .* > 8",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            T5Bias(8, 2, **options)
    with pytest.raises(TypeError, match=r"T5Bias: bidirectional has the wrong type \(got 1\)"):
        T5Bias(8, 2, bidirectional=1)
    with pytest.raises(ValueError, match=r"bucket: max_distance is no farther .* \(got 4\); expected an int > 4"):
        bucket(torch.arange(3), buckets=16, max_distance=4)
    q = torch.zeros(1, 3, 5, 4)
    with pytest.raises(ValueError, match=r"T5Bias: q has the wrong shape \(got \(1, 3, 5, 4\)\); expected \(B, H = 2"):
        T5Bias(8, 2).bias(rows(q, q))

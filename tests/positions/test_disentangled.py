"""Disentangled attention against loops, whose author saw the equations alone, and transformers' numbers (S-deberta)."""

import pytest
import torch
from torch import Tensor, nn

import regard
from positions import naive_disentangled
from positions.naive import close, rows, vectors
from regard import masks
from regard.positions.disentangled import Disentangled, Placed, log_bucket, place_terms

TERMS = {"both": ("c2p", "p2c"), "c2p": ("c2p",), "p2c": ("p2c",)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for n, p in enumerate(module.parameters()):
            p.copy_(0.7 * normal(10 + n, *p.shape))
    return module


def naive(layer: regard.Attention, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The loops with the layer's parameters."""
    part: Disentangled = layer.position
    maps = [getattr(getattr(layer, f"{n}_proj"), kind) for n in "qkv" for kind in ("weight", "bias")]
    own = {}
    if not part.share:
        held = {"pos_q": part.query_map, "pos_k": part.key_map}
        own = {n: (part.table.new_zeros(6, 6), part.table.new_zeros(6)) for n in held}  # of a term that is not asked
        own |= {n: (m.weight, m.bias) for n, m in held.items() if m is not None}
    longest = None if part.buckets is None else part.span
    options = {"keep": keep, "buckets": part.buckets, "max_distance": longest, "terms": TERMS[part.terms]}
    out, _ = naive_disentangled.disentangled(x, part.table, layer.num_heads, *maps, **own, **options)
    return layer.o_proj(out)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("span", "buckets"), [(3, None), (20, None), (16, 4), (6, 2)])
def test_the_layer_is_the_definition(span: int, buckets: int | None, terms: str, share: bool) -> None:
    options = {"span": span, "buckets": buckets, "terms": terms, "share": share}
    layer = filled(regard.create("disentangled", dim=6, num_heads=2, bias=True, dtype=torch.float64, **options))
    x = normal(1, 2, 7, 6).requires_grad_()
    keep = torch.arange(7) < torch.tensor([[7], [5]])
    got = layer(x, mask=masks.padding(keep))[keep]
    want = naive(layer, x, keep)[keep]
    close(got, want)
    of = [x, *layer.parameters()]
    g = normal(2, *got.shape)
    mine, theirs = (torch.autograd.grad((z * g).sum(), of) for z in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize(("case", "buckets"), [("a", None), ("b", 4)])
def test_transformers_numbers(case: str, buckets: int | None) -> None:
    """DisentangledSelfAttention of DeBERTa v2: own maps (a); shared ones and buckets (b)."""
    z = {k.removeprefix(f"{case}_"): torch.tensor(v) for k, v in vectors("S-deberta").items() if k.startswith(case)}
    part = Disentangled(6, 2, span=5 if buckets is None else 16, buckets=buckets, share=buckets is not None)
    layer = regard.Attention(6, 2, bias=True, position=part).double()
    names = {"q_proj": "query_proj", "k_proj": "key_proj", "v_proj": "value_proj"}
    if not part.share:
        names |= {"position.key_map": "pos_key_proj", "position.query_map": "pos_query_proj"}
    state = {f"{ours}.{kind}": z[f"{their}.{kind}"] for ours, their in names.items() for kind in ("weight", "bias")}
    layer.load_state_dict(state | {"position.table": z["rel"]}, strict=False)
    layer.o_proj = nn.Identity()
    x, keep = z["x"].requires_grad_(), z["keep"]
    out = layer(x, mask=(keep[:, :, None] & keep[:, None])[:, None])
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    close(part.table.grad, z["grel"])


@pytest.mark.parametrize(("buckets", "span"), [(2, 4), (4, 16), (8, 30), (256, 512), (128, 2000)])
def test_buckets_are_the_definition(buckets: int, span: int) -> None:
    offsets = [*range(-700, 701), -5000, 5000]
    want = [naive_disentangled.log_bucket(r, buckets, span) for r in offsets]
    assert log_bucket(torch.tensor(offsets), buckets, span).tolist() == want


@pytest.mark.slow
def test_transformers_buckets() -> None:
    """As its models have them, 256 up to 512, in float32."""
    theirs = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    offsets = torch.arange(-1000, 1001)
    want = theirs.make_log_bucket_position(offsets, 256, 512).long()
    assert torch.equal(log_bucket(offsets, 256, 512), want)


def test_the_last_row_is_for_two_offsets() -> None:
    """-span has a row of its own; +span shares that of span - 1."""
    q = torch.zeros(1, 1, 1, 4)
    part = Disentangled(4, 1, span=3)
    told = rows(q, torch.zeros(1, 1, 11, 4), i=torch.tensor([5]))
    assert part.index(told).tolist() == [[5, 5, 5, 5, 4, 3, 2, 1, 0, 0, 0]]


def test_a_table_of_zeros_is_softmax_at_a_third_of_the_scale() -> None:
    """Divided by sqrt(3 D), or sqrt(2 D) with one term."""
    for terms, parts in (("both", 3), ("p2c", 2)):
        layer = regard.create("disentangled", dim=12, num_heads=3, terms=terms, dtype=torch.float64)
        nn.init.zeros_(layer.position.table)
        plain = regard.Attention(12, 3, scale=(parts * 4) ** -0.5, dtype=torch.float64)
        plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "position.table"})
        x = normal(1, 2, 9, 12)
        close(layer(x), plain(x))


def test_a_key_may_say_from_where_it_is_seen() -> None:
    """Tokens of kind A are wanted right behind, those of kind B right before. The queries say nothing: k_j . Q alone
    can tell, as no term of the query's content and the offset can."""
    layer = regard.create("disentangled", dim=9, num_heads=1, span=3, share=False, dtype=torch.float64)
    after, before = torch.eye(9, dtype=torch.float64)[:2]
    with torch.no_grad():
        layer.q_proj.weight.zero_()
        for projection in (layer.k_proj, layer.v_proj, layer.o_proj):
            nn.init.eye_(projection.weight)
        part = layer.position
        part.key_map.weight.zero_()
        part.query_map.weight.copy_(100 * torch.eye(9))
        part.table.zero_()
        part.table[3 + 1] = after  # i - j = 1: the query stands right behind
        part.table[3 - 1] = before
    x = torch.stack([after, before, before, after, after, before, after])
    x[:, 2:] = torch.eye(7)
    weights = layer(x[None])[0, :, 2:]
    for i in range(7):
        wanted = [j for j, kind in ((i - 1, 0), (i + 1, 1)) if 0 <= j < 7 and x[j, kind] == 1]
        if wanted:
            assert weights[i, wanted].sum() > 0.99, i


def test_terms_of_places_are_lookups() -> None:
    q, k, placed = normal(1, 2, 3, 4, 5), normal(2, 2, 3, 6, 5), Placed(normal(3, 3, 8, 5), normal(4, 3, 8, 5))
    index = torch.randint(8, (4, 6), generator=torch.Generator().manual_seed(5))
    want = torch.einsum("bhid,hijd->bhij", q, placed.keys[:, index])
    want = want + torch.einsum("bhjd,hijd->bhij", k, placed.queries[:, index])
    close(place_terms(q, k, placed, index), want)


def test_starting_values_and_defaults() -> None:
    part = regard.create("disentangled", dim=100, num_heads=5, num_kv_heads=1, share=False).position
    assert part.table.shape == (1024, 100)
    assert part.key_map.weight.shape == (20, 100)
    assert part.query_map.weight.shape == (100, 100)
    assert abs(float(part.table.detach().std()) - 0.02) < 0.001
    assert abs(float(part.query_map.weight.detach().std()) - 0.02) < 0.001
    assert not part.query_map.bias.any()
    assert regard.create("disentangled", dim=8, num_heads=2, buckets=256).position.table.shape == (512, 8)
    one, two = (regard.create("disentangled", dim=8, num_heads=2) for _ in range(2))
    regard.share(one, two)
    assert one.position.table is two.position.table


def test_what_is_refused() -> None:
    for options, words in [
        ({"span": 0}, r"Disentangled: span is too small \(got 0\); expected an int >= 1"),
        ({"buckets": 7}, r"Disentangled: buckets is odd \(got 7\); expected an even number"),
        ({"buckets": 8, "span": 5}, r"Disentangled: span is no farther than buckets = 8 tell apart \(got 5\); .* > 5"),
        ({"terms": "p2p"}, r"Disentangled: terms is unknown \(got 'p2p'\); expected one of 'both', 'c2p', 'p2c'"),
    ]:
        with pytest.raises(ValueError, match=words):
            Disentangled(8, 2, **options)
    q = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"Disentangled: rows holds nothing made of the tokens"):
        Disentangled(8, 2).bias(rows(q, q))
    with pytest.raises(ValueError, match=r"Disentangled: q has the wrong shape \(got \(1, 2, 5, 4\)\); .*\(B, H = 4"):
        Disentangled(16, 4).bias(rows(q, q))

"""Biaffine attention against loops whose author saw the equations only, trees against trying all, supar's numbers."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from recurrent import naive_biaffine as naive
from regard.laws.agreement import close
from regard.recurrent.arborescence import is_tree, maximum_spanning_arborescence
from regard.recurrent.biaffine import Biaffine, BiaffineArcs, biaffine, biaffine_rank_one
from regard.recurrent.biaffine_labels import BiaffineLabels, arc_label_loss
from regard.recurrent.biaffine_parser import BiaffineParser

VECTORS = Path(__file__).parents[1] / "vectors" / "biaffine.npz"


def vectors() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k: torch.from_numpy(file[k]) for k in file}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(layer: nn.Module, z: dict[str, Tensor], names: dict[str, str]) -> Any:
    """The layer with these numbers as its parameters."""
    layer.double().load_state_dict({own: z[f"p_{given}"] for own, given in names.items()})
    return layer


def sides(d: str, h: str) -> dict[str, str]:
    return {
        f"{own}_proj.{kind}": f"{name}.linear.{kind}"
        for own, name in (("q", d), ("k", h))
        for kind in ("weight", "bias")
    }


def test_gives_the_librarys_numbers() -> None:
    z = vectors()
    arcs = filled(BiaffineArcs(7, arc_dim=5), z, {**sides("arc_mlp_d", "arc_mlp_h"), "arc.weight": "arc.weight"})
    labels = filled(
        BiaffineLabels(7, 3, label_dim=4), z, {**sides("rel_mlp_d", "rel_mlp_h"), "label.weight": "rel.weight"}
    )
    x = z["x"].requires_grad_()
    for got, names in ((arcs.sides(x, x), ("arc_d", "arc_h")), (labels.sides(x, x), ("rel_d", "rel_h"))):
        for one, name in zip(got, names, strict=True):
            close(one, z[name])
    close(arcs.scores(x), z["s_arc"])
    close(labels(x), z["s_rel"])
    out = arcs(x, mask=z["keep"])
    masked = z["s_arc"].masked_fill(~z["keep"][:, None], -torch.inf)
    close(out.exp(), masked.softmax(-1))
    loss = arc_label_loss(out, labels(x), z["heads"].long(), z["labels"].long(), z["token_mask"])
    close(loss, z["loss"])
    close(arc_label_loss(masked, z["s_rel"], z["heads"].long(), z["labels"].long(), z["token_mask"]), z["loss"])
    wanted = {"grad_x": x, "grad_arc.weight": arcs.arc.weight, "grad_rel.weight": labels.label.weight}
    wanted["grad_arc_mlp_h.linear.weight"] = arcs.k_proj.weight
    for got, name in zip(torch.autograd.grad(loss, tuple(wanted.values())), wanted, strict=True):
        close(got, z[name])
    for scores in (out, masked):
        assert maximum_spanning_arborescence(scores, z["keep"]).tolist() == z["mst"].tolist()


def test_gives_the_librarys_numbers_for_other_forms() -> None:
    z = vectors()
    scaled = filled(Biaffine(5, 5, bias_x=False, scale=0.5), z, {"weight": "scaled.weight"})
    close(scaled(z["arc_d"], z["arc_h"])[:, 0], z["scaled_out"])
    ranked = filled(Biaffine(4, 4, 3, rank_one=True), z, {"weight": "dec.weight.0", "right": "dec.weight.1"})
    close(ranked(z["rel_d"], z["rel_h"]), z["dec_out"])
    names = {**sides("proj.mlp_x", "proj.mlp_y"), "label.weight": "proj.weight"}
    close(filled(BiaffineLabels(7, 2, label_dim=4), z, names)(z["x"]).movedim(-1, 1), z["proj_out"])


def test_trees_are_the_librarys() -> None:
    z = vectors()
    before = z["mst_scores"].clone()
    assert maximum_spanning_arborescence(z["mst_scores"]).tolist() == z["mst_trees"].tolist()
    many = maximum_spanning_arborescence(z["mst_scores"], single_root=False)
    assert many.tolist() == z["mst_trees_multiroot"].tolist()
    assert torch.equal(before, z["mst_scores"])


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    weights = normal(99, *out.shape)
    return list(torch.autograd.grad((out * weights).sum(), leaves))


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize(("bias_x", "bias_y"), [(True, True), (True, False), (False, True), (False, False)])
def test_equals_the_loops(bias_x: bool, bias_y: bool, scale: float) -> None:
    x, y = normal(1, 2, 3, 4).requires_grad_(), normal(2, 2, 5, 3).requires_grad_()
    bias = {"bias_x": bias_x, "bias_y": bias_y}
    weight = normal(3, 2, 4 + bias_x, 3 + bias_y).requires_grad_()
    got, want = biaffine(x, y, weight, **bias, scale=scale), naive.biaffine(x, y, weight, **bias, scale=scale)
    close(got, want)
    for one, other in zip(gradients(got, x, y, weight), gradients(want, x, y, weight), strict=True):
        close(one, other)
    left, right = normal(4, 2, 4 + bias_x).requires_grad_(), normal(5, 2, 3 + bias_y).requires_grad_()
    got, want = biaffine_rank_one(x, y, left, right, **bias), naive.biaffine_low_rank(x, y, left, right, **bias)
    close(got, want)
    for one, other in zip(gradients(got, x, y, left, right), gradients(want, x, y, left, right), strict=True):
        close(one, other)
    whole = left[:, :, None] * right[:, None]
    close(biaffine_rank_one(x, y, left, right, **bias, scale=scale), biaffine(x, y, whole, **bias, scale=scale))


def layer(**options: Any) -> BiaffineArcs:
    made = regard.create("biaffine", dim=6, num_heads=2, arc_dim=5, **options).double()
    for n, p in enumerate(made.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(n))
    return made


def test_the_layer_equals_the_loops() -> None:
    made, x = layer(), normal(1, 2, 5, 6)
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    weights = [(p.weight, p.bias) for p in (made.q_proj, made.k_proj)]
    d, h = (naive.mlp(x, *w) for w in weights)
    want = naive.arc_scores(d, h, made.arc.weight, keep).log_softmax(-1)
    for mask in (keep, keep[:, None, None], regard.masks.padding(keep)):
        got = made(x, mask=mask)
        close(got.exp(), want.exp())
        assert ((got == -torch.inf) == ~keep[:, None]).all()
    other = normal(2, 2, 3, 6)
    close(made.scores(x, other), naive.arc_scores(d, naive.mlp(other, *weights[1]), made.arc.weight))
    labels = BiaffineLabels(6, 3, label_dim=4).double()
    for n, p in enumerate(labels.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(n + 9))
    d, h = (naive.mlp(x, p.weight, p.bias) for p in (labels.q_proj, labels.k_proj))
    close(labels(x), naive.label_scores(d, h, labels.label.weight))


def test_options_of_size_and_scale() -> None:
    made = layer(context_dim=4, scale=0.5)
    x, context = normal(1, 2, 3, 6), normal(2, 2, 7, 4)
    assert made(x, context).shape == (2, 3, 7)
    d, h = made.sides(x, context)
    close(made.scores(x, context), naive.biaffine(d, h, made.arc.weight, True, False, 0.5)[:, 0])


def test_loss_equals_the_loops() -> None:
    arcs, labels = normal(1, 2, 4, 4).requires_grad_(), normal(2, 2, 4, 4, 3).requires_grad_()
    heads, kinds = torch.tensor([[0, 2, 0, 1], [0, 0, 1, 3]]), torch.tensor([[0, 2, 1, 1], [2, 0, 1, 0]])
    mask = torch.tensor([[False, True, True, True], [False, True, True, False]])
    got, want = (f(arcs, labels, heads, kinds, mask) for f in (arc_label_loss, naive.arc_label_loss))
    close(got, want)
    for one, other in zip(*(torch.autograd.grad(z, (arcs, labels)) for z in (got, want)), strict=True):
        close(one, other)
    assert float(arc_label_loss(arcs, labels, heads, kinds, mask & False).detach()) == 0


@pytest.mark.parametrize("single_root", [True, False])
@pytest.mark.parametrize("T", [2, 3, 4, 5, 6])
def test_trees_are_the_best_of_all(T: int, single_root: bool) -> None:
    scores, full = 3 * normal(T, 25, T, T), torch.ones(25, T, dtype=torch.bool)
    scores[::2, :, 0] += 4  # where many would hang from the root
    got = maximum_spanning_arborescence(scores, single_root=single_root)
    assert got.tolist() == naive.maximum_spanning_arborescence(scores, full, single_root).tolist()
    assert got.tolist() == [naive.decode(s, T, single_root) for s in scores]
    assert all(is_tree(heads, single_root) for heads in got.tolist())


def test_trees_of_seven_tokens_and_of_padded_sentences() -> None:
    scores, lengths = 2 * normal(0, 5, 7, 7), [7, 1, 4, 0, 6]
    scores[..., 0] += 3
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    scores[~keep] = torch.nan
    scores.mT[~keep] = torch.inf
    want = [naive.best_tree(s, n) if n > 1 else [0] * 7 for s, n in zip(scores, lengths, strict=True)]
    assert maximum_spanning_arborescence(scores, keep).tolist() == want
    assert maximum_spanning_arborescence(scores.float(), keep).tolist() == want


def test_tokens_in_between_may_be_hidden_and_arcs_forbidden() -> None:
    scores = normal(3, 1, 6, 6)
    keep = torch.tensor([[True, True, False, True, False, True]])
    at = [0, 1, 3, 5]
    want = naive.best_tree(scores[0][at][:, at], 4)
    got = maximum_spanning_arborescence(scores, keep)[0]
    assert [got[i].item() for i in at] == [at[j] for j in want]
    assert not got[[2, 4]].any()
    chain = torch.full((1, 4, 4), -torch.inf)
    chain[0, [1, 2, 3], [0, 1, 2]] = -5.0
    assert maximum_spanning_arborescence(chain).tolist() == [[0, 0, 1, 2]]


def test_is_tree_as_the_loops() -> None:
    for heads in np.ndindex(4, 4, 4):
        for single_root in (True, False):
            given = [0, *map(int, heads)]
            assert is_tree(given, single_root) == naive.is_tree(given, single_root)


def test_a_token_is_a_head_whoever_asks() -> None:
    """All heads are alike at the start; of the extended side's row alone comes a prior, the same in all rows."""
    made, x = regard.create("biaffine", dim=6, num_heads=2, arc_dim=5).double(), normal(1, 2, 5, 6)
    close(made(x, x).exp(), torch.full((2, 5, 5), 0.2, dtype=torch.float64))
    with torch.no_grad():
        made.arc.weight[0, -1] = normal(2, 5)
    _, h = made.sides(x, x)
    prior = (h @ made.arc.weight[0, -1]).log_softmax(-1)
    close(made(x, x), prior[:, None].expand(-1, 5, -1))
    assert prior.std() > 0.1


def test_starting_values() -> None:
    made = regard.create("biaffine", dim=24, num_heads=2)
    assert (made.q_proj.out_features, made.dropout, made.arc.scale) == (500, 0.0, 0.0)
    for w in (made.q_proj.weight, made.k_proj.weight):
        assert (w.T @ w - torch.eye(24)).abs().max() < 1e-5, "orthogonal"
    assert made.arc.weight.shape == (1, 501, 500)
    assert not any(z.any() for z in (made.q_proj.bias, made.k_proj.bias, made.arc.weight))
    labels = BiaffineLabels(24, 3)
    assert labels.label.weight.shape == (3, 101, 101)
    assert not labels.label.weight.any()
    ranked = BiaffineLabels(24, 3, rank_one=True)
    assert not ranked.label.weight.any()
    ranked(torch.randn(1, 4, 24)).sum().backward()
    assert ranked.label.weight.grad.any(), "it starts"


def test_dropout_is_the_same_at_all_times() -> None:
    made = layer(dropout=0.5).train()
    x = torch.ones(50, 1, 6, dtype=torch.float64).expand(-1, 4, -1)
    d, h = made.sides(x, x)
    for z in (d, h):
        assert torch.equal(z, z[:, :1].expand_as(z))
        assert 0.35 < float((z[:, 0] == 0).double().mean()) < 0.65
    assert not torch.equal(d[0, 0], d[1, 0])
    assert ((d == 0) != (h == 0)).any()
    close(made.eval().sides(x, x)[0][d != 0] * 2, d[d != 0])


def test_hidden_tokens_cannot_poison_and_nan_is_told() -> None:
    made, x = layer(), normal(4, 2, 5, 6)
    keep = (torch.arange(5) < 3).expand(2, 5)
    bad = x.clone()
    bad[:, 3:] = torch.nan
    got = made(bad, mask=keep)
    close(got[:, :3, :3], made(x[:, :3]))
    assert (got[..., 3:] == -torch.inf).all()
    assert (made(x, mask=torch.zeros(2, 5, dtype=torch.bool)) == -torch.inf).all()
    x[0, 1, 0] = torch.inf
    got = made(x).isnan()
    assert got[0].all()
    assert not got[1].any()


def sentences(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words of 4 classes; the head is the nearest earlier word of the class after one's own, else the root."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 8, (count, 8), generator=generator)
    words[:, 0] = 0
    heads = torch.zeros_like(words)
    for b in range(count):
        for i in range(1, 8):
            for j in range(1, i):
                if words[b, j] % 4 == (words[b, i] + 1) % 4:
                    heads[b, i] = j
    return words, heads, (words + heads) % 2


def test_the_parser_learns_trees() -> None:
    torch.manual_seed(0)
    model = BiaffineParser(8, 2, 2, dim=16, hidden=32, depth=1, arc_dim=32, label_dim=8, dropout=0.0)
    (words, heads, kinds), tags = sentences(32, 1), torch.zeros(32, 8, dtype=torch.long)
    held, right, _ = sentences(64, 2)
    guess = model(held, torch.zeros_like(held))[0].exp()
    assert (guess - 1 / 8).abs().max() < 1e-6
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.9), eps=1e-12)
    for step in range(80):
        words, heads, kinds = sentences(32, 10 + step % 30)
        loss = model.loss(words, tags, heads, kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    arcs, _ = model(held, torch.zeros_like(held))
    assert float((arcs.argmax(-1) == right)[:, 1:].float().mean()) > 0.9
    found, _ = model.parse(held[:8], torch.zeros_like(held[:8]))
    assert all(is_tree(row) for row in found.tolist()), "with a single root each"


def test_the_parser_is_as_written_and_pads() -> None:
    model = BiaffineParser(9, 4, 3)
    assert [tuple(r.weight_ih_l0.shape) for r in model.encoder] == [(1600, 200), (1600, 800), (1600, 800)]
    assert (model.dropout, model.arcs.dropout, model.labels.dropout) == (0.33, 0.33, 0.33)
    assert (model.arcs.q_proj.out_features, model.labels.q_proj.out_features) == (500, 100)
    model = BiaffineParser(9, 4, 3, dim=4, hidden=5, depth=2, arc_dim=6, label_dim=3).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    generator = torch.Generator().manual_seed(0)
    words, tags = (torch.randint(n, (2, 6), generator=generator) for n in (9, 4))
    keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    arcs, labels = model(words, tags, keep)
    short = model(words[1:, :4], tags[1:, :4])
    close(arcs[1, :4, :4], short[0][0])
    close(labels[1, :4, :4], short[1][0])
    heads, kinds = model.parse(words, tags, keep)
    assert heads.tolist() == naive.maximum_spanning_arborescence(arcs, keep).tolist()
    assert kinds.tolist() == naive.label_choice(labels, heads).tolist()
    assert not torch.equal(model.train()(words, tags)[0], model(words, tags)[0])
    words[:, 1:] = 3
    tags[:] = 1
    assert model.loss(words, tags, heads, kinds, keep).isfinite()
    with pytest.raises(ValueError, match="keep has holes"):
        model(words, tags, ~keep)


def test_without_networkx(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == "networkx":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="needs networkx: pip install networkx"):
        maximum_spanning_arborescence(torch.tensor([[[0.0, 0, 0], [0, 0, 1], [0, 1, 0]]]))


def test_refuses() -> None:
    x, eye = torch.zeros(2, 3, 6), torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match=r"weight has the wrong shape \(got \(1, 6, 6\)\); expected \(O, 7, 7\)"):
        biaffine(x, x, torch.zeros(1, 6, 6))
    with pytest.raises(ValueError, match=r"right has the wrong shape \(got \(1, 6\)\); expected \(1, 7\)"):
        biaffine_rank_one(x, x, torch.zeros(1, 7), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="y does not go with x"):
        biaffine(x, x[:1], torch.zeros(1, 7, 7))
    with pytest.raises(ValueError, match="arc_dim is too small"):
        BiaffineArcs(6, arc_dim=0)
    with pytest.raises(ValueError, match="dropout is out of range"):
        BiaffineArcs(6, dropout=1.5)
    with pytest.raises(ValueError, match="num_labels is too small"):
        BiaffineLabels(6, 0)
    with pytest.raises(ValueError, match=r"x has the wrong shape"):
        BiaffineArcs(6)(x[..., :5])
    with pytest.raises(ValueError, match="mask can only hide keys"):
        BiaffineArcs(6)(x, mask=regard.masks.causal())
    with pytest.raises(ValueError, match="causal"):
        regard.create("biaffine", dim=6, num_heads=2, causal=True)
    mask, at = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"heads is out of range \(got 3 to 3\); expected 0 to 2"):
        arc_label_loss(eye, torch.zeros(1, 3, 3, 2), at + 3, at, mask)
    with pytest.raises(ValueError, match="kinds is out of range"):
        arc_label_loss(eye, torch.zeros(1, 3, 3, 2), at, at + 2, mask)
    with pytest.raises(ValueError, match="keep hides the root of row 0"):
        maximum_spanning_arborescence(eye, torch.tensor([[False, True, True]]))
    with pytest.raises(ValueError, match="scores holds what can't be compared in row 0"):
        maximum_spanning_arborescence(eye + torch.nan)
    with pytest.raises(ValueError, match="scores allow no tree"):
        maximum_spanning_arborescence(eye - torch.inf)
    star = torch.full((1, 3, 3), -torch.inf)
    star[..., 0] = 0.0
    assert maximum_spanning_arborescence(star, single_root=False).tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="allows no tree with a single root"):
        maximum_spanning_arborescence(star)

"""Packed documents in layers: how they are run, where positions stand, and what is refused."""

import importlib
import itertools

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.laws.agreement import close, same
from regard.masks.tensors import unpacked
from regard.pipeline.tokens import apart

CU = torch.tensor([0, 3, 3, 4, 9, 15], dtype=torch.int32)
shared = importlib.import_module("regard.linear._shared")


def tokens(T: int = 17, batch: int = 2) -> Tensor:
    return torch.randn(batch, T, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Heard(nn.Module):
    """Adds to each token the sum of the real ones of its row, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, *, mask: masks.Mask | None = None) -> Tensor:
        self.shapes.append(tuple(x.shape[:2]))
        T = x.shape[1]
        keep = (
            torch.ones(1, T, dtype=torch.bool) if mask is None else mask.at(torch.arange(1), torch.arange(T))[:, 0, 0]
        )
        return x + (x * keep[..., None]).sum(1, keepdim=True)


def test_documents_run_in_batches_of_like_lengths() -> None:
    """Two rows of documents of 3, 0, 1, 5 and 6 tokens, and 2 behind them."""
    layer, x = Heard(), tokens()
    packed, _ = unpacked(masks.packed(CU))
    out = apart(layer, x, packed, None)
    assert sorted(layer.shapes) == [(2, 1), (2, 3), (4, 6)]
    for a, b in itertools.pairwise(CU.tolist()):
        close(out[:, a:b], x[:, a:b] + x[:, a:b].sum(1, keepdim=True), f"document at {a}")
    same(out[:, 15:], torch.zeros_like(out[:, 15:]), "behind the last document")


def test_at_most_half_of_what_is_run_is_padding() -> None:
    layer, lengths = Heard(), torch.tensor([1, 100, 2, 33, 64, 65, 7, 1, 50])
    packed, _ = unpacked(masks.packed(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])))
    apart(layer, tokens(int(lengths.sum()), 1), packed, None)
    assert sum(n * T for n, T in layer.shapes) < 2 * int(lengths.sum())


def test_no_document_at_all() -> None:
    x = tokens().requires_grad_()
    for name in ("linear", "mega", "softmax"):
        layer = regard.create(name, dim=16, num_heads=2, dtype=torch.float64)
        (grad,) = torch.autograd.grad(layer(x, mask=masks.packed(torch.tensor([0, 0]))).sum(), x, allow_unused=True)
        assert grad is None or not grad.any(), name


def test_a_causal_recurrence_runs_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, scan = [], shared.linear_scan

    def counted(q: Tensor, *given: Tensor, **options: Tensor):
        lengths.append(q.shape[2])
        return scan(q, *given, **options)

    monkeypatch.setattr(shared, "linear_scan", counted)
    layer = regard.create("linear", dim=16, num_heads=2, causal=True, dtype=torch.float64)
    layer(tokens(), mask=masks.packed(CU))
    assert lengths == [17]


def test_positions_start_again_where_they_are_told_no_others() -> None:
    layer, x = regard.create("learned", dim=16, num_heads=2, dtype=torch.float64), tokens(15)
    own = masks.packed(CU)
    want = layer(x, mask=own, positions=own.positions)
    same(layer(x, mask=own), want, "by themselves")
    on = layer(x, mask=own, positions=torch.arange(15))
    assert not torch.allclose(on[:, 3:], want[:, 3:])
    close(layer(x, mask=masks.documents(own.ids)), on, "documents by their ids, which may lie anywhere")


def test_refusals() -> None:
    x, packed = tokens(), masks.packed(CU)
    linear = regard.create("linear", dim=16, num_heads=2, dtype=torch.float64)
    with pytest.raises(ValueError, match="packs documents of x, not of a context"):
        linear(x, x, mask=packed)
    with pytest.raises(ValueError, match="end behind the last token"):
        linear(x[:, :9], mask=packed)
    with pytest.raises(ValueError, match=r"masks.packed\(cu_seqlens\) for documents that lie end to end"):
        linear(x, mask=masks.documents(torch.zeros(17, dtype=torch.long)))
    with pytest.raises(ValueError, match="can only hide keys"):
        linear(x, mask=packed & masks.causal())
    etc = regard.create("etc", dim=16, num_heads=2, num_global=2, dtype=torch.float64)
    with pytest.raises(ValueError, match="no 'packed' on its card: a row begins with its global tokens"):
        etc(x, mask=packed)
    moba = regard.create("moba", dim=16, num_heads=2, causal=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="can only hide keys"):
        moba(x, mask=packed & masks.window(3))
    with pytest.raises(ValueError, match="which this layer runs one by one"):
        moba.plan(x, mask=packed)

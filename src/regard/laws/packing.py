"""L22: several documents packed into one row are what they are one by one."""

import itertools

import torch
from torch import Tensor

from regard import masks
from regard.laws.agreement import close, run, same
from regard.laws.registry import law
from regard.laws.subject import Subject
from regard.laws.supported import turned_down, unbuilt
from regard.laws.together import grouped, worst

LENGTHS = ((0, 4, 1, 0, 6, 0), (5, 1, 3, 0), (11,), (1, 1, 0, 9), (0, 0))
"""Documents of a row: empty ones first, in the middle and last, one token alone, one that fills the row, none."""
BEHIND = 2
"""Tokens behind the last document of a full row, in none."""


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def spans(lengths: tuple[int, ...]) -> list[slice]:
    """Where in the row the documents stand that hold any token."""
    ends = cumulative(lengths).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends) if b > a]


@law("L22", needs="packed")
def packed_is_one_by_one(s: Subject) -> None:
    """A row of documents, of one token and of none among them, with anything behind the last, has the outputs and
    gradients of the documents one by one."""
    lengths = LENGTHS[0]
    T = sum(lengths) + BEHIND
    inside = torch.arange(T) < sum(lengths)
    x, grad = s.tokens(1, T), s.tokens(1, T, seed=8) * inside[:, None]
    for causal in s.causalities:
        module = s.build(causal=causal)
        want = one_by_one(module, x, grad, lengths)
        given = x.masked_fill(~inside[:, None], worst(s))
        got = run(module, given, grad_out=grad, mask=masks.packed(cumulative(lengths)))
        compared(got, want, inside[None], str(lengths))


@law("L22", needs="packed", weight="heavy")
def packed_rows_of_a_batch(s: Subject) -> None:
    """Each row of a batch may hold other documents, and none."""
    T = sum(LENGTHS[0]) + BEHIND
    inside = torch.arange(T) < torch.tensor([[sum(lengths)] for lengths in LENGTHS])
    x, grad = s.tokens(len(LENGTHS), T), s.tokens(len(LENGTHS), T, seed=8) * inside[..., None]
    mask = masks.packed([cumulative(lengths) for lengths in LENGTHS])
    for causal in s.causalities:
        module = s.build(causal=causal)
        rows = [one_by_one(module, x[n : n + 1], grad[n : n + 1], lengths) for n, lengths in enumerate(LENGTHS)]
        want = {key: torch.cat([row[key] for row in rows]) for key in ("out", "input0")}
        want |= {key: torch.stack([row[key] for row in rows]).sum(0) for key in rows[0].keys() - want.keys()}
        got = run(module, x.masked_fill(~inside[..., None], worst(s)), grad_out=grad, mask=mask)
        compared(got, want, inside, "rows of a batch")


def one_by_one(module: torch.nn.Module, x: Tensor, grad: Tensor, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """What `run` gives for a row, of each document by itself: 0 behind the last, and the sum for each parameter."""
    found = {"out": torch.zeros_like(x), "input0": torch.zeros_like(x)}
    found |= {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.requires_grad}
    for span in spans(lengths):
        for key, value in run(module, x[:, span], grad_out=grad[:, span]).items():
            if key in ("out", "input0"):
                found[key][:, span] = value
            else:
                found[key] += value
    return found


def compared(got: dict[str, Tensor], want: dict[str, Tensor], inside: Tensor, what: str) -> None:
    """What comes out behind the documents is nobody's; what goes in there has no gradient."""
    for key in want:
        pick = inside if key == "out" else ...
        close(got[key][pick], want[key][pick], f"{what}: {key}")


@law("L22", needs="packed")
def documents_do_not_meet(s: Subject) -> None:
    """NaN in one document reaches no other, and changes no bit of them."""
    lengths = (3, 1, 5)
    mask = masks.packed(cumulative(lengths))
    for causal in s.causalities:
        module, x = s.build(causal=causal), s.tokens(length=sum(lengths))
        clean = module(x, mask=mask)
        for span in spans(lengths):
            others = torch.ones(x.shape[1], dtype=torch.bool)
            others[span] = False
            hurt = x.clone()
            hurt[:, span.start] = worst(s)
            same(module(hurt, mask=mask)[:, others], clean[:, others], f"NaN in the document at {span.start}")


@law("L49", needs="packed padding", weight="heavy")
def padding_of_documents(s: Subject) -> None:
    """Hidden tokens of a packed document are hidden as in the document by itself; causality said twice is one; and
    so with fewer key heads."""
    lengths = (3, 5, 1, 3)
    packed, keep = masks.packed(cumulative(lengths)), torch.ones(s.batch, sum(lengths), dtype=torch.bool)
    keep[0, 2], keep[1, 6:8] = False, False
    for causal in s.causalities:
        for options in grouped(s):
            module, x = s.build(causal=causal, **options), s.tokens(length=sum(lengths))
            x = x.masked_fill(~keep[..., None], worst(s))
            mask = packed & masks.padding(keep)
            got = module(x, mask=mask)
            for span in spans(lengths):
                alone = module(x[:, span], mask=masks.padding(keep[:, span]))
                real = keep[:, span]
                close(got[:, span][real], alone[real], f"the document at {span.start}, {options}")
            if causal:
                close(module(x, mask=masks.causal() & mask)[keep], got[keep], f"with causality, {options}")


@law("L0", where=unbuilt("packed"))
def no_packed(s: Subject) -> None:
    """What isn't claimed is refused: documents packed into a row."""
    module = s.build()
    with turned_down(s, "mask", "packed", "argument", what="packed documents"):
        module(s.tokens(), mask=masks.packed(torch.tensor([0, 5, s.length], dtype=torch.int32)))


@law("L0", needs="packed")
def documents_must_fit(s: Subject) -> None:
    """Documents of more tokens than there are, or of more rows than the batch has, are refused."""
    module, x = s.build(), s.tokens()
    for wrong in (masks.packed(cumulative((5, s.length))), masks.packed([cumulative((3,))] * (s.batch + 1))):
        with turned_down(s, "mask", "fit", "behind", "batch", what=repr(wrong)):
            module(x, mask=wrong)

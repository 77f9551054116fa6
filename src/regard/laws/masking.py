"""L5, L7, L8, L9: padding, the ways to write a mask, rows that may see nothing, and NaN."""

import copy
from typing import Any

import torch
from torch import Tensor

from regard import masks
from regard.kernels import KERNELS
from regard.laws.agreement import close, close_all, does_not_apply, hold, run, same, says
from regard.laws.registry import law
from regard.laws.subject import Subject, field_of, moves_freely, pairs, reaches, takes

NAN = float("nan")


def asks(s: Subject, *words: str) -> bool:
    """Whether the function form has such an argument: `regard.attention` has all of them."""
    return s.function is None or s.function.takes(*words) is not None


def keep(lengths: tuple[int, ...], side: str) -> Tensor:
    """(B, T) bool: True at tokens; the pads stand on that side."""
    order, each = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    return order < each if side == "right" else order >= max(lengths) - each


def padded(rows: list[Tensor], kept: Tensor, content: float) -> Tensor:
    """Rows (1, n, M) side by side in (B, T, M), with `content` between."""
    x = rows[0].new_full((*kept.shape, rows[0].shape[2]), content)
    for b, row in enumerate(rows):
        x[b, kept[b]] = row[0]
    return x


def options(module: Any, kept: Tensor) -> dict[str, Any]:
    """The padding mask, and where the tokens stand, for what can be told."""
    told = {"positions": (kept.cumsum(1) - 1).clamp(min=0)} if takes(module, "positions") else {}
    return {"mask": masks.padding(kept), **told}


@law("L5", needs="padding")
def padding_changes_nothing(s: Subject) -> None:
    """Padded differently per row, one not at all, whatever pads hold: outputs and gradients of the unpadded runs."""
    lengths = (max(3, s.length * 3 // 4), max(1, s.length // 3), 2)
    rows = [s.tokens(1, n, seed=20 + n) for n in lengths]
    grads = [s.tokens(1, n, seed=40 + n) for n in lengths]
    for causal in s.causalities:
        module = s.build(causal=causal)
        alone = [run(module, x, grad_out=g) for x, g in zip(rows, grads, strict=True)]
        for side in ("right", "left") if moves_freely(s, module) else ("right",):
            kept, first = keep(lengths, side), None
            grad_out = padded(grads, kept, 0.0)
            for content in (0.0, 1e4, NAN) if s.nan_safe else (0.0, 1e4):
                got = run(module, padded(rows, kept, content), grad_out=grad_out, **options(module, kept))
                first = first or got
                same(got["out"][kept], first["out"][kept], f"{side} padding with {content}: out")
                pads = got["input0"][~kept]
                same(pads, torch.zeros_like(pads), f"{side} padding with {content}: gradient of pads")
                for b, want in enumerate(alone):
                    close(got["out"][b, kept[b]], want["out"][0], f"{side} padding, row {b}: out")
                    close(got["input0"][b, kept[b]], want["input0"][0], f"{side} padding, row {b}: gradient")
                for key in got.keys() - {"out", "input0"}:
                    total = torch.stack([a[key] for a in alone]).sum(0)
                    close(got[key], total, f"{side} padding with {content}: {key}")


@law("L5", needs="padding", weight="heavy")
def padding_changes_nothing_in_training(s: Subject) -> None:
    """Padding does not count in training either, for outputs, gradients and buffers: no statistic is over pads."""
    lengths = (max(3, s.length * 3 // 4), max(1, s.length // 3), 2)
    rows = [s.tokens(1, n, seed=20 + n) for n in lengths]
    for causal in s.causalities:
        module = s.build(causal=causal).train()

        def trained(x: Tensor, kept: Tensor | None, grad_out: Tensor, module: Any = module) -> dict[str, Tensor]:
            own = copy.deepcopy(module)  # a pass may move buffers
            found = run(own, x, grad_out=grad_out, **({} if kept is None else options(own, kept)))
            return found | {f"buffer {name}": b.clone() for name, b in own.named_buffers() if b.is_floating_point()}

        whole = rows[0]
        one, other = (trained(whole, None, torch.ones_like(whole)) for _ in "12")
        if not torch.equal(one["out"], other["out"]):
            does_not_apply("it draws numbers in training")
        # A batch of rows that are real in places: what the pads hold doesn't count.
        kept = keep(lengths, "right")
        grad_out = padded([torch.ones_like(row) for row in rows], kept, 0.0)
        plain, hurt = (trained(padded(rows, kept, content), kept, grad_out) for content in (0.0, 1e4))
        for key in plain:
            pick = kept if key in ("out", "input0") else ...
            same(hurt[key][pick], plain[key][pick], f"other pads in a batch: {key}")
        # A row by itself: nor does their number, where a statistic over the batch is one over its tokens.
        row, kept = rows[1], keep(lengths, "right")[1:2]
        want = trained(row, None, torch.ones_like(row))
        got = trained(padded([row], kept, 1e4), kept, padded([torch.ones_like(row)], kept, 0.0))
        for key in ("out", "input0"):
            got[key] = got[key][kept][None]
        close_all(got, want)


@law("L7", needs="mask")
def masks_as_values_and_tensors(s: Subject) -> None:
    """A mask as a tensor of bool and as a value of `regard.masks` are one; one that allows everything is none."""
    for causal in s.causalities:
        module, x = s.build(causal=causal), s.tokens()
        pattern, drawn = masks.window(4) | masks.global_tokens(2), pairs(s.batch, s.length)
        close(module(x, mask=pattern), module(x, mask=pattern.dense(s.length)), "window")
        close(module(x, mask=masks.dense(drawn)), module(x, mask=drawn), "pairs")
        everything = torch.ones(1, 1, s.length, s.length, dtype=torch.bool)
        close(module(x, mask=everything), module(x), "all allowed")


@law("L7", function=True, needs="mask", where=lambda s: "" if asks(s, "bias", "attn_bias") else "it takes no bias")
def masks_as_biases(s: Subject) -> None:
    """-inf and finfo.min in a bias mean what False in a mask means, fully masked rows included."""
    f: Any = s.form()
    q, k, v = f.qkv()
    allowed = pairs(s.batch, s.length)
    allowed[0, 0, 3] = False
    want = f(q, k, v, mask=allowed)
    for low in (-torch.inf, torch.finfo(torch.float64).min):
        bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, low)
        close(f(q, k, v, bias=bias), want, f"bias of {low}")
    bias = torch.randn(1, s.heads, s.length, 1).double() + torch.arange(s.length)
    hold(not torch.allclose(f(q, k, v, mask=allowed, bias=bias), want), "a bias changes nothing")


def says_nothing(s: Subject, got: dict[str, Tensor], dead: Tensor) -> None:
    """0 where nothing is seen; of other code, whose output may have a bias, the same whatever the input."""
    out = got["out"][dead]
    want = torch.zeros_like(out) if not s.foreign else out[:1].expand_as(out)
    hold(out.isfinite().all(), "the output of what sees nothing is not finite")
    same(out, want, "the output of what sees nothing")
    for key in got.keys() - {"out"} if not s.foreign else {"input0"}:
        same(got[key], torch.zeros_like(got[key]), f"gradient of {key}")


@law("L8", needs="mask")
def rows_that_see_nothing(s: Subject) -> None:
    """Where a query may see no key at all, the output is exactly 0 (or other code's bias), without gradient."""
    last = s.length - 1
    for causal in s.causalities:
        module, x = s.build(causal=causal), s.tokens()
        allowed, dead = pairs(s.batch, s.length), torch.zeros(s.batch, s.length, dtype=torch.bool)
        allowed[0, :, 3], allowed[1, :, last] = False, False
        dead[0, 3], dead[1, last] = True, True
        got = run(module, x, mask=allowed, grad_out=s.tokens(seed=8) * dead[..., None])
        says_nothing(s, got, dead)
        hold(got["out"][~dead].ne(0).any(-1).all(), "rows that see something are 0")
        for key, found in run(module, x, mask=allowed).items():
            hold(found.isfinite().all(), f"a row that sees nothing makes {key} NaN or infinite")


@law("L8", needs="cross")
def no_keys_at_all(s: Subject) -> None:
    """A context without tokens gives exactly 0 (or other code's bias), without gradient."""
    module, x = s.build(causal=s.crossings[-1]), s.tokens()
    got = run(module, x, s.tokens(length=0))
    says_nothing(s, got, torch.ones(x.shape[:2], dtype=torch.bool))


def hides_nan(s: Subject) -> str:
    return "" if s.nan_safe else "it does not claim to be nan_safe"


@law("L9", function=True, where=hides_nan)
def nan_reaches_what_sees_it(s: Subject) -> None:
    """NaN or inf in one token makes exactly the rows that see it non-finite."""
    nan_reaches(s, ("eager", "auto") if s.is_part else (None,))


@law("L9", function=True, where=hides_nan, pipeline=True, weight="heavy")
def nan_reaches_what_sees_it_on_every_kernel(s: Subject) -> None:
    """On every kernel NaN or inf in one token makes exactly the rows that see it non-finite."""
    nan_reaches(s, tuple(KERNELS))


def nan_reaches(s: Subject, kernels: tuple[str | None, ...]) -> None:
    f: Any = s.form()
    across = any(f.parts[slot].sees != "pair" for slot in f.parts.keys() & {"score_mix", "weight_mix"})
    H, G, T, S = s.heads, f.shape.num_kv_heads, 5, 7
    mask = masks.padding(lengths=torch.tensor([S] + [4] * (s.batch - 1))) if asks(s, "mask", "attn_mask") else None
    cases = {"q": (0, 2, 3), "k": (0, 2, 5), "v": (1, 4, 6)}  # v's is hidden by the padding
    for causal in s.causalities:
        q, k, v = (t.detach() for t in f.qkv(length=T, keys=S))
        own = f.arguments(causal, mask)["mask"]
        allowed = (masks.full() if own is None else own).dense(T, S).expand(s.batch, H, T, S)
        for kernel in kernels:
            for hurt, (b, head, n) in cases.items():
                h = head % H
                for bad in (float("nan"), float("inf")):
                    given = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
                    given[hurt][b, h % given[hurt].shape[1], n, 0] = bad
                    try:
                        out = f(**given, causal=causal, mask=mask, kernel=kernel)
                    except ValueError as error:
                        says(error, "can't run this")
                        continue
                    by = [h] if hurt == "q" else [i for i in range(H) if i // (H // G) == h % G]
                    want = torch.zeros(s.batch, H, T, dtype=torch.bool)
                    for i in range(H) if across else by:
                        if hurt == "q":
                            want[b, i, n] = allowed[b, i, n].any()
                        else:
                            want[b, i] = allowed[b, i, :, n]
                    got = ~out.isfinite().all(-1)
                    hold(torch.equal(got, want), f"{kernel}: {bad} in {hurt} reaches {got.nonzero().tolist()}")


@law("L9")
def nan_tokens(s: Subject) -> None:
    """A NaN token spoils itself and all tokens that see it; where NaN is safe to hide, nobody else."""
    for causal in s.causalities:
        module, x = s.build(causal=causal), s.tokens()
        clean = module(x)
        field = field_of(module, s.length) if hasattr(module, "receptive_field") else reaches(module, x[:1])
        x[0, 4, 0] = NAN
        out = module(x)
        sees = field[:, 4].clone()
        sees[4] = True
        hold(not out[0, sees].isfinite().any(), "a NaN was hidden")
        hold(out[0, ~sees].isfinite().all() or not s.nan_safe, "a NaN leaked")
        same(out[1], clean[1], "the other batch row")

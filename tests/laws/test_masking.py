"""L5, L7, L8, L9: padding, the ways to write a mask, rows that may see nothing, and NaN."""

import pytest
import torch

import regard
from laws.subject import (
    HEADS,
    B,
    T,
    build,
    causalities,
    close,
    crossings,
    field_of,
    form,
    law,
    reaches,
    run,
    same,
    says,
    takes,
    tokens,
)
from regard import masks
from regard.kernels import KERNELS
from regard.stages import Position

LENGTHS = (9, 4, 2)


def keep(side: str) -> torch.Tensor:
    order = torch.arange(max(LENGTHS))
    lengths = torch.tensor(LENGTHS)[:, None]
    return order < lengths if side == "right" else order >= max(LENGTHS) - lengths


def sides(name: str, module: object) -> list[str]:
    """Left padding moves tokens: only for what asks for distances, or can be told the positions."""
    if isinstance(module, regard.Attention) and not module.receptive_field().is_shift_invariant:
        return ["right"]
    position = getattr(module, "position", None)
    told = isinstance(position, Position) and not (position.changes("bias") or position.changes("values"))
    free = bool(regard.card(name).traits & {"shift_invariant", "position_free"})
    return ["right", "left"] if free or told else ["right"]


@law("L5", needs="padding")
def test_padding_changes_nothing(name: str) -> None:
    """Padded differently per row, whatever the pads hold: outputs and gradients of the unpadded runs."""
    for causal in causalities(name):
        module = build(name, causal=causal)
        rows = [tokens(1, n, seed=20 + n) for n in LENGTHS]
        grads = [tokens(1, n, seed=40 + n) for n in LENGTHS]
        alone = [run(module, x, grad_out=g) for x, g in zip(rows, grads, strict=True)]
        for side in sides(name, module):
            kept, first = keep(side), None
            options = {"mask": masks.padding(kept)}
            if takes(module, "positions"):
                options["positions"] = (kept.cumsum(1) - 1).clamp(min=0)
            for content in (0.0, 1e4, float("nan")):
                x, grad_out = (
                    tokens(len(rows), max(LENGTHS)),
                    torch.zeros(len(rows), max(LENGTHS), rows[0].shape[2]),
                )
                x[~kept], grad_out = content, grad_out.double()
                for b in range(len(rows)):
                    x[b, kept[b]], grad_out[b, kept[b]] = rows[b][0], grads[b][0]
                got = run(module, x, grad_out=grad_out, **options)
                first = first or got
                same(got["out"][kept], first["out"][kept], f"{side} padding with {content}: out")
                pads = got["input0"][~kept]
                same(pads, torch.zeros_like(pads), f"{side} padding with {content}: gradient of pads")
                for b, want in enumerate(alone):
                    close(got["out"][b, kept[b]], want["out"][0], f"{side} padding, row {b}: out")
                    close(got["input0"][b, kept[b]], want["input0"][0], f"{side} padding, row {b}: gradient")
                for key in got.keys() - {"out", "input0"}:
                    close(got[key], sum(a[key] for a in alone), f"{side} padding with {content}: {key}")


def pairs() -> torch.Tensor:
    """(B, 1, T, T) bool: any pattern, every query sees itself."""
    allowed = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(7)) < 0.4
    return allowed | torch.eye(T, dtype=torch.bool)


@law("L7", needs="mask")
def test_masks_as_values_and_tensors(name: str) -> None:
    for causal in causalities(name):
        module, x = build(name, causal=causal), tokens()
        pattern = masks.window(4) | masks.global_tokens(2)
        close(module(x, mask=pattern), module(x, mask=pattern.dense(T)), "window")
        close(module(x, mask=masks.dense(pairs())), module(x, mask=pairs()), "pairs")
        everything = torch.ones(1, 1, T, T, dtype=torch.bool)
        close(module(x, mask=everything), module(x), "all allowed")


@law("L7", function=True, needs="mask")
def test_masks_as_biases(name: str) -> None:
    """-inf and finfo.min in a bias mean what False in a mask means, fully masked rows included."""
    f = form(name)
    q, k, v = f.qkv()
    allowed = pairs()
    allowed[0, 0, 3] = False
    want = f(q, k, v, mask=allowed)
    for low in (-torch.inf, torch.finfo(torch.float64).min):
        bias = torch.zeros(B, 1, T, T, dtype=torch.float64).masked_fill(~allowed, low)
        close(f(q, k, v, bias=bias), want, f"bias of {low}")
    changed = f(q, k, v, mask=allowed, bias=torch.randn(1, HEADS, T, 1).double() + torch.arange(T))
    assert not torch.allclose(changed, want), "a bias changes nothing"


@law("L8", needs="mask")
def test_rows_that_see_nothing(name: str) -> None:
    """Output exactly 0, and a loss on it has no gradient anywhere."""
    for causal in causalities(name):
        module, x = build(name, causal=causal), tokens()
        allowed = pairs()
        allowed[0, :, 3], allowed[1, :, T - 1] = False, False
        dead = torch.zeros(B, T, dtype=torch.bool)
        dead[0, 3], dead[1, T - 1] = True, True
        grad_out = tokens(seed=8) * dead[..., None]
        got = run(module, x, mask=allowed, grad_out=grad_out)
        same(got["out"][dead], torch.zeros_like(got["out"][dead]), "out")
        assert got["out"][~dead].ne(0).any(-1).all()
        for key in got.keys() - {"out"}:
            same(got[key], torch.zeros_like(got[key]), f"gradient of {key}")
        finite = run(module, x, mask=allowed)
        assert all(t.isfinite().all() for t in finite.values())


@law("L8", needs="cross")
def test_no_keys_at_all(name: str) -> None:
    module, x = build(name, causal=crossings(name)[-1]), tokens()
    got = run(module, x, tokens(B, 0))
    same(got["out"], torch.zeros_like(x), "out")
    same(got["input0"], torch.zeros_like(x), "gradient of x")


@law("L9", function=True)
def test_nan_reaches_what_sees_it(name: str) -> None:
    """NaN or inf in one token makes exactly the rows that see it non-finite, on every kernel."""
    f = form(name)
    across = bool(f.parts.keys() & {"score_mix", "weight_mix"})
    for causal in causalities(name):
        q, k, v = (t.detach() for t in f.qkv(length=5, keys=7))
        mask = masks.padding(lengths=torch.tensor([7, 4]))
        allowed = f.arguments(causal, mask)["mask"].dense(5, 7).expand(B, HEADS, 5, 7)
        cases = {"q": (0, 2, 3), "k": (0, 2, 5), "v": (1, 4, 6)}  # v's is hidden by the padding
        for kernel in KERNELS:
            for hurt, (b, h, n) in cases.items():
                for bad in (float("nan"), float("inf")):
                    given = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
                    given[hurt][b, h % given[hurt].shape[1], n, 0] = bad
                    try:
                        out = f(**given, causal=causal, mask=mask, kernel=kernel)
                    except ValueError as error:
                        says(error, "can't run this")
                        continue
                    want = torch.zeros(B, HEADS, 5, dtype=torch.bool)
                    group = HEADS // f.shape.num_kv_heads
                    heads = (
                        range(HEADS)
                        if across
                        else [i for i in range(HEADS) if hurt == "q" or i // group == h % f.shape.num_kv_heads]
                    )
                    for head in [h] if hurt == "q" and not across else heads:
                        sees = allowed[b, head, n].any() if hurt == "q" else allowed[b, head, :, n]
                        want[b, head, n if hurt == "q" else slice(None)] = sees
                    got = ~out.isfinite().all(-1)
                    assert torch.equal(got, want), f"{kernel}: {bad} in {hurt} reaches {got.nonzero().tolist()}"


@law("L9")
def test_nan_tokens(name: str) -> None:
    """The same of a whole layer: a NaN token spoils itself and all that see it, and nobody else."""
    for causal in causalities(name):
        module, x = build(name, causal=causal), tokens()
        clean = module(x)
        field = field_of(module, T) if hasattr(module, "receptive_field") else reaches(module, x[:1])
        x[0, 4, 0] = float("nan")
        out = module(x)
        sees = field[:, 4].clone()
        sees[4] = True
        assert not out[0, sees].isfinite().any(), "a NaN was hidden"
        assert out[0, ~sees].isfinite().all(), "a NaN leaked"
        same(out[1], clean[1], "the other batch row")


def test_the_cases_hide_what_they_should() -> None:
    assert not keep("left")[2, 0]
    assert keep("left")[2, -1]
    assert keep("right")[2, 0]
    with pytest.raises(ValueError, match="mask"):
        regard.attention(*(torch.randn(2, 1, 3, 2) for _ in "qkv"), mask=torch.ones(3, 3, dtype=torch.bool))

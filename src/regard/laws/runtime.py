"""L52, L53, L54: recomputed, on another device or compiled, a mechanism computes what it does plainly."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard import masks
from regard.laws.agreement import close, does_not_apply, hold, same
from regard.laws.registry import LAYERS, law
from regard.laws.subject import Subject, pairs
from regard.laws.together import hidden, poisoned, stream, unchanged, worst
from regard.laws.transforms import calls, floating, or_refused


@law("L52", protocols=LAYERS, weight="heavy")
def checkpointed(s: Subject) -> None:
    """Activation checkpointing gives the plain pass's outputs and gradients bit for bit, and buffers move once."""
    for causal in s.causalities:
        leaves, filled = floating(s)
        results = []
        for reentrant in (None, False, True):
            module = s.build(causal=causal).train()
            given = filled(*(x.clone().requires_grad_() for x in leaves))
            torch.manual_seed(0)
            out = module(*given) if reentrant is None else checkpoint(module, *given, use_reentrant=reentrant)
            generator = torch.Generator().manual_seed(9)
            (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
            found = {f"input {n}": g.grad for n, g in enumerate(given) if g.is_floating_point()}
            found |= {f"gradient of {key}": p.grad for key, p in module.named_parameters()}
            found |= {f"buffer {key}": b for key, b in module.named_buffers()}
            results.append({"out": out.detach(), **found})
        plain, *others = results
        for got, kind in zip(others, ("", "reentrant "), strict=True):
            for key, want in plain.items():
                hold((got[key] is None) == (want is None), f"{kind}checkpoint: {key} is missing in one of the two")
                if want is not None:
                    same(got[key], want, f"{kind}checkpoint, causal={causal}: {key}")


@law("L53", protocols=LAYERS, weight="heavy")
def built_on_another_device(s: Subject) -> None:
    """Built under a default device everything it has stands there, and calls there give the right shapes."""
    if s.fixed:
        does_not_apply("it is built already")
    for causal in s.causalities:
        given = s.inputs()
        want = s.build(causal=causal)(*given)
        with torch.device("meta"):
            module = s.make(dim=s.dim, num_heads=s.heads, causal=causal, **s.example)
        for key, t in (*module.named_parameters(), *module.named_buffers()):
            hold(t.is_meta, f"{key} stands on {t.device}, not on the default device")
        module = module.to(want.dtype).eval()
        with or_refused(s, "a call on meta tensors"):
            got = module(*(g.to("meta") for g in given))
            hold(got.is_meta and got.shape == want.shape and got.dtype == want.dtype, f"on meta: {got.shape}")


@law("L53", protocols=LAYERS, weight="heavy")
def follows_its_inputs(s: Subject) -> None:
    """Whatever the default device is, a call and its gradients are computed where its inputs are."""
    for name, module, given, call in calls(s):
        results = []
        for device in ("cpu", "meta"):
            leaves = tuple(g.clone().requires_grad_() if g.is_floating_point() else g for g in given)
            torch.manual_seed(0)
            with torch.device(device):
                out = module(*leaves, **call)
                out.square().sum().backward()
            results.append([out.detach(), *(g.grad for g in leaves if g.grad is not None)])
        for got, want in zip(*results, strict=True):
            hold(got.device == want.device, f"{name}: a result stands on {got.device}")
            unchanged(got, want, f"{name} under another default device")
    if "streaming" in s.supports:
        module, x = s.build(causal=True), s.tokens()
        with torch.no_grad():
            want = stream(module, x, [3, 1, s.length - 4])
            with torch.device("meta"):
                same(stream(module, x, [3, 1, s.length - 4]), want, "a stream under another default device")


@law("L54", needs="compile", weight="long")
def compiled_masks(s: Subject) -> None:
    """Compiled equals eager for NaN in hidden tokens, in visible ones, and for rows that may see nothing."""
    for causal in s.causalities:
        module, x, keep = s.build(causal=causal), s.tokens(), hidden(s, s.length)
        cases: list[tuple[str, Tensor, Any]] = []
        if "padding" in s.supports:
            nothing = keep.clone()
            nothing[-1] = False
            cases.append(("NaN in padding", poisoned(x, keep, worst(s)), masks.padding(keep)))
            cases.append(("a row without keys", poisoned(x, nothing, worst(s)), masks.padding(nothing)))
        if "mask" in s.supports:
            some = pairs(s.batch, s.length)
            some[..., 2] = False
            some[:, :, 1] = False
            cases.append(
                ("NaN behind a mask", poisoned(x, torch.arange(s.length).expand(s.batch, -1) != 2, worst(s)), some)
            )
        behind = torch.arange(s.length).expand(s.batch, -1) != s.length // 2
        cases.append(("NaN in a token", poisoned(x, behind, torch.nan), None))
        for name, given, mask in cases:
            call = {} if mask is None else {"mask": mask}
            torch._dynamo.reset()
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            close(compiled(given, **call), module(given, **call), f"{name}, causal={causal}")


@law("L54", function=True, needs="compile mask", weight="long")
def compiled_bias(s: Subject) -> None:
    """Compiled equals eager for a bias that hides by -inf or by the dtype's lowest number, a whole row included."""
    f = s.form()
    if f is None:
        does_not_apply("it is no function of queries, keys and values")
    q, k, v = (t.detach() for t in f.qkv())
    for low in (-torch.inf, torch.finfo(q.dtype).min):
        bias = torch.randn(1, 1, s.length, s.length, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
        bias = bias.masked_fill(torch.ones(s.length, s.length, dtype=torch.bool).triu(3), low)
        bias[:, :, 1] = low

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, f: Any = f) -> Tensor:
            return f(q, k, v, bias=bias)

        torch._dynamo.reset()
        got = torch.compile(call, backend="eager", fullgraph=True)(q, k, v, bias)
        close(got, call(q, k, v, bias), f"a bias of {low}")

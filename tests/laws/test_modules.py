"""L29 to L32, L35 to L37: randomness, purity, compilation, and what happens to a module between calls."""

import copy
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import regard
from laws.subject import ALL, DIM, HEADS, B, T, build, causalities, close, inputs, law, near, run, same, tokens


@law("L29", protocols=ALL)
def test_no_randomness_unasked(name: str) -> None:
    """Without dropout a call leaves the generator where it was, in training too."""
    module = build(name).train()
    before = torch.get_rng_state()
    module(*inputs(name))
    assert torch.equal(torch.get_rng_state(), before)


def test_import_sets_no_seed() -> None:
    """L29: neither import nor the catalogue touches the global generator."""
    code = "import torch; s = torch.initial_seed(); a = torch.get_rng_state(); "
    code += "import regard; regard.mechanisms(); "
    code += "assert torch.initial_seed() == s and torch.equal(torch.get_rng_state(), a)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@law("L30", needs="dropout")
def test_dropout(name: str) -> None:
    """None in eval; in training the mean over many calls is the output without it."""
    module, x = build(name, dropout=0.4, dtype=torch.float32), tokens(1, 5, dtype=torch.float32)
    want = build(name, dtype=torch.float32)(x)
    same(module(x), want, "eval")
    module.train()
    assert not torch.equal(module(x), module(x)), "dropout does nothing in training"
    many = module(x.expand(2000, -1, -1)) if regard.card(name).is_part else torch.cat([module(x) for _ in range(300)])
    if "linear_in_values" in regard.card(name).traits and not hasattr(
        module.gate if hasattr(module, "gate") else None, "forward"
    ):
        sigma = many.std(0) / len(many) ** 0.5
        assert ((many.mean(0) - want[0]).abs() <= 4.5 * sigma + 1e-6).all(), "the mean is off"


@law("L30", needs="dropout", pipeline=True)
def test_all_dropped(name: str) -> None:
    module, x = build(name, dropout=1.0).train(), tokens()
    if module.weight_mix is not None or module.position is None or not module.position.changes("values"):
        same(module(x), torch.zeros_like(x), "p = 1")
    with pytest.raises(ValueError, match=r"dropout is out of range"):
        build(name, dropout=2.0)


@law("L30", needs="dropout", pipeline=True)
@pytest.mark.parametrize("kernel", ["auto", "chunked"])
def test_dropout_is_the_same_in_backward(name: str, kernel: str) -> None:
    """Recomputed or not, backward sees the mask that forward drew: f is linear in v, so <df, v> = f."""
    if not {"linear_in_values", "head_independent"} <= regard.card(name).traits:
        return
    module, x = build(name, dropout=0.4).train(), tokens(B, 20)
    module.kernel = kernel
    if module.gate is not None:
        return
    torch.manual_seed(3)
    out = module(x)
    # d/dW_v <out, r> . W_v = <out, r>, only if the weights are those of the forward pass.
    r = tokens(B, 20, seed=8)
    grad = torch.autograd.grad((out * r).sum(), module.v_proj.weight)[0]
    close((grad * module.v_proj.weight).sum(), (out * r).sum())


@law("L31", protocols=ALL)
def test_purity(name: str) -> None:
    """Inputs and parameters are left alone; outputs share no memory with them."""
    module, given = build(name), inputs(name)
    copies, versions = [g.clone() for g in given], [g._version for g in given]
    state = {k: (t.clone(), t._version) for k, t in module.state_dict(keep_vars=True).items()}
    out = module(*given)
    for g, c, version in zip(given, copies, versions, strict=True):
        same(g, c, "an input")
        assert g._version == version
        assert out.untyped_storage().data_ptr() != g.untyped_storage().data_ptr()
    for key, t in module.state_dict(keep_vars=True).items():
        same(t, state[key][0], key)
        assert t._version == state[key][1], f"{key} was written to"


# Compiling takes seconds a card: the first of each family always, the others among the slow tests.
FIRST = {regard.mechanisms(family)[0] for family in {regard.card(name).family for name in regard.mechanisms()}}


@law("L32", needs="compile", protocols=ALL, where=lambda card: card.name in FIRST)
def test_compiled(name: str) -> None:
    compiles(name)


@pytest.mark.slow
@law("L32", needs="compile", protocols=ALL, where=lambda card: card.name not in FIRST)
def test_the_others_compiled(name: str) -> None:
    compiles(name)


def compiles(name: str) -> None:
    """No graph breaks; forward and backward of the eager layer; the second call compiles nothing."""
    for causal in causalities(name)[-1:]:
        torch._dynamo.reset()
        module, given = build(name, causal=causal, dtype=torch.float32), inputs(name, torch.float32)
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=graphs)
        want, got = run(module, *given), run(compiled, *given)
        exact = run(build(name, causal=causal).double(), *(g.double() if g.is_floating_point() else g for g in given))
        for key in exact:
            near(got[f"_orig_mod.{key}"] if key not in got else got[key], exact[key], want[key], key)
        count = graphs.frame_count
        run(compiled, *given)
        assert graphs.frame_count == count == 1


@pytest.mark.slow
@law("L32", needs="compile")
def test_compiled_for_any_length(name: str) -> None:
    torch._dynamo.reset()
    module = build(name, dtype=torch.float32)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    for length in (8, 13, 17, 30, 41):
        x = tokens(B, length, dtype=torch.float32)
        exact = build(name)(x.double())
        near(compiled(x).detach()[None], exact.detach()[None], module(x).detach()[None], f"{length} tokens")
    assert graphs.frame_count <= 3


@law("L53", protocols=ALL)
def test_built_under_a_device(name: str) -> None:
    """torch.device as a context, `create(device=)` and `.to()` give the same keys, shapes and dtypes, all there."""
    want = build(name, dtype=torch.float32, noise=0)
    with torch.device("meta"):
        under = build(name, dtype=torch.float32, noise=0)
    for made in (under, build(name, device="meta", dtype=torch.float32, noise=0), want.to("meta")):
        assert all(t.is_meta for t in (*made.parameters(), *made.buffers()))
    assert [(k, t.shape, t.dtype) for k, t in under.state_dict().items()] == [
        (k, t.shape, t.dtype) for k, t in want.state_dict().items()
    ]


@law("L48", protocols=ALL)
def test_starting_values_do_not_depend_on_the_dtype(name: str) -> None:
    """`dtype=` casts what was drawn; another default dtype draws the same numbers, too."""
    want = build(name, dtype=torch.float32, noise=0).double().state_dict()
    torch.manual_seed(0)
    sizes = {"dim": DIM, "num_heads": HEADS, "causal": causalities(name)[-1]}
    cast = regard.create(name, **sizes, dtype=torch.float64, **regard.card(name).example).state_dict()
    for key, t in want.items():
        if t.is_floating_point():
            torch.testing.assert_close(cast[key].double(), t.double(), rtol=0, atol=0, msg=key)


@law("L35", protocols=ALL)
def test_built_on_meta(name: str) -> None:
    """Built without memory, given memory, reset and loaded, it is the layer built at once."""
    want = build(name, dtype=torch.float32, noise=0)
    meta = build(name, device="meta", dtype=torch.float32, noise=0)
    assert {k: (t.shape, t.dtype) for k, t in meta.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in want.state_dict().items()
    }
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    real = meta.to_empty(device="cpu")
    for part in real.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for key, t in (*real.named_parameters(), *real.named_buffers()):
        assert not t.is_floating_point() or t.isfinite().all(), f"reset_parameters leaves {key} as it was"
    real.load_state_dict(want.state_dict())
    given = inputs(name, torch.float32)
    same(real(*given), want(*given))


@law("L35", protocols=ALL)
def test_all_state_is_registered(name: str) -> None:
    for key, part in build(name).named_modules():
        loose = [a for a, value in vars(part).items() if isinstance(value, torch.Tensor)]
        assert not loose, f"{key or name} holds tensors that are neither parameters nor buffers: {loose}"


@law("L36", protocols=ALL)
def test_saved_and_loaded(name: str) -> None:
    """Through safetensors, strictly: same keys, same outputs; a missing or misshapen tensor is named."""
    module, given = build(name), inputs(name)
    if not module.state_dict():
        same(build(name, noise=0.01)(*given), module(*given))  # nothing to load
        return
    state = safetensors.torch.load(safetensors.torch.save({k: t.contiguous() for k, t in module.state_dict().items()}))
    fresh = build(name, noise=0.01)
    assert not torch.equal(fresh(*given), module(*given))
    fresh.load_state_dict(state, strict=True)
    same(fresh(*given), module(*given))
    key = next(iter(state))
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        fresh.load_state_dict({**state, key: state[key][..., :-1]})
    del state[key]
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        fresh.load_state_dict(state)


@law("L37", protocols=ALL)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name: str, how) -> None:
    """A copy computes the same and shares nothing."""
    module, given = build(name), inputs(name)
    twin = how(module)
    want = module(*given)
    same(twin(*given), want)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    same(module(*given), want, "the original")
    assert twin.supports == module.supports == regard.card(name).supports


@law("L37", needs="streaming")
@torch.no_grad()
def test_copied_states(name: str) -> None:
    module, x = build(name, causal=True), tokens()
    _, state = module.step(x[:, :5], module.init_state(B, T))
    want = module.step(x[:, 5:7], state)[0]
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        same(module.step(x[:, 5:7], twin)[0], want)


def test_every_module_is_a_module() -> None:
    for name in regard.mechanisms():
        assert isinstance(build(name), nn.Module)
        assert regard.card(name).options.keys() >= regard.card(name).example.keys() - {
            "num_kv_heads",
            "kernel",
        }

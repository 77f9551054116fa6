"""L29 to L32, L35 to L37, L48, L53: randomness, purity, compilation, and what happens to a module between calls."""

import copy
import pickle
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from regard.laws.agreement import close, does_not_apply, hold, near, refused, run, same
from regard.laws.registry import LAYERS, law
from regard.laws.subject import Subject


def drops(module: nn.Module) -> bool:
    """Whether it looks as if training draws a dropout mask."""
    rates = (getattr(part, name, 0.0) for part in module.modules() for name in ("p", "dropout", "dropout_p"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@law("L29", protocols=LAYERS)
def no_randomness_unasked(s: Subject) -> None:
    """Without dropout a call leaves the generator where it was, in training too."""
    module = s.build()
    for training in (False, True):
        if training and s.foreign and drops(module):
            return  # somebody else's default, which nothing here asked for
        module.train(training)
        before = torch.get_rng_state()
        module(*s.inputs())
        hold(torch.equal(torch.get_rng_state(), before), f"a call with training={training} draws random numbers")


@law("L30", needs="dropout")
def dropout_is_for_training(s: Subject) -> None:
    """Dropout changes nothing in eval; in training the mean over many calls is the output without it."""
    module, x = s.build(dropout=0.4, dtype=torch.float32), s.tokens(1, 5, dtype=torch.float32)
    want = s.build(dropout=0.0, dtype=torch.float32)(x)
    same(module(x), want, "the output in eval")
    module.train()
    hold(not torch.equal(module(x), module(x)), "dropout does nothing in training")
    if "linear_in_values" not in s.traits or hasattr(getattr(module, "gate", None), "forward"):
        return
    many = module(x.expand(2000, -1, -1)) if s.is_part else torch.cat([module(x) for _ in range(300)])
    sigma = many.std(0) / len(many) ** 0.5
    off = ((many.mean(0) - want[0]).abs() - 1e-6) / sigma
    hold((off <= 4.5).all(), f"the mean with dropout is {off.max():.1f} standard errors off")


@law("L30", needs="dropout", pipeline=True)
def all_dropped_is_zero(s: Subject) -> None:
    """With a dropout of 1 training gives 0; more than 1 is refused."""
    module, x = s.build(dropout=1.0).train(), s.tokens()
    if module.weight_mix is not None or module.position is None or not module.position.changes("values"):
        same(module(x), torch.zeros_like(x), "the output with p = 1")
    with refused(ValueError, "dropout is out of range", what="a dropout of 2"):
        s.build(dropout=2.0)


@law("L30", needs="dropout", traits="linear_in_values head_independent", pipeline=True)
def dropout_is_the_same_in_backward(s: Subject) -> None:
    """Recomputed or not, backward sees the mask that forward drew."""
    module, x = s.build(dropout=0.4).train(), s.tokens(length=20)
    if module.gate is not None:
        does_not_apply("its gate stands between the values and the output")
    for kernel in ("auto", "chunked"):
        module.kernel = kernel
        torch.manual_seed(3)
        out = module(x)
        # f is linear in v: d/dW_v <out, r> . W_v = <out, r>, only if the weights are those of the forward pass.
        r = s.tokens(length=20, seed=8)
        grad = torch.autograd.grad((out * r).sum(), module.v_proj.weight)[0]
        close((grad * module.v_proj.weight).sum(), (out * r).sum(), f"{kernel}: the sum over backward's weights")


@law("L31", protocols=LAYERS)
def purity(s: Subject) -> None:
    """Inputs and parameters are left alone; outputs share no memory with them."""
    module, given = s.build(), s.inputs()
    copies, versions = [g.clone() for g in given], [g._version for g in given]
    state = {k: (t.clone(), t._version) for k, t in module.state_dict(keep_vars=True).items()}
    out = module(*given)
    for g, c, version in zip(given, copies, versions, strict=True):
        same(g, c, "an input")
        hold(g._version == version, "an input was written to")
        hold(out.untyped_storage().data_ptr() != g.untyped_storage().data_ptr(), "the output shares an input's memory")
    for key, t in module.state_dict(keep_vars=True).items():
        same(t, state[key][0], key)
        hold(t._version == state[key][1], f"{key} was written to")


@law("L32", needs="compile", protocols=LAYERS, weight="heavy")
def compiled(s: Subject) -> None:
    """Compiled without graph breaks: forward and backward of the eager layer; the second call compiles nothing."""
    from torch._dynamo.testing import CompileCounterWithBackend  # the compiler takes long to import

    torch._dynamo.reset()
    module, given = s.build(dtype=torch.float32), s.inputs(torch.float32)
    graphs = CompileCounterWithBackend("aot_eager")
    made = torch.compile(module, fullgraph=True, backend=graphs)
    want, got = run(module, *given), run(made, *given)
    exact = run(s.build().double(), *(g.double() if g.is_floating_point() else g for g in given))
    for key in exact:
        near(got[f"_orig_mod.{key}"] if key not in got else got[key], exact[key], want[key], key)
    count = graphs.frame_count
    run(made, *given)
    hold(graphs.frame_count == count == 1, f"{count} graphs in the first call, {graphs.frame_count} after the second")


@law("L32", needs="compile", weight="long")
def compiled_for_any_length(s: Subject) -> None:
    """Five lengths take at most three compilations, and give what the eager layer gives."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module = s.build(dtype=torch.float32)
    graphs = CompileCounterWithBackend("aot_eager")
    made = torch.compile(module, fullgraph=True, backend=graphs)
    for length in (8, 13, 17, 30, 41):
        x = s.tokens(length=length, dtype=torch.float32)
        exact = s.build()(x.double())
        near(made(x).detach()[None], exact.detach()[None], module(x).detach()[None], f"{length} tokens")
    hold(graphs.frame_count <= 3, f"{graphs.frame_count} compilations for five lengths")


def state(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {k: (t.shape, t.dtype) for k, t in module.state_dict().items()}


def held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@law("L53", protocols=LAYERS, weight="heavy")
def built_under_a_device(s: Subject) -> None:
    """torch.device as a context, `create(device=)` and `.to()` give the same keys, shapes and dtypes, all there."""
    want = s.build(dtype=torch.float32, noise=0)
    with torch.device("meta"):
        under = s.build(dtype=torch.float32, noise=0)
    if s.foreign and held(under) and not any(t.is_meta for t in held(under)):
        does_not_apply("it was built before, elsewhere")
    made = {"torch.device as a context": under, ".to": copy.deepcopy(want).to("meta")}
    if not s.foreign:
        made["device="] = s.build(device="meta", dtype=torch.float32, noise=0)
    for how, module in made.items():
        stay = [k for k, t in (*module.named_parameters(), *module.named_buffers()) if not t.is_meta]
        hold(not stay, f"{how}: {stay} stand elsewhere")
        hold(list(state(module).items()) == list(state(want).items()), f"{how}: other keys, shapes or dtypes")


@law("L48", protocols=LAYERS, where=lambda s: "`dtype=` is an option of regard.create" if s.foreign else "")
def starting_values_do_not_depend_on_the_dtype(s: Subject) -> None:
    """`dtype=` casts what was drawn."""
    want = s.build(dtype=torch.float32, noise=0).double().state_dict()
    torch.manual_seed(0)
    sizes = {"dim": s.dim, "num_heads": s.heads, "causal": s.causalities[-1]}
    cast = s.make(**sizes, dtype=torch.float64, **s.example).state_dict()
    for key, t in want.items():
        if t.is_floating_point():
            same(cast[key].double(), t.double(), key)


@law("L35", protocols=LAYERS)
def built_on_meta(s: Subject) -> None:
    """Built without memory, given memory, reset and loaded, it is the layer built at once."""
    want = s.build(dtype=torch.float32, noise=0)
    if s.foreign:
        meta = copy.deepcopy(want).to("meta")
    else:
        meta = s.build(device="meta", dtype=torch.float32, noise=0)
    hold(state(meta) == state(want), "built on meta it has other keys, shapes or dtypes")
    hold(all(t.is_meta for t in held(meta)), "built on meta it holds tensors that are elsewhere")
    real = meta.to_empty(device="cpu")
    resets = [part for part in real.modules() if hasattr(part, "reset_parameters")]
    for part in resets:
        part.reset_parameters()
    own = [part for part in real.modules() if any(True for _ in (*part.parameters(False), *part.buffers(False)))]
    if not s.foreign or all(part in resets for part in own):
        for key, t in (*real.named_parameters(), *real.named_buffers()):
            hold(not t.is_floating_point() or t.isfinite().all(), f"reset_parameters leaves {key} as it was")
    elif len(want.state_dict(keep_vars=True)) < len(held(want)):
        does_not_apply("it has buffers that are in no state_dict, and no reset_parameters")
    real.load_state_dict(want.state_dict())
    given = s.inputs(torch.float32)
    same(real(*given), want(*given), "the output of what was built on meta and loaded")


@law("L35", protocols=LAYERS)
def all_state_is_registered(s: Subject) -> None:
    """Tensors that a module holds are parameters or buffers, so that they move and are saved with it."""
    for key, part in s.build().named_modules():
        loose = [a for a, value in vars(part).items() if isinstance(value, Tensor)]
        hold(not loose, f"{key or s.name} holds tensors that are neither parameters nor buffers: {loose}")


@law("L36", protocols=LAYERS)
def saved_and_loaded(s: Subject) -> None:
    """Through safetensors, strictly: same keys, same outputs; a missing or misshapen tensor is named."""
    module, given = s.build(), s.inputs()
    if not module.state_dict():
        same(s.build(noise=0.01)(*given), module(*given), "the output of another one without parameters")
        return
    tensors = {k: t.contiguous() for k, t in module.state_dict().items()}
    if s.foreign:
        tensors = {k: t.clone() for k, t in tensors.items()}  # safetensors takes no two names for one tensor
    loaded = safetensors.torch.load(safetensors.torch.save(tensors))
    fresh = s.build(noise=0.01)
    if not s.foreign or any(True for _ in module.parameters()):
        hold(not torch.equal(fresh(*given), module(*given)), "other parameters give the same output")
    fresh.load_state_dict(loaded, strict=True)
    same(fresh(*given), module(*given), "the output of what was loaded")
    key = next(iter(tensors))
    misshapen = loaded[key][..., :-1] if loaded[key].dim() else loaded[key].expand(2, 2)
    with refused(RuntimeError, key, what=f"another shape of {key}"):
        fresh.load_state_dict({**loaded, key: misshapen})
    del loaded[key]
    with refused(RuntimeError, key, what=f"a state without {key}"):
        fresh.load_state_dict(loaded)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@law("L37", protocols=LAYERS)
def copies(s: Subject) -> None:
    """A copy, by deepcopy or pickle, computes the same and shares nothing."""
    module, given = s.build(), s.inputs()
    want = module(*given)
    for how in (copy.deepcopy, pickled):
        try:
            twin = how(module)
        except (AttributeError, pickle.PicklingError) as error:
            if s.foreign and how is pickled and ("local" in str(error) or "lookup" in str(error)):
                return  # its class has no place where pickle could find it
            raise
        same(twin(*given), want, f"{how.__name__}: the copy's output")
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        same(module(*given), want, f"{how.__name__}: the original's output after its copy was zeroed")
        if s.card is not None:
            hold(twin.supports == module.supports == s.card.supports, f"{how.__name__}: it supports something else")


@law("L37", needs="streaming")
@torch.no_grad()
def copied_states(s: Subject) -> None:
    """A copy of a streaming state goes on as the state does."""
    module, x = s.build(causal=True), s.tokens()
    _, first = module.step(x[:, :5], module.init_state(s.batch, s.length))
    want = module.step(x[:, 5:7], first)[0]
    for how in (copy.deepcopy, pickled):
        same(module.step(x[:, 5:7], how(first))[0], want, f"{how.__name__}: the next outputs")

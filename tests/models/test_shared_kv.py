"""Models whose layers share keys and values, against a model that computes them by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import models
from regard.models.checkpoint import load, save
from regard.models.lm import LanguageModel, LMConfig, language_model
from regard.pipeline import SharedKV

IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def config(mechanism: str = "rotary", depth: int = 4, share_kv: int = 2) -> LMConfig:
    return LMConfig(mechanism, dim=16, depth=depth, num_heads=2, mlp_dim=20, length=12, share_kv=share_kv)


def model(**told: int | str) -> LanguageModel:
    torch.manual_seed(0)
    return language_model(config(**told)).double()


def naive(made: LanguageModel, ids: Tensor) -> Tensor:
    """The same layer by layer, with the keys and values that stand in a variable."""
    x = made.embedding(ids)
    B, T, M = x.shape
    at = torch.arange(T)
    for block in made.blocks:
        z, mixer = block.mixer_norm(x), block.mixer
        if hasattr(mixer, "k_proj"):
            k, v = (p(z).view(B, T, 2, M // 2).transpose(1, 2) for p in (mixer.k_proj, mixer.v_proj))
            k = mixer.position.rotate(k, at)
        q = mixer.position.rotate(mixer.q_proj(z).view(B, T, 2, M // 2).transpose(1, 2), at)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = block.mlp(x + mixer.o_proj(y.transpose(1, 2).flatten(2)))
    return made.logits(x)


@pytest.mark.parametrize(("depth", "share_kv"), [(4, 2), (5, 2), (4, 4), (3, 9), (3, 1)])
def test_equals_a_naive_model(depth: int, share_kv: int) -> None:
    made = model(depth=depth, share_kv=share_kv)
    reads = [isinstance(mixer, SharedKV) for mixer in made.mixers]
    assert reads == [n % share_kv > 0 for n in range(depth)]
    torch.testing.assert_close(made(IDS), naive(made, IDS))
    grads = [
        torch.autograd.grad(f(IDS).square().sum(), list(made.parameters())) for f in (made, lambda i: naive(made, i))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mechanism", ["rotary", "window(window=4)+rotary", "qk_norm+memory_kv+rotary", "alibi"])
@torch.no_grad()
def test_steps_are_the_full_pass_from_one_cache_a_group(mechanism: str) -> None:
    made, alone = model(mechanism=mechanism), model(mechanism=mechanism, share_kv=1)
    states, outs = made.init_state(2, 12), []
    assert [state is None for state in states] == [False, True, False, True]
    assert made.streams
    for piece in IDS.split([1, 4, 1, 5, 1], 1):
        y, states = made.step(piece, states)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), made(IDS))
    _, others = alone.step(IDS, alone.init_state(2, 12))
    held, full = (sum(s.nbytes for s in each if s is not None) for each in (states, others))
    assert 2 * held == full
    ids = made.generate(IDS[:, :3], 5, temperature=0)
    want = IDS[:, :3]
    for _ in range(5):
        want = torch.cat([want, made(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, want)


def test_the_upper_half_may_read_one_layer() -> None:
    """As in YOCO: by hand, each reads the nearest below that makes its own."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 2, "causal": True}
    lower = [regard.create("window(window=4)+rotary", **sizes), regard.create("rotary", **sizes)]
    upper = [SharedKV.of(regard.create("rotary", **sizes)) for _ in "12"]
    made = LanguageModel([*lower, *upper], dim=16, mlp_dim=20).double()
    assert made.shared == {1}
    with torch.no_grad():
        states, outs = made.init_state(2, 12), []
        for piece in IDS.split(1, 1):
            y, states = made.step(piece, states)
            outs.append(y)
        torch.testing.assert_close(torch.cat(outs, 1), made(IDS))
    assert states[2:] == [None, None]


def test_a_file_keeps_the_plan(tmp_path) -> None:
    made = model().float()
    again, told = load(save(made, config(), tmp_path / "model.safetensors"))
    assert told == config()
    torch.testing.assert_close(again(IDS), made(IDS))
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in model(share_kv=1).parameters()) - 4 * 256


def test_learns() -> None:
    made = model().float()
    adam = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        adam.zero_grad()
        losses.append(F.cross_entropy(made(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()))
        losses[-1].backward()
        adam.step()
    assert losses[-1].item() < 0.3 * losses[0].item()


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [
        ("linear", "can't read another's keys and values"),
        ("linear*1+softmax*1", "makes no keys and values that others could read"),
        ("mla(absorb=True)", "can't read another's keys and values"),
        ("window(window=4)*1+softmax*1", "layer 1 sees further than what it reads is kept"),
        ("softmax(num_kv_heads=1)*1+softmax*1", "layer 1 reads other heads than there are"),
    ],
)
def test_refuses_layers_that_cannot_share(mechanism: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.layers(mechanism, dim=16, num_heads=2, depth=4, causal=True, share_kv=2)


def test_refuses_a_model_without_what_is_read() -> None:
    layer = SharedKV(16, 2, causal=True)
    with pytest.raises(ValueError, match="layer 0 reads keys and values of a layer below"):
        LanguageModel([layer], dim=16, mlp_dim=20)
    with pytest.raises(ValueError, match="share_kv"):
        models.layers("softmax", dim=16, num_heads=2, depth=4, share_kv=0)

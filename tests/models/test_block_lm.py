"""Block Transformer against loops over every layer and token and the authors' numbers (A136); its caches, its claim.

The loops in naive_block_lm.py are by an author who has read neither the code nor this test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from models.naive_block_lm import block_lm, loss
from regard.laws.agreement import close, same
from regard.models.block_lm import BlockLM
from regard.models.neox import neox_attention
from regard.pipeline.kv_cache import KVCache

VECTORS = Path(__file__).parents[1] / "vectors" / "A136.npz"
HALF = "rotary(partial_rotary_factor=0.5, bias=True)"
SMALL = {"vocab": 11, "layers_global": 2, "layers_local": 2, "mlp_ratio": 2}


def build(dim: int = 16, num_heads: int = 2, **options) -> BlockLM:
    torch.manual_seed(0)
    sizes = {"dim": dim, "num_heads": num_heads, "causal": True}
    return regard.create("block_transformer", **sizes, **{**SMALL, **options}).double().eval()


def disturbed(model: BlockLM) -> BlockLM:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return model


def tokens(B: int = 2, T: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))


def joined(model: BlockLM) -> dict[str, Tensor]:
    """The parameters under the names of the authors' code, which joins q, k and v head by head."""
    p = {"embedder.embeddings": model.embedding, "token_decoder.gpt_neox.embed_in": model.token_embedding}
    p |= {"token_decoder.embed_out": model.head, "token_decoder.expansion_layer": model.expand}
    found = {}
    for name in ("block_decoder", "token_decoder"):
        decoder = getattr(model, name)
        p[f"{name}.gpt_neox.final_layer_norm"] = decoder.norm
        for n, layer in enumerate(decoder.layers):
            at, mixer = f"{name}.gpt_neox.layers.{n}.", layer.mixer
            p |= {at + "input_layernorm": layer.mixer_norm, at + "post_attention_layernorm": layer.mlp_norm}
            p |= {at + "mlp.dense_h_to_4h": layer.up, at + "mlp.dense_4h_to_h": layer.down}
            p[at + "attention.dense"] = mixer.o_proj
            for kind in ("weight", "bias"):
                parts = [getattr(proj, kind) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
                heads = torch.stack([z.unflatten(0, (mixer.num_heads, -1)) for z in parts], 1)
                found[f"{at}attention.query_key_value.{kind}"] = heads.flatten(0, 2)
    return found | {f"{key}.{kind}": z for key, part in p.items() for kind, z in part.named_parameters()}


def load(model: BlockLM, given: dict[str, Tensor]) -> None:
    """The inverse of `joined`: where a name's tensor stands is found by what moves it."""
    with torch.no_grad():
        for key, z in joined(model).items():
            if "query_key_value" not in key:
                z.copy_(given[key].reshape(z.shape))
        for name in ("block_decoder", "token_decoder"):
            for n, layer in enumerate(getattr(model, name).layers):
                for kind in ("weight", "bias"):
                    z = given[f"{name}.gpt_neox.layers.{n}.attention.query_key_value.{kind}"]
                    parts = z.unflatten(0, (layer.mixer.num_heads, 3, -1)).unbind(1)
                    for proj, part in zip((layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj), parts):
                        getattr(proj, kind).copy_(part.flatten(0, 1))


@pytest.mark.parametrize(
    ("case", "options"),
    [("prefix", {"block": 4, "prefix": 2}), ("sum", {"block": 2, "decoding": "summation"})],
)
def test_equals_the_authors_numbers(case: str, options: dict) -> None:
    numbers = {k.removeprefix(case + "_"): torch.tensor(z) for k, z in np.load(VECTORS).items() if k.startswith(case)}
    model = build(local_dim=8, mixer_global=HALF, mixer_local=HALF, **options)
    load(model, {k[2:]: z for k, z in numbers.items() if k.startswith("p.")})
    ids = numbers["ids"].flatten(1)
    close(model(ids).detach(), numbers["logits"].flatten(1, 2))
    value = model.loss(ids)
    close(value.detach(), numbers["loss"])
    grads = torch.autograd.grad(value, [model.embedding.weight, model.expand.weight])
    close(grads[0], numbers["grad.embedder.embeddings.weight"])
    close(grads[1], numbers["grad.token_decoder.expansion_layer.weight"][..., 0])


@pytest.mark.parametrize(
    "options",
    [
        {"block": 3, "dim": 24, "prefix": 1, "layers_global": 1},
        {"block": 2, "decoding": "summation", "bos": 5, "local_dim": 8, "layers_local": 1},
        {"block": 4, "prefix": 3, "local_dim": 8, "layers_global": 1, "layers_local": 1},
    ],
)
def test_equals_the_loops(options: dict) -> None:
    model = disturbed(build(mixer_global=HALF, mixer_local=HALF, **options))
    ids, p, L = tokens(), joined(model), model.block
    about = {"prefix": model.prefix, "decoding": model.decoding, "bos": model.bos}
    depth = {"layers_global": len(model.block_decoder.layers), "layers_local": len(model.token_decoder.layers)}
    want = block_lm(ids.unflatten(1, (-1, L)), p, **about, **depth)
    got = model(ids)
    close(got.detach(), want.detach().flatten(1, 2))
    close(model.loss(ids).detach(), loss(want, ids.unflatten(1, (-1, L))).detach())
    direction = torch.randn(got.shape, dtype=torch.float64)
    leaves = list(model.parameters())
    grads = [torch.autograd.grad((z.reshape(got.shape) * direction).sum(), leaves) for z in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_a_block_of_padding_is_seen_by_no_other() -> None:
    """As in the loops; and what it holds changes nothing."""
    model = disturbed(build(mixer_global=HALF, mixer_local=HALF, block=2, prefix=1))
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    seen = mask.unflatten(1, (-1, 2)).any(-1)
    want = block_lm(ids.unflatten(1, (-1, 2)), joined(model), prefix=1, seen=seen).flatten(1, 2)
    real = seen[:, :-1].repeat_interleave(2, 1)  # what a block of padding predicts means nothing
    got = model(ids, mask)
    close(got[real].detach(), want[real].detach())
    other = ids.clone()
    other[0, :4] = 7
    assert torch.equal(model(other, mask)[0, 4:], got[0, 4:])
    assert not torch.allclose(model(other)[0, 4:], model(ids)[0, 4:])
    ends = torch.nn.functional.cross_entropy(got[mask[:, 2:]], ids[:, 2:][mask[:, 2:]])
    close(model.loss(ids, mask).detach(), ends.detach())


def test_a_block_reads_its_context_alone() -> None:
    """Logits depend on earlier blocks only through the context vector, and on later blocks not at all."""
    model, ids = disturbed(build()), tokens()
    want = model(ids)
    later = ids.clone()
    later[:, 8:] = (later[:, 8:] + 1) % 11
    assert torch.equal(model(later)[:, :5], want[:, :5])  # block 1, and the first token of block 2
    earlier = ids.clone()
    earlier[:, :4] = (earlier[:, :4] + 1) % 11
    assert not torch.isclose(model(earlier), want).any()
    contexts = model.contexts(ids)
    hook = model.block_decoder.register_forward_hook(lambda *_: contexts)
    assert torch.equal(model(earlier), want)
    hook.remove()


class Watched:
    """How long the caches are that a decoder hands out."""

    def __init__(self, decoder: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        step = decoder.step

        def watched(x: Tensor, state: object) -> tuple[Tensor, object]:
            y, after = step(x, state)
            assert all(isinstance(cache, KVCache) for cache in after)
            self.lengths.append(after[0].kept)
            return y, after

        monkeypatch.setattr(decoder, "step", watched)


@pytest.mark.parametrize("decoding", ["prefix", "summation"])
def test_caches_are_of_blocks_and_of_one_block(decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(decoding=decoding)
    blocks, local = (Watched(d, monkeypatch) for d in (model.block_decoder, model.token_decoder))
    model.generate(tokens(T=9), 8)
    assert blocks.lengths == [3, 4]
    assert local.lengths == 2 * ([2, 3, 4, 5] if decoding == "prefix" else [1, 2, 3, 4])


@pytest.mark.parametrize("mixer", ["rotary", "linear", "no stream"])
@pytest.mark.parametrize("decoding", ["prefix", "summation"])
def test_greedy_generation_takes_the_likeliest_of_full_passes(decoding: str, mixer: str) -> None:
    """Also with mixers that keep no keys, and with those that can't stream."""
    model = disturbed(build(decoding=decoding, bos=3, mixer_global="linear" if mixer == "linear" else None))
    if mixer == "no stream":
        for layer in (*model.block_decoder.layers, *model.token_decoder.layers):
            layer.mixer.init_state = None  # type: ignore[assignment]
        assert isinstance(model.block_decoder.init_state(2, 9), Tensor)
    prompt = tokens(T=6)
    ids = model.generate(prompt, 7, temperature=0.0)
    assert torch.equal(ids[:, :6], prompt)
    assert ids.shape == (2, 13)
    whole = torch.nn.functional.pad(ids, (2, 1), value=3)
    likeliest = model(whole).argmax(-1)
    assert torch.equal(likeliest[:, 4:-1], whole[:, 8:-1])


def test_generation_follows_its_seed() -> None:
    model = build()

    def drawn(seed: int, **options) -> Tensor:
        return model.generate(tokens(T=4), 9, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(0, temperature=0.0), drawn(1, top_k=1))
    assert torch.equal(model.generate(tokens(T=4), 0), tokens(T=4))


def test_mixers_may_be_any_others() -> None:
    model = build(mixer_global="linear*1+softmax*1", mixer_local="alibi")
    kinds = [type(mixer).__name__ for mixer in model.mixers]
    assert kinds == ["LinearAttention", "Attention", "Attention", "Attention"]
    later = tokens()
    later[:, 11] = (later[:, 11] + 1) % 11
    same(model(later), model(tokens()))  # the last token is read by none


def test_starts_as_written() -> None:
    model = build(dim=64, num_heads=4, vocab=200)
    for part in (model.embedding, model.token_embedding, model.head, model.block_decoder.layers[0].down):
        assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.expand.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.05)
    assert not model.expand.bias.any()
    assert model.expand.out_features == 2 * 64
    quarter = neox_attention(64, 4).position
    assert (quarter.rotary_dim, quarter.base) == (4, 10000.0)
    assert neox_attention(64, 4).q_proj.bias is not None
    assert [neox_attention(D, 1).position.rotary_dim for D in (2, 3, 12, 16, 64, 96)] == [2, 2, 2, 4, 16, 24]


def test_learns_a_repeated_text() -> None:
    torch.manual_seed(0)
    model = build().float().train()
    ids = tokens(T=4).repeat(1, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        value = model.loss(ids)
        value.backward()
        optimizer.step()
    assert value < 0.1
    assert torch.equal(model.eval().generate(ids[:, :4], 8, temperature=0.0), ids)


@pytest.mark.slow
def test_compiles_whole() -> None:
    model, ids = build(layers_global=1, layers_local=1), tokens()
    torch._dynamo.reset()
    close(torch.compile(model, backend="eager", fullgraph=True)(ids).detach(), model(ids).detach())


def test_bad_input() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"ids are no whole blocks \(got \(2, 10\)\); expected .* block = 4"):
        model(tokens(T=10))
    with pytest.raises(TypeError, match="ids has the wrong dtype"):
        model(tokens().double())
    with pytest.raises(ValueError, match=r"mask has the wrong shape \(got \(2, 8\)\)"):
        model(tokens(), torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"dim is no multiple of block = 5 \(got 16\)"):
        build(block=5)
    with pytest.raises(ValueError, match=r"local_dim is no multiple of num_heads = 2 \(got 5\)"):
        build(local_dim=5)
    with pytest.raises(ValueError, match=r"prefix is not the number of tokens .*\(got 2\); expected block = 4"):
        build(prefix=2, decoding="summation")
    with pytest.raises(ValueError, match=r"decoding is unknown \(got 'sum'\)"):
        build(decoding="sum")
    with pytest.raises(ValueError, match=r"bos is too large \(got 11\)"):
        build(bos=11)
    with pytest.raises(ValueError, match="ids are an empty prompt"):
        model.generate(tokens(T=0), 3)
    with pytest.raises(ValueError, match="count is too small"):
        model.generate(tokens(), -1)

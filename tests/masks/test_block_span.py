"""Block spans and mixed spans against loops, whose author has read neither code nor test."""

import pytest
import torch

import regard
from masks import naive_block_span as naive
from regard import masks
from regard.laws.agreement import close
from regard.models.lm import LanguageModel, LMConfig, language_model
from regard.models.mixed_spans import mixed_spans
from regard.spec import parse_stack

T = 20


def model(mechanism: str, depth: int = 3) -> LanguageModel:
    torch.manual_seed(0)
    return language_model(LMConfig(mechanism, dim=8, depth=depth, num_heads=2, mlp_dim=8, vocab=11)).double()


def seen(made: LanguageModel) -> torch.Tensor:
    """[i, j]: whether the output at i depends on the token at j."""
    x = made.embedding(torch.arange(T)[None] % 11).detach().requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        for block in made.blocks:
            x = block(x)
        return x.sum((0, 2))

    return torch.autograd.functional.jacobian(run, x)[:, 0].abs().sum(-1) > 0


@pytest.mark.parametrize(("span", "previous"), [(4, 1), (3, 0), (3, 2), (1, 1), (30, 1)])
def test_is_the_definition(span: int, previous: int) -> None:
    mask = masks.causal() & masks.near_blocks(span, previous)
    want = naive.allowed(T, span, previous=previous)
    assert torch.equal(mask.dense(T)[0, 0], want)
    assert mask.count(T) == int(want.sum())
    both = masks.near_blocks(span, previous)
    assert both.count(T) == int(both.dense(T).sum())
    back = torch.where(both.dense(T)[0, 0])
    assert int((back[0] - back[1]).max()) <= both.span[0]
    layer = regard.create("block_span", dim=8, num_heads=2, causal=True, span=span, previous=previous).double()
    x = torch.randn(2, T, 8, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    close(layer(x), layer.o_proj(naive.attention(q, k, v, want).transpose(1, 2).flatten(2)))


def test_both_ends_of_a_block() -> None:
    rows = (masks.causal() & masks.near_blocks(4)).dense(T)[0, 0].sum(-1)
    assert rows[8:12].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("form", ["block", "window"])
def test_one_full_layer_reaches_everything(form: str) -> None:
    """Wherever it is; and without one an output sees what the spans of all layers together do."""
    short = seen(model(mixed_spans(3, full=0, span=4, form=form)))
    assert torch.equal(short, naive.reach(naive.masks(T, 3, (), 4, form)))
    assert int(short[-1].sum()) == (3 * (4 - 1) + 1 if form == "window" else 16)
    assert not short[-1, 0]
    for layer in range(3):
        assert seen(model(mixed_spans(3, full=[layer], span=4, form=form)))[-1].all()


def test_what_a_stack_costs() -> None:
    """Counted pairs are those of the loops, and about |F| / L + (1 - |F| / L) 2 m / T of full attention's."""
    length, span, depth = 160, 8, 4
    pairs = 0
    for spec in parse_stack(mixed_spans(depth, full=1, span=span, form="window")).layers(depth):
        layer = regard.create(str(spec), dim=8, num_heads=2, causal=True)
        pairs += layer.receptive_field().count(length)
    share = pairs / (depth * masks.causal().count(length))
    assert share == pytest.approx(naive.cost(naive.masks(length, depth, (0,), span, "window")))
    assert share == pytest.approx(1 / 4 + 3 / 4 * 2 * span / length, rel=0.02)


def test_the_words() -> None:
    assert mixed_spans(8, full=2, span=64) == "softmax*2+block_span(span=64)*6"
    assert mixed_spans(8, span=64, form="window") == "softmax*2+window(window=64)*6"
    assert mixed_spans(3, span=8) == "softmax*1+block_span(span=8)*2"
    assert mixed_spans(3, full=[2], span=8, joined="rotary") == "(block_span(span=8)+rotary)*2+(rotary)*1"
    assert [s.name for s in parse_stack(mixed_spans(4, full=(1, 3))).layers(4)] == ["block_span", "softmax"] * 2


def test_placements_share_weights_and_stream() -> None:
    """A state dict of full attention loads; each layer keeps only what it can still see."""
    full, mixed = model("softmax"), model(mixed_spans(3, full=[1], span=3, form="window"))
    mixed.load_state_dict(full.state_dict())
    ids = torch.arange(T)[None] % 11
    states, outs = mixed.init_state(1, T), []
    for t in range(T):
        out, states = mixed.step(ids[:, t : t + 1], states)
        outs.append(out)
    close(torch.cat(outs, 1), mixed(ids))
    close(mixed(ids)[:, :3], full(ids)[:, :3])
    assert sum(state.kept for state in states) == naive.cache(T, 3, (1,), 3) - 2  # a step brings its own key


@pytest.mark.slow
def test_a_model_of_transformers_is_converted_in_its_layers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(T)[None] % 11
    with torch.no_grad():
        before = theirs(ids).logits
        with regard.swap(theirs, mixed_spans(3, full=1, span=4)):
            after = theirs(ids).logits
        again = theirs(ids).logits
    torch.testing.assert_close(after[:, :8], before[:, :8], atol=1e-5, rtol=0)
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-4
    assert torch.equal(again, before)


def test_refusals() -> None:
    for wrong, told in (
        ({"full": 5}, "full is too large"),
        ({"full": [4]}, "full is too large"),
        ({"full": [1, 1]}, "full names a layer twice"),
        ({"full": "1"}, "full has the wrong type"),
        ({"span": 0}, "span is too small"),
        ({"form": "ring"}, "form is unknown"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"mixed_spans: {told}"):
            mixed_spans(4, **wrong)
    with pytest.raises(ValueError, match="near_blocks: near is too small"):
        masks.near_blocks(4, -1)

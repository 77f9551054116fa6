"""Compiled decoding of swapped models over a static cache: eager's numbers, and no new graph for a token."""

import itertools

import pytest
import torch

import regard
from integrations import tiny

transformers = pytest.importorskip("transformers")
PLACELESS, PLACED = ("softmax", "gated", "entmax"), ("window(window=3)", "kerple")


def decode(model, step, count=5):
    """Logits of a prompt and of some tokens after it, and how many graphs were compiled by the end of each."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    graphs.clear()
    seen, out = [], [model(torch.arange(3, 9)[None], past_key_values=cache).logits[:, -1]]
    for place in range(6, 6 + count):
        out.append(step(torch.tensor([[place]]), past_key_values=cache).logits[:, -1])
        seen.append(len(graphs))
    return torch.stack(out), seen


graphs = []


def counted(graph, inputs):
    graphs.append(graph)
    return graph.forward


NOW = {("llama", "softmax"), ("llama", "kerple"), ("gpt2", "window(window=3)")}


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [
        case if case in NOW else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(("llama", "gpt2", "gemma2"), (*PLACELESS, *PLACED))
    ],
)
def test_decoding_compiles_once(name, mechanism):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = tiny.MODELS[name]().eval()
    with torch.no_grad(), regard.swap(model, mechanism):
        wanted, _ = decode(model, model)
        compiled = torch.compile(model.forward, backend=counted, fullgraph=mechanism in PLACELESS)
        got, seen = decode(model, compiled)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert seen[1:] == [seen[1]] * 4, "after the second token nothing is compiled anew"
    if mechanism in PLACELESS and name != "gemma2":
        assert seen == [1] * 5


def test_an_encoder_and_decoder_compile_as_one_graph():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = tiny.MODELS["t5"]().eval(), torch.arange(3, 9)[None]
    config = model.config.get_text_config(decoder=True)

    def run(step):
        own, crossed = (transformers.StaticCache(config=config, max_cache_len=n) for n in (8, 6))
        cache = transformers.EncoderDecoderCache(own, crossed)
        model(input_ids=ids, decoder_input_ids=torch.tensor([[0]]), past_key_values=cache)
        return step(input_ids=ids, decoder_input_ids=torch.tensor([[3]]), past_key_values=cache).logits

    with torch.no_grad(), regard.swap(model, "softmax"):
        wanted = run(model)
        got = run(torch.compile(model.forward, fullgraph=True, backend="eager"))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)

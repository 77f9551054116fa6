"""Relevancy maps against loops and the authors' numbers (B150); gradients of transformers models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.inspect.analyses.naive_relevance import NaiveStreams, naive_normalised, naive_self, naive_weighted
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from regard.inspect.analyses.relevance import (
    Relevance,
    attention_gradients,
    attention_relevance,
    encoder_decoder_relevance,
    normalized,
    self_relevance,
    weighted_attention,
)
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[2] / "vectors" / "B150.npz"
Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def z() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k: torch.from_numpy(file[k]) for k in file}


def pair(z: dict[str, Tensor], name: str) -> Pair:
    return z[f"{name}.attn"][None], z[f"{name}.grad"][None]


def random_pair(*shape: int, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    logits, gradient = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return logits.softmax(-1), gradient


def one(given: Pair, b: int) -> Pair:
    return given[0][b], given[1][b]


def test_by_hand() -> None:
    """Two heads on two tokens; negative products count as 0 before the mean."""
    attention = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.5, 0.5]]]], dtype=torch.float64)
    gradient = torch.tensor([[[[2.0, -2.0], [0.0, 0.0]], [[4.0, -8.0], [-1.0, 6.0]]]], dtype=torch.float64)
    want = torch.tensor([[[1.0, 0.0], [0.0, 1.5]]], dtype=torch.float64)
    close(weighted_attention(attention, gradient), want)
    close(self_relevance([(attention, gradient)]), torch.eye(2, dtype=torch.float64) + want)
    close(self_relevance([(attention, gradient)] * 2), torch.tensor([[[4.0, 0.0], [0.0, 6.25]]], dtype=torch.float64))


def test_gives_the_authors_numbers_for_self_attention(z: dict[str, Tensor]) -> None:
    R = self_relevance([pair(z, f"self.layer{n}") for n in range(3)])
    close(R[0], z["self.R"])
    close(normalized(R)[0], z["self.R_residual_normalised"])


def test_gives_the_authors_numbers_for_encoder_and_decoder(z: dict[str, Tensor]) -> None:
    encoder = [pair(z, f"ed.enc{n}") for n in range(2)]
    decoder, cross = ([pair(z, f"ed.dec{n}.{kind}") for n in range(2)] for kind in ("self", "cross"))
    close(encoder_decoder_relevance(encoder, decoder, cross)[0], z["ed.R_qe"])


def test_gives_the_authors_numbers_for_two_streams(z: dict[str, Tensor]) -> None:
    """Text and image; after the last block only the text is read. They set the class token's own entry to 0."""
    R = Relevance.start(1, 5, 4, like=z["co.R_tt"])
    R = R.self_x(pair(z, "co.text0")).self_x(pair(z, "co.text1")).self_y(pair(z, "co.image0"))
    for n in (0, 1):
        R = R.cross_both(pair(z, f"co.cross{n}.ti"), pair(z, f"co.cross{n}.it"))
        R = R.self_x(pair(z, f"co.cross{n}.tt")).self_y(pair(z, f"co.cross{n}.ii"))
    R = R.cross_x(pair(z, "co.cross2.ti")).self_x(pair(z, "co.cross2.tt"))
    close(R.xy[0], z["co.R_ti"])
    R.xx[0, 0, 0] = 0
    close(R.xx[0], z["co.R_tt"])


def test_equals_the_loops() -> None:
    layers = [random_pair(2, 3, 5, 5, seed=n) for n in range(3)]
    for b in range(2):
        close(weighted_attention(*layers[0])[b], naive_weighted(*one(layers[0], b)))
        close(self_relevance(layers)[b], naive_self([one(layer, b) for layer in layers]))


def test_two_streams_equal_the_loops() -> None:
    """Rules in an odd order, each stream first in one of them."""
    xx, yy, xy, yx = (random_pair(2, 3, *shape, seed=n) for n, shape in enumerate([(5, 5), (4, 4), (5, 4), (4, 5)]))
    got = Relevance.start(2, 5, 4, like=xx[0])
    got = got.cross_x(xy).self_y(yy).cross_both(xy, yx).self_x(xx).turned().cross_x(yx).turned().self_y(yy)
    for b in range(2):
        want = NaiveStreams(5, 4)
        want.cross_x(one(xy, b))
        want.self_y(one(yy, b))
        want.co(one(xy, b), one(yx, b))
        want.self_x(one(xx, b))
        added_yx, added_yy = want.from_x(one(yx, b))
        want.yx, want.yy = want.yx + added_yx, want.yy + added_yy
        want.self_y(one(yy, b))
        for name in ("xx", "xy", "yx", "yy"):
            close(getattr(got, name)[b], getattr(want, name), name)


def test_rows_without_relevance_are_normalised_to_the_identity() -> None:
    R = torch.eye(3, dtype=torch.float64)[None].clone()
    R[0, 1] += torch.tensor([1.0, 2.0, 1.0])
    close(normalized(R)[0], naive_normalised(R[0]))
    close(normalized(R)[0, 1], torch.tensor([0.25, 1.5, 0.25], dtype=torch.float64))
    # A decoder that attends across before it has any relevance of its own.
    nothing = random_pair(1, 2, 3, 3)[0], torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    cross = random_pair(1, 2, 3, 4)
    got = encoder_decoder_relevance([random_pair(1, 2, 4, 4)], [nothing], [cross])
    assert got.isfinite().all()


@pytest.mark.parametrize("marked", [1, 3, 4])
def test_the_token_that_decides_is_ranked_first(marked: int) -> None:
    """The claim, in small: the class is read from one marked token, two layers down; the last layer looks elsewhere."""
    T, M = 6, 8
    x = torch.randn(T, M, dtype=torch.float64)
    x[marked, 0] = 5.0
    logits = torch.zeros(2, 1, 1, T, T, dtype=torch.float64)
    logits[0, ..., 2, marked] = 6.0  # position 2 copies the marked token, and position 0 reads position 2
    logits[1, ..., 0, 2], logits[1, ..., 0, 5] = 2.0, 3.0  # but looks more at 5
    weights = [one.softmax(-1).requires_grad_() for one in logits]
    h = x
    for w in weights:
        h = h + w[0, 0] @ h
    gradients = torch.autograd.grad(h[0, 0], weights)
    row = attention_relevance(weights, gradients)[0, 0].detach()
    raw = weights[1][0, 0, 0].detach()
    assert raw.argmax() == 5
    row[0] = 0
    assert row.argmax() == marked
    used = gradients[1][0, 0].ne(0).any(-1)
    assert used.tolist() == [True] + [False] * (T - 1), "only the class token's row of the last layer counts"


# --- transformers -------------------------------------------------------------------------------------------


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = BertForSequenceClassification(config).double().eval()
    model.set_attn_implementation("eager")
    return model


def test_gradients_of_a_model() -> None:
    """A head's output is A V, so that the gradient of A is that of the output times V."""
    model = bert()
    inputs = {"input_ids": torch.arange(10).reshape(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    inputs["attention_mask"][1, 3:] = 0
    found = attention_gradients(model, inputs, lambda out: out.logits[:, 1].sum())
    assert list(found) == ["attentions"]
    layers = found["attentions"]
    assert not any(a.requires_grad or g.requires_grad for a, g in layers)
    assert not layers[1][1][:, :, 1:].any(), "in the last layer only [CLS] is read"
    assert all(p.grad is None for p in model.parameters())

    outputs: list[Tensor] = []
    values: list[Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.attention.self.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
        layer.attention.self.value.register_forward_hook(lambda _, __, out: values.append(out))
    gradients = torch.autograd.grad(model(**inputs).logits[:, 1].sum(), outputs)
    for (_, got), gradient, value in zip(layers, gradients, values, strict=True):
        heads = [x.reshape(2, 5, 2, 8).transpose(1, 2) for x in (gradient, value.detach())]
        close(got, heads[0] @ heads[1].mT)
    R = self_relevance(layers)
    assert R[0, 0].gt(0).sum() > 1
    assert not R[1, :3, 3:].any(), "padding has no relevance"


def test_encoder_decoder_model() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double().eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.arange(1, 7)[None], "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    found = attention_gradients(model, inputs, lambda out: out.logits[0, -1, 3])
    R = encoder_decoder_relevance(found["encoder_attentions"], found["decoder_attentions"], found["cross_attentions"])
    assert R.shape == (1, 3, 6)
    assert R[0, -1].gt(0).any()


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"self_relevance: layers is empty \(got \[\]\)"):
        self_relevance([])
    with pytest.raises(ValueError, match=r"self_relevance: attention .*\(got \(2, 3, 3\)\); expected \(B, H, T, T\)"):
        self_relevance([(torch.ones(2, 3, 3).double(), torch.ones(2, 3, 3).double())])
    good = random_pair(1, 2, 3, 3)
    with pytest.raises(
        ValueError, match=r"Relevance.self_x: gradient .*\(got \(1, 2, 3, 4\)\); expected \(B = 1, H = 2, T = 3"
    ):
        self_relevance([(good[0], random_pair(1, 2, 3, 4)[0])])
    with pytest.raises(ValueError, match=r"cross has another number of layers than decoder \(got 0\); expected 1"):
        encoder_decoder_relevance([good], [good], [])
    model = bert()
    inputs = {"input_ids": torch.arange(5)[None]}
    with pytest.raises(ValueError, match=r"target gave no scalar \(got \(1, \d\)\)"):
        attention_gradients(model, inputs, lambda out: out.logits)
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match=r"model has attention that no gradient reaches \(got 'sdpa'\); expected \"eager\""
    ):
        attention_gradients(model, inputs, lambda out: out.logits.sum())

"""Models whose heads read one row, several texts or no padding are swapped; what padding does is checked there too."""

from unittest import mock

import pytest
import torch

import regard
from regard.integrations import transformers_check

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2,
    "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "n_embd": 32, "n_layer": 2,
    "n_head": 2, "ffn_dim": 48, "word_embed_proj_dim": 32,
}  # fmt: skip
HEADS = [
    "LlamaForQuestionAnswering", "GPT2ForQuestionAnswering", "OPTForQuestionAnswering", "MistralForQuestionAnswering",
    "T5ForQuestionAnswering", "LlamaForSequenceClassification", "MistralForSequenceClassification",
    "GPT2ForSequenceClassification", "T5ForSequenceClassification", "BartForSequenceClassification",
    "BertForMultipleChoice", "BertForNextSentencePrediction", "BertForSequenceClassification", "BertModel",
    "BertForTokenClassification", "T5ForConditionalGeneration",
]  # fmt: skip
FORMS = {"no pad token": {}, "pad token": {"pad_token_id": 0}, "decoder": {"pad_token_id": 0, "is_decoder": True}}


def model(head, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, head)
    return kind(kind.config_class(**{**SIZES, **options})).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", HEADS)
def test_heads_are_swapped(head, form):
    its = model(head, **FORMS[form])
    ids = torch.arange(5, 12)[None]
    if 0 <= (its.config.eos_token_id or -1) < SIZES["vocab_size"]:
        ids[0, -1] = its.config.eos_token_id
    given = {"input_ids": ids[None] if "Choice" in head else ids}
    if its.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    with torch.no_grad():
        before = its(**given)[0]
        with regard.swap(its, "softmax"):
            torch.testing.assert_close(its(**given)[0], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4, 2])
def test_a_row_of_padding_that_sees_nothing_is_not_what_is_read(window):
    """With a short window a padded row sees nothing: eager takes an even mean there, and regard 0."""
    its = model("MistralForSequenceClassification", pad_token_id=0, sliding_window=window)
    regard.swap(its, "softmax").restore()


@pytest.mark.parametrize("head", ["LlamaForSequenceClassification", "LlamaForQuestionAnswering", "BertModel"])
def test_what_is_wrong_beside_padding_alone_is_still_refused(head):
    compute, its = transformers_check.compute, model(head, pad_token_id=0)

    def wrong(problem):
        """Right for the first text, which has no padding; not for the others."""
        out = compute(problem)
        return torch.cat([out[:1], out[1:] / 2])

    with mock.patch.object(transformers_check, "compute", wrong), pytest.raises(ValueError, match="does not give"):
        regard.swap(its, "softmax")

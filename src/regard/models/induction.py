"""A two-layer Llama with one head that looks at the previous token and one induction head, set by hand.

Where a token was seen before, it predicts what followed then: A B ... A -> B. As it is known which head does what, it
is an oracle for everything that looks for such heads, edits them, or drops parts of their caches.

The circuit is that of Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and Olsson et al. 2022,
"In-context Learning and Induction Heads" (arXiv 2209.11895): a head of the first layer writes which token came before;
a head of the second compares that with the present token, and copies the token that it finds.
"""

from typing import Any

import torch
from torch import nn

from regard.checks import whole

PREVIOUS, INDUCTION = (0, 0), (1, 1)
"""Layer and head of the two. The others attend evenly and write nothing."""

WIDTH, SLOW = 128, 32
"""Of a head, and its first pair of dimensions that a rotary embedding of base 1e8 turns by at most 1e-4 a token."""

SHARP = 25.0
"""Of queries and keys: scores that differ by SHARP^2 / sqrt(WIDTH) = 55 leave nothing to the smaller ones."""


@torch.no_grad()
def hand_built(vocab: int = 32, *, length: int = 1024) -> nn.Module:
    """A transformers LlamaForCausalLM of 2 layers and 2 heads, in float32.

    Token 0 begins every sequence and comes nowhere else. Where the present token was never seen, the induction head
    attends to that beginning and writes nothing; where it was seen several times, to all of them alike.

    Args:
        vocab: tokens, the beginning's included: 2 to 32.
        length: the longest sequence (`max_position_embeddings`), at most 2048.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    whole("hand_built", 2, vocab=vocab, most=WIDTH // 2 - SLOW)
    whole("hand_built", 2, length=length, most=2048)
    names = torch.arange(vocab)
    token, before, found, one = names, vocab + names, 2 * vocab + names, 3 * vocab  # what the residual stream holds
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=3 * vocab + 2,
            intermediate_size=1,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=WIDTH,
            max_position_embeddings=length,
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            rms_norm_eps=1e-12,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.zero_()
    model.model.embed_tokens.weight[names, token] = 1
    model.model.embed_tokens.weight[:, one] = 1
    # So many ones are in the stream before each norm, which gives them back as ones.
    first, second = model.model.layers
    for norm, ones in ((first.input_layernorm, 2), (second.input_layernorm, 3), (model.model.norm, 4)):
        norm.weight.fill_((ones / (3 * vocab + 2)) ** 0.5)

    # Query and key are the same everywhere, but for a turn by one token: the sum of cosines is largest one token back.
    q, k, v, o = _head(first.self_attn, PREVIOUS[1])
    turn = 1e8 ** (-torch.arange(SLOW // 2) / (WIDTH // 2))
    q[: SLOW // 2, one] = SHARP
    k[: SLOW // 2, one], k[WIDTH // 2 : WIDTH // 2 + SLOW // 2, one] = SHARP * turn.cos(), SHARP * turn.sin()
    v[names, token] = 1
    o[before, names] = 1

    # The query names the present token, a key the one before it. Nothing is called 0, so that this place is free for
    # the beginning, at which every query looks a little.
    q, k, v, o = _head(second.self_attn, INDUCTION[1])
    q[SLOW + names[1:], token[1:]], k[SLOW + names[1:], before[1:]] = SHARP, SHARP
    q[SLOW, one], k[SLOW, token[0]] = SHARP, SHARP / 2
    v[names[1:], token[1:]] = 1
    o[found, names] = 1
    model.lm_head.weight[names, found] = 20
    return model


def _head(attention: Any, h: int) -> tuple[torch.Tensor, ...]:
    """Its rows of the projections of queries, keys and values, and its columns of the output's."""
    rows = slice(h * WIDTH, (h + 1) * WIDTH)
    return tuple(getattr(attention, f"{name}_proj").weight[rows] for name in "qkv") + (
        attention.o_proj.weight[:, rows],
    )

"""Linear additive attention (Ladaformer): one query for all tokens, times each one's key and value."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import fits, flag
from regard.kernels.check import check_inputs
from regard.linear._shared import RecurrentMixer, repeat_heads, widened
from regard.linear.latte import LatteState, causal_latte_attention, latte_attention

CARD = Card(
    "lada",
    equation="""[q k v] = x W_qkv + b,   a_th = softmax_t((W_a q_t + b_a)_h / sqrt(D))      W_a: M -> H, of all heads' q
g_h = sum_t a_th q_th      causal: softmax and sum over s <= t, so that there is a g_th
y_t = W_o concat_h(g_h * k_th * v_th) + b_o      * elementwise""",
    papers=(
        Paper(
            "Efficient generative adversarial networks using linear additive-attention Transformers",
            "Morales-Juarez, Fuentes-Pineda",
            2024,
            "2401.09596",
            "abstract; official code, PyTorch's and TensorFlow's",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "gqa", "streaming", "compile"},
    lacks={"cross": "a token's output is made of its own key and value, so that both sequences would be one"},
    traits={"linear_in_values", "position_free", "shift_invariant"},
    cost=Cost("B*T*H*(H*D + D)", "H*(D + 1)"),
    claim="Tokens share one vector a head and nothing else: another token's value changes nothing: "
    "tests/linear/test_lada.py::test_another_tokens_value_changes_nothing.",
    differs=(
        "Hidden tokens are left out of the softmax, the causal form keeps a running average, and key heads may be "
        "fewer; the authors' code has neither masks nor these.",
        "Matrices start as in the authors' PyTorch code, as torch has them; in their TensorFlow code they start "
        "orthogonal.",
        "Both blocks stand in `regard.linear.lada_blocks`; the generator and discriminator around them, and their "
        "training, are left out.",
    ),
    verified="third-party",
    defaults={"bias": "code"},
)


def lada_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    scores: Float[Tensor, "B H T"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    causal: bool = False,
    state: LatteState | None = None,
) -> tuple[Float[Tensor, "B H T D"], LatteState | None]:
    """g * k_t * v_t with g = sum_t softmax(scores / sqrt(D))_t q_t, and the state after these tokens if causal.

    Args:
        scores: of each token and head, before they are divided by sqrt(D).
        keep: True at real tokens; g is 0 where there is none.
        causal: g is the average of the tokens so far. Hand `state` back in to go on with a sequence.
    """
    check_inputs(q, k, v)
    B, H, T, D = q.shape
    fits("lada_attention", "B H T", {"B": B, "H": H, "T": T}, scores=scores)
    fits("lada_attention", "B G T D", {"B": B, "T": T, "D": D}, k=k, v=v)
    flag("lada_attention", causal=causal)
    q, k, v, scores = widened(q, k, v, scores)
    at = (scores / D**0.5).unsqueeze(-1)
    # An average by weights that don't depend on who asks is latent attention with one latent.
    if causal:
        g, state = causal_latte_attention(torch.zeros_like(at), at, q, keep=keep, state=state)
    else:
        g, state = latte_attention(torch.zeros_like(at[:, :, :1]), at, q, keep=keep), None
    return g * repeat_heads(k * v, H), state


@CARD.module
class LinearAdditiveAttention(RecurrentMixer):
    """Time and memory linear in the number of tokens; nothing but one vector a head goes from token to token.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal: as of `HeadMixer`.
        bias: whether the four projections have one; the scores' always has.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=causal, bias=bias)
        self.score_proj = nn.Linear(num_heads * self.head_dim, num_heads)

    def run(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G T D"],
        v: Float[Tensor, "B G T D"],
        keep: Bool[Tensor, "B T"] | None,
        state: LatteState | None,
    ) -> tuple[Float[Tensor, "B H T D"], LatteState | None]:
        (wide,) = widened(q)
        weight, bias = (p.to(wide.dtype) for p in (self.score_proj.weight, self.score_proj.bias))
        scores = F.linear(wide.transpose(1, 2).flatten(2), weight, bias).mT
        return lada_attention(q, k, v, scores, keep=keep, causal=self.causal, state=state)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LatteState:
        shape = (batch_size, self.num_heads, 1)
        averages = torch.zeros(*shape, self.head_dim, device=device, dtype=dtype)
        return LatteState(averages, torch.full(shape, -torch.inf, device=device, dtype=dtype))

"""Mixture-of-head attention: some heads serve every token, and each token picks a few of the others."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, number, refuse, whole
from regard.stages import Gate, GateSite

CARD = Card(
    "moh",
    equation="""y = sum_h g_h(x) O_h W_oh,   [a1, a2] = softmax(x W_k);   hs heads are shared, E = H - hs routed
code:   g_h = 2 a1 hs softmax(x W_s)_h for shared,   2 a2 K softmax(x W_r)_h / sum of the K greatest for these, 0 else
paper:  g_h = a1 softmax(x W_s)_h for shared,   a2 softmax(x W_r)_h for the K greatest, 0 else
loss = sum_e P_e f_e,   P_e the mean of softmax(x W_r)_e, f_e how often e is picked;   times E in the code form""",
    papers=(
        Paper(
            "MoH: Multi-Head Attention as Mixture-of-Head Attention",
            "Jin, Zhu, Yuan, Yan",
            2024,
            "2410.11842",
            "sections 1-4; official code",
        ),
    ),
    traits={"linear_in_values", "position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D + B*T*M*(H + 2)", "2*S*G*D"),
    claim="Each token uses the shared heads and K others, and no more: "
    "tests/heads/test_moh.py::test_a_token_uses_the_shared_heads_and_those_it_picks.",
    differs=(
        "All heads are computed, and those that a token doesn't use are multiplied by 0.",
        "With one shared head there is no router for it, as in the code for images; the diffusion code fails there.",
        "The router without parameters of the continued LLaMA3 is `moh_norm`.",
        "The loss counts all tokens, padding as well: a gate is told of no mask.",
    ),
    verified="third-party",
    auxiliary="balance_loss",
    tries={"shared_heads": 2, "active": 2},
    defaults={
        "shared_heads": "paper, MoH-LLaMA3-8B",
        "active": "paper, MoH-LLaMA3-8B",
        "form": "code",
        "auxiliary_weight": "paper",
    },
)

Form = Literal["code", "paper"]


def picked(logits: Float[Tensor, "B T E"], active: int) -> Bool[Tensor, "B T E"]:
    """Which routed heads each token uses: those of the K greatest logits."""
    return torch.zeros_like(logits).scatter(-1, logits.topk(active, -1).indices, 1.0) > 0


def routed_gates(logits: Float[Tensor, "B T E"], active: int, form: Form) -> Float[Tensor, "B T E"]:
    """A gate for each routed head, 0 for those not picked; in the code form they sum to K."""
    gates = logits.softmax(-1) * picked(logits, active)
    if form == "paper":
        return gates
    return active * gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)


def balance(
    logits: Float[Tensor, "B T E"], active: int, form: Form, keep: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, ""]:
    """How unevenly heads are picked, over all tokens; what is picked takes no gradient, the probabilities do.

    Args:
        keep: True = a token that counts.
    """
    shares = torch.stack([logits.softmax(-1), picked(logits, active).to(logits.dtype)])  # 2 B T E
    if keep is not None:
        shares = shares.masked_fill(~keep[..., None], 0)
    total = logits.shape[0] * logits.shape[1] if keep is None else keep.sum()
    odds, often = shares.sum((1, 2)) / torch.as_tensor(total, device=logits.device).clamp(min=1)
    uneven = (odds * often).sum()
    return logits.shape[-1] * uneven if form == "code" else uneven


def dealt(who: object, num_heads: int, shared_heads: int | None, active: int | None) -> tuple[int, int]:
    """How many heads are shared, by default half, and how many of the others a token uses, by default a quarter of
    all and at least one where there are others."""
    shared_heads = num_heads // 2 if shared_heads is None else shared_heads
    whole(who, 0, most=num_heads, shared_heads=shared_heads)
    others = num_heads - shared_heads
    active = min(others, max(1, num_heads // 4)) if active is None else active
    whole(who, 0, most=others, active=active)
    if not shared_heads + active:
        refuse(who, "active", "leaves no head", active, "at least 1 where shared_heads = 0")
    return shared_heads, active


@CARD.fills("gate")
class MixtureOfHeads(Gate):
    """Gates the heads' outputs by their own tokens. Add `auxiliary_weight * balance_loss(...)` to the task's loss.

    Args:
        shared_heads: hs, the first ones; default H / 2.
        active: K, how many of the others a token uses; default H / 4, at least 1 where there are others.
        form: how gates are scaled: as coded, where flat routers give 1, or as printed, where all sum to at most 1.
        auxiliary_weight: what training multiplies `balance_loss` by.
    """

    site: GateSite = "output"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int | None = None,
        active: int | None = None,
        form: Form = "code",
        auxiliary_weight: float = 0.01,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        shared_heads, active = dealt(self, num_heads, shared_heads, active)
        others = num_heads - shared_heads
        choice(self, get_args(Form), form=form)
        number(self, least=0, auxiliary_weight=auxiliary_weight)
        self.dim, self.num_heads, self.shared_heads, self.active = dim, num_heads, shared_heads, active
        self.form, self.auxiliary_weight = form, auxiliary_weight
        self.router = nn.Linear(dim, others, bias=False) if active else None
        self.kind = nn.Linear(dim, 2, bias=False) if active and shared_heads else None
        self.shared = nn.Linear(dim, shared_heads, bias=False) if shared_heads > 1 else None

    def gates(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T H"]:
        """In at least fp32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        found = []
        if self.shared_heads:
            odds = (
                x.new_ones(*x.shape[:2], 1, dtype=wide) if self.shared is None else self.shared(x).to(wide).softmax(-1)
            )
            found.append(self.shared_heads * odds if self.form == "code" else odds)
        if self.router is not None:
            found.append(routed_gates(self.router(x).to(wide), self.active, self.form))
        elif self.num_heads > self.shared_heads:
            found.append(x.new_zeros(*x.shape[:2], self.num_heads - self.shared_heads, dtype=wide))
        if self.kind is not None:
            kinds = self.kind(x).to(wide).softmax(-1) * (2 if self.form == "code" else 1)
            found = [gate * kind for gate, kind in zip(found, kinds.split(1, -1), strict=True)]
        return torch.cat(found, -1)

    def forward(self, z: Tensor, x: Float[Tensor, "B T M"], at: GateSite) -> Tensor:
        return z * self.gates(x).mT[..., None].to(z.dtype) if at == self.site else z

    def balance_loss(self, z: Tensor, x: Float[Tensor, "B T M"], at: GateSite) -> Float[Tensor, ""]:
        """What `forward` takes -> how unevenly its tokens pick heads; 0 where none are picked."""
        if at != self.site or self.router is None:
            return x.new_zeros(())
        logits = self.router(x)
        return balance(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.active, self.form)

    @torch.no_grad()
    def start_neutral(self) -> bool:
        """Flat routers: in the code form every head that is used has gate 1, so with all of them nothing changes."""
        for part in (self.router, self.kind, self.shared):
            if part is not None:
                nn.init.zeros_(part.weight)
        return self.form == "code"

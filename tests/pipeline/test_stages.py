"""What stages may read and where slots are said: parts made here stand in for mechanisms that will come."""

import typing

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import regard
from regard import masks
from regard.kernels import KERNELS
from regard.laws.agreement import close, close_all, run
from regard.laws.subject import perturb, tokens
from regard.pipeline import Attention, Weighted
from regard.pipeline.function import problem
from regard.slots import BEYOND, IN_KERNELS, SLOTS, Filled, InnerSlots, Slots, slot_of
from regard.stages import Made, Mix, Position, Rows, Score, Tokens, share

M, H, G, T = 24, 6, 2, 12
D = M // H


class ForgetGate(Position):
    """score_ij + c_i - c_j, c the running sum of log sigmoid(x W): made from tokens, carried on while streaming."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(M, H)

    def prepare(self, tokens: Tokens) -> Made:
        c = nn.functional.logsigmoid(self.proj(tokens.context)).mT[..., None].cumsum(2)  # (B, H, S, 1)
        if tokens.past is not None:
            c = c + tokens.past
        return Made(query=c[:, :, c.shape[2] - tokens.x.shape[1] :], key=c)

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        assert rows.made.query is not None
        assert rows.made.key is not None
        return rows.made.query - rows.made.key.mT


class RelativeTable(Position):
    """q_i . (P W_k)[i - j], with the layer's own key projection and a table that all layers share."""

    tied = ("table",)

    def __init__(self, span: int = 4) -> None:
        super().__init__()
        self.span = span
        self.table = nn.Parameter(torch.randn(2 * span, M))

    def prepare(self, tokens: Tokens) -> Made:
        return Made(whole=tokens.k_proj(self.table).unflatten(-1, (-1, D)))  # (2k, G, D)

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        at = (rows.i[:, None] - rows.j + self.span).clamp(0, 2 * self.span - 1)
        table = rows.made.whole.repeat_interleave(H // G, 1)
        return torch.einsum("bhid,ijhd->bhij", rows.q, table[at]) * D**-0.5


class Distance(Score):
    """-|q - k|^2 scale."""

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        k = rows.k.repeat_interleave(rows.q.shape[1] // rows.k.shape[1], 1)
        return -scale * (rows.q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)


class Asks(Score):
    """Half the dot product: reads what the pipeline has computed."""

    needs = frozenset({"scores"})

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        return rows.scores / 2


class TokenBias(Position):
    """u . x_i + w . x_j: a bias that reads the tokens themselves."""

    needs = frozenset({"tokens"})

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(M, 1), nn.Linear(M, 1)

    def bias(self, rows: Rows) -> Float[Tensor, "B 1 t s"]:
        assert rows.x is not None
        assert rows.context is not None
        return (self.left(rows.x) + self.right(rows.context).mT)[:, None].tanh()


class MadeMix(Mix):
    """Scores times a factor of the query's token, made beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(M, H)

    def prepare(self, tokens: Tokens) -> Made:
        return Made(query=self.proj(tokens.x).mT[..., None].sigmoid())

    def forward(self, z: Tensor, rows: Rows) -> Tensor:
        assert rows.made.query is not None
        return z * rows.made.query


class Earlier(Mix):
    """Scores of the query before are added, times a factor of this one's token."""

    halo = 1

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(M, H)

    def prepare(self, tokens: Tokens) -> Made:
        return Made(query=self.proj(tokens.x).mT[..., None].sigmoid())

    def forward(self, z: Tensor, rows: Rows) -> Tensor:
        assert rows.made.query is not None
        return z + rows.made.query * nn.functional.pad(z, (0, 0, 1, 0))[:, :, :-1]


PARTS = {
    "forget": {"position": ForgetGate},
    "table": {"position": RelativeTable},
    "distance": {"score": Distance},
    "asks": {"score": Asks},
    "tokens": {"position": TokenBias},
    "mix": {"score_mix": MadeMix},
    "all": {"position": ForgetGate, "score": Distance, "score_mix": MadeMix, "weight_mix": MadeMix},
}


def layer(case: str, **options) -> Attention:
    torch.manual_seed(0)
    made = Attention(
        M, H, num_kv_heads=G, **{"causal": True, **options}, **{k: part() for k, part in PARTS[case].items()}
    )
    perturb(made)
    return made.double().eval()


def naive(made: Attention, case: str, x: Tensor) -> Tensor:
    """The same by loops over pairs, from the layer's own projections."""
    B = x.shape[0]
    q, k, v = (p(x).unflatten(-1, (-1, D)) for p in (made.q_proj, made.k_proj, made.v_proj))
    out = torch.zeros(B, T, H, D, dtype=x.dtype)
    parts = {**PARTS[case]}
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                scores = []
                for j in range(i + 1):
                    s = q[b, i, h] @ k[b, j, g] * D**-0.5
                    if parts.get("score") is Distance:
                        s = -((q[b, i, h] - k[b, j, g]) ** 2).sum() * D**-0.5
                    elif parts.get("score") is Asks:
                        s = s / 2
                    if parts.get("position") is ForgetGate:
                        s = s + sum(
                            nn.functional.logsigmoid(made.position.proj(x[b, n]))[h] for n in range(j + 1, i + 1)
                        )
                    elif parts.get("position") is RelativeTable:
                        at = min(max(i - j + 4, 0), 7)
                        s = s + q[b, i, h] @ made.k_proj(made.position.table[at]).view(G, D)[g] * D**-0.5
                    elif parts.get("position") is TokenBias:
                        s = s + torch.tanh(made.position.left(x[b, i]) + made.position.right(x[b, j]))[0]
                    if "score_mix" in parts:
                        s = s * made.score_mix.proj(x[b, i])[h].sigmoid()
                    scores.append(s)
                weights = torch.stack(scores).softmax(0)
                if "weight_mix" in parts:
                    weights = weights * made.weight_mix.proj(x[b, i])[h].sigmoid()
                out[b, i, h] = weights @ v[b, : i + 1, g]
    return made.o_proj(out.flatten(2))


@pytest.mark.parametrize("case", PARTS)
def test_the_formula(case):
    made, x = layer(case), tokens(2, T, dim=M)
    close(made(x), naive(made, case, x))


@pytest.mark.parametrize("case", PARTS)
def test_every_kernel_that_can_agrees(case):
    """Values and all gradients, whichever kernel runs; those that can't say why."""
    x = tokens(2, T, dim=M)
    want = run(layer(case, kernel="eager"), x)
    able = []
    for name in KERNELS:
        made = layer(case, kernel=name)
        try:
            got = run(made, x)
        except (ValueError, NotImplementedError):
            continue
        able.append(name)
        close_all(got, want)
    assert "chunked" in able
    assert ("sdpa" in able) == (case in ("forget", "table", "tokens"))


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("window", [None, 4])
def test_steps_equal_the_whole(case, window):
    made = layer(case, mask=None if window is None else masks.window(window))
    x = tokens(2, T, dim=M)
    state, steps = made.init_state(2, T), []
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, T)):
        out, state = made.step(x[:, start:stop], state)
        steps.append(out)
    close(torch.cat(steps, 1), made(x))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sizes", [[1] * T, [3, 1, 5, 3]])
def test_steps_that_need_earlier_rows_know_what_was_made_of_them(window, sizes):
    torch.manual_seed(0)
    mask = None if window is None else masks.window(window)
    made = Attention(M, H, causal=True, mask=mask, position=ForgetGate(), score_mix=MadeMix(), weight_mix=Earlier())
    made, x = made.double().eval(), tokens(2, T, dim=M)
    state, steps = made.init_state(2, T), []
    for part in x.split(sizes, 1):
        out, state = made.step(part, state)
        steps.append(out)
    close(torch.cat(steps, 1), made(x))


def test_what_a_hidden_token_holds_is_not_carried_on():
    """NaN in a padded token reaches no later step by what stages make of the tokens; one that is seen does."""
    made, x = layer("all"), tokens(2, T, dim=M)
    x[0, 3] = torch.nan
    keep = torch.ones(2, T, dtype=torch.bool)
    keep[0, 3] = False
    for mask in (masks.padding(keep), None):
        state, steps = made.init_state(2, T), []
        with torch.no_grad():
            for t in range(T):
                out, state = made.step(x[:, t : t + 1], state, mask=mask)
                steps.append(out)
            got, want = torch.cat(steps, 1), made(x, mask=mask)
        assert torch.equal(got.isnan(), want.isnan())
        assert want[0, 4:].isnan().all() == (mask is None)
        close(got.nan_to_num(), want.nan_to_num())


def test_chunks_are_cut_right(monkeypatch):
    """What is made of tokens is cut with the rows and keys of every chunk."""
    from regard.kernels import chunked

    monkeypatch.setattr(chunked, "TILE_BYTES", 0)
    monkeypatch.setattr(chunked, "KEYS", 5)
    x = tokens(2, 50, dim=M)
    close(layer("all", kernel="chunked")(x), layer("all", kernel="eager")(x))
    close(layer("forget", kernel="chunked")(x), layer("forget", kernel="eager")(x))


def test_functions_have_no_tokens():
    q = torch.randn(1, H, T, D)
    for slots in ({"position": ForgetGate()}, {"position": TokenBias()}, {"score_mix": MadeMix()}):
        with pytest.raises(ValueError, match=r"reads the tokens behind q and k; use it in regard.Attention"):
            regard.attention(q, q, q, **slots)
    got = regard.attention(q, q, q, score=Distance())
    weights = (-torch.cdist(q, q).square() * D**-0.5).softmax(-1)
    torch.testing.assert_close(got, weights @ q)


def test_a_score_is_told_to_no_fused_kernel():
    plan = regard.plan(*torch.randn(3, 1, H, T, D), score=Distance())
    assert "score Distance is no scaled dot product" in plan.why_not["sdpa"]
    assert "scores" not in vars(Distance)


# --- slots, said once ---------------------------------------------------------------------------------------


def test_slots_agree_wherever_they_are_declared():
    assert tuple(SLOTS) == tuple(Slots.__annotations__)
    assert set(InnerSlots.__annotations__) <= set(SLOTS)
    assert set(IN_KERNELS) == set(Filled.__dataclass_fields__)
    assert {*IN_KERNELS, "selector"} == set(InnerSlots.__annotations__)
    assert not set(BEYOND) & set(SLOTS)
    for name, hint in typing.get_type_hints(InnerSlots).items():
        assert SLOTS[name].kind in typing.get_args(hint)


@pytest.mark.parametrize("name", SLOTS)
def test_every_slot_reaches_everything(name):
    """The layer, the function, the plan and the errors know it, without having been told."""
    import inspect

    assert name in inspect.signature(Attention).parameters
    assert hasattr(Attention(M, H), name)
    with pytest.raises(TypeError, match=f"Attention: {name} has the wrong type"):
        Attention(M, H, **{name: object()})
    if name in InnerSlots.__annotations__:
        assert name in inspect.signature(regard.attention).parameters
        assert name in inspect.signature(regard.plan).parameters
        q = torch.randn(1, 1, 2, 2)
        with pytest.raises(TypeError, match=f"attention: {name} has the wrong type"):
            problem(q, q, q, **{name: object()})


def test_unknown_slots_are_named():
    q = torch.randn(1, 1, 2, 2)
    with pytest.raises(TypeError, match=r"argument or slot is unknown .got 'positon'.*did you mean 'position'"):
        regard.attention(q, q, q, positon=None)
    with pytest.raises(TypeError, match=r"Attention: argument or slot is unknown .got 'gates'.*did you mean 'gate'"):
        Attention(M, H, gates=None)


def test_slot_of():
    assert slot_of(ForgetGate()) == "position"
    assert slot_of(Distance()) == "score"
    assert slot_of(masks.causal()) == "mask"
    assert slot_of(MadeMix()) is None
    assert slot_of(nn.Linear(1, 1)) is None


def test_shared_tables():
    """Tables that a paper has once for all layers become one; the rest stays each layer's own."""
    layers = [layer("table") for _ in range(3)]
    for n, made in enumerate(layers):
        nn.init.constant_(made.position.table, n)
    share(*layers)
    assert len({id(made.position.table) for made in layers}) == 1
    assert len({id(made.q_proj.weight) for made in layers}) == 3
    x = tokens(1, T, dim=M)
    sum(made(x).sum() for made in layers).backward()
    assert layers[2].position.table.grad is layers[0].position.table.grad


# --- weights from elsewhere ---------------------------------------------------------------------------------


def test_weighted_values():
    """Weights made by one layer's scores, used by a layer that has none of its own."""
    torch.manual_seed(0)
    made = Weighted(M, H, num_kv_heads=G).double()
    x, weights = tokens(2, 7, dim=M), torch.randn(2, H, 5, 7).double()
    v = made.v_proj(x).unflatten(-1, (G, D))
    want = torch.zeros(2, 5, H, D).double()
    for h in range(H):
        want[:, :, h] = weights[:, h] @ v[:, :, h // (H // G)]
    close(made(x, weights), made.o_proj(want.flatten(2)))
    close(made(x, weights[:1]), made(x, weights[:1].expand(2, -1, -1, -1)))
    with pytest.raises(ValueError, match=r"Weighted: weights .* expected \(1 or B = 2, H = 6, T, S = 7\)"):
        made(x, weights[..., :6])


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("causal", r"mask=regard\.masks\.causal\(\)"),
        ("is_causal", r"mask=regard\.masks\.causal\(\)"),
        ("attn_mask", "mask= where True"),
        ("dropout_p", "did you mean 'dropout'"),
        ("gate", r"a slot of the layer regard\.Attention"),
        ("heads", r"a slot of the layer regard\.Attention"),
    ],
)
def test_what_goes_by_another_name_elsewhere_is_named(given: str, hint: str) -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(TypeError, match=rf"attention: argument or slot is unknown .got '{given}'.*{hint}"):
        regard.attention(q, q, q, **{given: None})


class ByPlace(Mix):
    """Scores times a number of the query's place."""

    def forward(self, z: Tensor, rows: Rows) -> Tensor:
        place = rows.i if rows.positions is None else rows.positions
        return z * (1 + place)[..., None, :, None].to(z.dtype).cos()


@pytest.mark.parametrize("earlier", [False, True])
@torch.no_grad()
def test_positions_reach_a_mix_in_the_full_pass_and_in_steps(earlier: bool) -> None:
    """In chunks as well, and where another mix needs earlier rows again, from documents of their own places."""
    torch.manual_seed(0)
    made = Attention(M, H, causal=True, score_mix=ByPlace(), weight_mix=Earlier() if earlier else None).double()
    x, at = torch.randn(2, 40, M).double(), torch.randint(40, (2, 40))
    want, plain = made(x, positions=at), made(x)
    assert (want - plain).abs().max() > 1e-3
    close(made(x, positions=torch.arange(40)), plain)
    made.kernel = "chunked"
    close(made(x, positions=at), want)
    state, outs = made.init_state(2, 40), []
    for piece in torch.arange(40).split([1, 3, 20, 1, 15]):
        y, state = made.step(x[:, piece], state, positions=at[:, piece])
        outs.append(y)
    close(torch.cat(outs, 1), want)

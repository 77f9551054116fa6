"""Head importance, ablation and pruning against loops and the authors' numbers (B029), and on models."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.inspect.analyses.naive_head_importance import (
    naive_gate_importance,
    naive_normalised,
    naive_pruned,
    naive_token_importance,
)
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from regard.inspect.analyses.head_importance import (
    ablate,
    gate_importance,
    head_importance,
    normalize_layers,
    prune,
    token_importance,
)
from regard.integrations.transformers import scale_heads
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[2] / "vectors" / "B029.npz"


@pytest.fixture(scope="module")
def z() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k: torch.from_numpy(file[k]) for k in file}


def test_by_hand() -> None:
    """L = g0 x - 2 g1 over two examples x = 1 and x = -3: |x| is 2 on average, |-2| is 2."""

    def loss(gates: Tensor) -> Tensor:
        return gates[0, 0] * torch.tensor([1.0, -3.0]) - 2 * gates[0, 1]

    assert head_importance(loss, 1, 2).tolist() == [[2.0, 2.0]]
    assert head_importance(lambda gates: loss(gates).mean(), 1, 2).tolist() == [[1.0, 2.0]], "one example: signs cancel"
    several = head_importance([loss, lambda gates: gates[0, 1] * 5], 1, 2)
    torch.testing.assert_close(several, torch.tensor([[4 / 3, (1 + 1 + 5) / 3 + 2 / 3]]))
    normal = normalize_layers(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(normal, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    kept = prune(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), [0.0, 0.25, 0.5, 1.0])
    assert [k.tolist() for k in kept] == [
        [[True, True], [True, True]],
        [[True, False], [True, True]],
        [[True, False], [False, True]],
        [[False, False], [False, False]],
    ]
    assert prune(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), [1.0], keep=1)[0].tolist() == [[True, False], [False, True]]


def test_gives_the_authors_numbers(z: dict[str, Tensor]) -> None:
    importance = token_importance(z["context"], z["grad_context"], z["mask"].bool())
    close(importance, z["importance"])
    close(normalize_layers(importance), z["importance_normalised"])
    close((z["context"] * z["grad_context"]).sum((-1, -2)), z["gate_grad_per_example"])
    close(gate_importance(z["context"], z["grad_context"]), z["gate_grad_per_example"].abs().mean(1))


@pytest.mark.parametrize("keep", [0, 1])
def test_prunes_what_the_authors_prune(z: dict[str, Tensor], keep: int) -> None:
    shares = [int(p) / 100 for p in z["percents"]]
    got = prune(z["importance_normalised"], shares, keep=keep)
    for step, gates in enumerate(got):
        assert torch.equal(gates, z[f"prune_keep{keep}.step{step}.gate"].bool()), step
    assert len({int(gates.sum()) for gates in got}) > 2


def test_equals_the_loops() -> None:
    outputs, gradients = torch.randn(2, 3, 2, 4, 5, 3, dtype=torch.float64)
    mask = torch.rand(2, 5) > 0.4
    close(gate_importance(outputs, gradients), naive_gate_importance(outputs, gradients))
    close(token_importance(outputs, gradients, mask), naive_token_importance(outputs, gradients, mask))
    whole = token_importance(outputs, gradients, mask, last_reads_one_token=False)
    close(whole[-1], naive_token_importance(outputs, gradients, mask)[-1] * 2 / mask.sum())
    importance = torch.rand(3, 4, dtype=torch.float64)
    close(normalize_layers(importance), naive_normalised(importance))
    for keep in range(4):
        want = naive_pruned(importance, [0, 8, 9, 30, 55, 90, 100], keep)
        got = prune(importance, [0.0, 0.08, 0.09, 0.3, 0.55, 0.9, 1.0], keep=keep)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_shares_are_not_lost_to_rounding() -> None:
    """0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996."""
    importance = torch.rand(10, 10)
    assert [100 - int(gates.sum()) for gates in prune(importance, [0.07, 0.29, 0.57, 0.58])] == [7, 29, 57, 58]


# --- a model that uses its heads unequally ------------------------------------------------------------------

PLACES = [1, 3, 4]
HEADS = 8


class Reader(nn.Module):
    """One layer of attention over 6 tokens; from the first position's output three tokens are named."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(8, 32), nn.Parameter(torch.randn(6, 32))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 24)

    def forward(self, ids: Tensor, gates: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        read = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.out((read[:, :, 0] * gates[0, :, None]).flatten(1)).unflatten(-1, (3, 8)).mT


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Trained to name the tokens at three places."""
    torch.manual_seed(1)
    model = Reader()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        ids = torch.randint(8, (64, 6))
        adam.zero_grad()
        F.cross_entropy(model(ids, torch.ones(1, HEADS)), ids[:, PLACES]).backward()
        adam.step()
    return model.eval()


def accuracy(model: Reader, gates: Tensor) -> float:
    ids = torch.randint(8, (512, 6), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float((model(ids, gates.float()).argmax(1) == ids[:, PLACES]).float().mean())


def losses(model: Reader, ids: Tensor, gates: Tensor) -> Tensor:
    return F.cross_entropy(model(ids, gates), ids[:, PLACES], reduction="none").mean(1)


def test_the_least_important_heads_can_go(reader: Reader) -> None:
    """The claim, in small."""
    ids = torch.randint(8, (64, 6), generator=torch.Generator().manual_seed(6))
    importance = head_importance(lambda gates: losses(reader, ids, gates), 1, HEADS)
    assert accuracy(reader, torch.ones(1, HEADS)) > 0.95
    (without_least,), (without_most,) = prune(importance, [0.25]), prune(-importance, [0.25])
    assert without_least.sum() == without_most.sum() == 6
    assert accuracy(reader, without_least) > 0.9
    assert accuracy(reader, without_least) > accuracy(reader, without_most) + 0.05


def test_ablation_is_each_head_alone(reader: Reader) -> None:
    found = ablate(lambda gates: accuracy(reader, gates), 1, HEADS)
    assert float(found.full) == accuracy(reader, torch.ones(1, HEADS))
    for head in range(HEADS):
        off, alone = torch.ones(1, HEADS), torch.zeros(1, HEADS)
        off[0, head], alone[0, head] = 0, 1
        assert float(found.without[0, head]) == accuracy(reader, off)
        assert float(found.only[0, head]) == accuracy(reader, alone)
    assert found.without.std() > 0.01


def test_gradients_by_gates_are_those_by_outputs(reader: Reader) -> None:
    """dL/dxi is the sum of output times its gradient."""
    ids = torch.randint(8, (5, 6))
    outputs: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor]) -> None:
        outputs.append(given[0])

    handle = reader.out.register_forward_pre_hook(keep)
    got = head_importance(lambda gates: losses(reader, ids, gates), 1, HEADS)
    value = losses(reader, ids, torch.ones(1, HEADS)).sum()
    (gradient,) = torch.autograd.grad(value, outputs[-1])
    handle.remove()
    shaped = [x.detach().reshape(1, 5, HEADS, 1, 4) for x in (outputs[-1], gradient)]
    torch.testing.assert_close(got, gate_importance(*shaped))


def test_a_transformers_model() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, num_labels=3
    )
    model = BertForSequenceClassification(config).double().eval()
    ids, labels = torch.randint(32, (2, 5)), torch.tensor([0, 2])

    def loss(gates: Tensor) -> Tensor:
        with scale_heads(model, gates):
            return F.cross_entropy(model(ids).logits, labels, reduction="none")

    got = head_importance(loss, 3, 4, gates=torch.ones(3, 4, dtype=torch.float64))
    step, want = 1e-6, torch.zeros(3, 4, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(3):
            for head in range(4):
                up, down = torch.ones(2, 3, 4, dtype=torch.float64)
                up[layer, head] += step
                down[layer, head] -= step
                want[layer, head] = ((loss(up) - loss(down)) / (2 * step)).abs().mean()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
    assert got.gt(0).all()


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"head_importance: num_layers is too small \(got 0\); expected an int >= 1"):
        head_importance(lambda gates: gates.sum(), 0, 2)
    with pytest.raises(
        ValueError, match=r"head_importance: losses give what .*\(got shape \(\), requires_grad=False\); expected"
    ):
        head_importance(lambda gates: torch.ones(()), 1, 2)
    with pytest.raises(ValueError, match=r"head_importance: gates .*\(got \(2,\)\); expected \(L = 1, H = 2\)"):
        head_importance(lambda gates: gates.sum(), 1, 2, gates=torch.ones(2))
    with pytest.raises(ValueError, match=r"head_importance: losses give no example \(got 0\)"):
        head_importance([], 1, 2)
    with pytest.raises(ValueError, match=r"gate_importance: outputs .*\(got \(2, 3\)\); expected \(L, B, H, T, D\)"):
        gate_importance(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"token_importance: mask has the wrong dtype \(got torch.float32"):
        token_importance(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"prune: keep is too large \(got 3\); expected an int from 0 to 2"):
        prune(torch.ones(1, 2), [0.5], keep=3)
    with pytest.raises(ValueError, match=r"prune: shares\[0\] is out of range \(got 50\); expected .*>= 0 and <= 1"):
        prune(torch.ones(1, 2), [50])
    with pytest.raises(ValueError, match=r"prune: importance is not finite everywhere \(got nan\)"):
        prune(torch.tensor([[1.0, torch.nan]]), [0.5])
    with pytest.raises(ValueError, match=r"ablate: num_heads is too small \(got 0\)"):
        ablate(lambda gates: 0.0, 1, 0)

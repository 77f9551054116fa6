"""Score mods and mask mods of the kinds that attention-gym lists, each written for one entry, as users write them.

PYTHONPATH=src:tests python -m scores.flex_mods     the largest differences to torch and to autograd through loops
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import regard
from regard.scores import ScoreMod
from scores.naive_score_mod import flex


@dataclass
class Case:
    """Two functions, the tensors that they close over and that want gradients, and sizes."""

    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    read: list[Tensor] = field(default_factory=list)
    T: int = 9
    H: int = 2
    G: int = 1

    def qkv(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = (2, self.H, self.T, 4), (2, self.G, self.T, 4), (2, self.G, self.T, 3)
        return [torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True) for n in shapes]

    def torchs(self) -> Tensor:
        """What torch's own gives, uncompiled."""
        q, k, v = (z.detach() for z in self.qkv())
        blocks = None
        if self.mask_mod is not None:
            blocks = create_block_mask(self.mask_mod, 2, self.H, self.T, self.T, device="cpu", BLOCK_SIZE=4)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention(q, k, v, score_mod=self.score_mod, block_mask=blocks, enable_gqa=True)

    def ours(self, q: Tensor, k: Tensor, v: Tensor, kernel: str = "auto") -> Tensor:
        mix = None if self.score_mod is None else ScoreMod(self.score_mod)
        return regard.attention(q, k, v, mask=self.mask_mod, score_mix=mix, kernel=kernel)

    def gradients(self, run: Callable[..., Tensor]) -> list[Tensor]:
        """Of a weighted sum of the outputs, to q, k, v and what is read."""
        given = self.qkv()
        out = run(*given)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        asked = [*given, *self.read]
        got = torch.autograd.grad((out * weights).sum(), asked, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(z) if g is None else g for g, z in zip(got, asked, strict=True)]

    def naive(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex(q, k, v, self.score_mod, self.mask_mod)[0]


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)


def alibi() -> Case:
    slopes = drawn(2)
    return Case(lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx), causal, [slopes])


def soft_cap() -> Case:
    cap = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    return Case(lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap), causal, [cap])


def relative_bias() -> Case:
    table = drawn(2, 17)
    return Case(lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx - kv_idx + 8], read=[table])


def bias_by_pair() -> Case:
    """Indexed in two steps, which says something else of index tensors that broadcast."""
    table = drawn(2, 9, 9)
    return Case(lambda score, b, h, q_idx, kv_idx: score + table[h][q_idx, kv_idx], read=[table])


def temperature() -> Case:
    raw = drawn(2)
    warm = raw.exp()  # what is read was itself computed
    return Case(lambda score, b, h, q_idx, kv_idx: score * warm[h] + raw[h] * kv_idx, causal, [raw])


def checkerboard() -> Case:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where((q_idx - kv_idx) % 2 == 0, 0.5 * score, torch.where(h == 0, 2 * score, -score))

    return Case(score_mod)


def squared_relu() -> Case:
    return Case(lambda score, b, h, q_idx, kv_idx: torch.relu(score).square(), causal)


def masked_by_score() -> Case:
    """The mask inside the score mod, with a row that sees nothing."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(q_idx > kv_idx, score, -float("inf"))

    return Case(score_mod)


def document() -> Case:
    ids = torch.tensor([[0] * 4 + [1] * 3 + [2] * 2, [0] * 6 + [1] * 3])
    return Case(mask_mod=lambda b, h, q_idx, kv_idx: (ids[b, q_idx] == ids[b, kv_idx]) & (q_idx >= kv_idx))


def prefix_lm() -> Case:
    n = torch.tensor([5, 2])
    return Case(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx < n[b]) | (q_idx >= kv_idx))


def sliding_window() -> Case:
    return Case(mask_mod=lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx <= 3))


def dilated() -> Case:
    step = torch.tensor([1, 3])
    return Case(mask_mod=lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx) % step[h] == 0) & ((q_idx - kv_idx).abs() <= 6))


def natten() -> Case:
    """The 3 x 3 keys around a pixel of a 4 x 4 image, moved inside at its rim."""
    Y, X = 4, 4

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        y, x = (q_idx // X).clamp(1, Y - 2), (q_idx % X).clamp(1, X - 2)
        return ((y - kv_idx // X).abs() <= 1) & ((x - kv_idx % X).abs() <= 1)

    return Case(mask_mod=mask_mod, T=16)


def window_or_sink() -> Case:
    return Case(
        mask_mod=lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & ((q_idx - kv_idx < 4) | (kv_idx < 2)), H=4, G=2
    )


def global_and_local() -> Case:
    far = torch.zeros(9, dtype=torch.bool)
    far[[0, 6]] = True
    return Case(mask_mod=lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx).abs() <= 2) | far[q_idx] | far[kv_idx])


def sliding_tiles() -> Case:
    """STA in one dimension: a query's tile sees whole tiles, the window's centre moved inside at the ends."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((q_idx // 3).clamp(1, 2) - kv_idx // 3).abs() <= 1

    return Case(mask_mod=mask_mod, T=12)


def batchified() -> Case:
    """Sequences of 5 in a row, each under the same rule."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx // 5 == kv_idx // 5) & causal(b, h, q_idx % 5, kv_idx % 5)

    return Case(mask_mod=mask_mod, T=10)


def empty_rows() -> Case:
    slopes = drawn(2)
    score_mod = lambda score, b, h, q_idx, kv_idx: score + slopes[h] * kv_idx  # noqa: E731
    return Case(score_mod, lambda b, h, q_idx, kv_idx: kv_idx < q_idx - 2, [slopes])


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        alibi,
        soft_cap,
        relative_bias,
        bias_by_pair,
        temperature,
        checkerboard,
        squared_relu,
        masked_by_score,
        document,
        prefix_lm,
        sliding_window,
        dilated,
        natten,
        window_or_sink,
        global_and_local,
        sliding_tiles,
        batchified,
        empty_rows,
    )
}


def differences() -> Iterator[tuple[str, str, float, float]]:
    """Case, kernel, and the largest difference to torch's values and to the naive gradients."""
    for name, make in CASES.items():
        case = make()
        kernels = ["eager", "chunked", *(["block_sparse"] if case.mask_mod is not None else [])]
        want, wanted = case.torchs(), case.gradients(case.naive)
        for kernel in kernels:
            value = float((case.ours(*case.qkv(), kernel=kernel) - want).abs().max().detach())
            got = case.gradients(lambda q, k, v, case=case, kernel=kernel: case.ours(q, k, v, kernel))
            yield name, kernel, value, max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))


if __name__ == "__main__":
    print(f"{'mod':18} {'kernel':13} {'value':>8} {'gradient':>8}")
    for name, kernel, value, gradient in differences():
        print(f"{name:18} {kernel:13} {value:8.1e} {gradient:8.1e}")

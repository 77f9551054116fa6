"""Somebody's own attention: one that is right, and the same with one thing wrong each."""

import torch
from torch import Tensor, nn


class Right(nn.Module):
    """Softmax attention written plainly, with causality, padding, masks, cross-attention and grouped keys."""

    def __init__(self, dim: int, num_heads: int, *, causal: bool = False, num_kv_heads: int | None = None):
        super().__init__()
        self.heads, self.groups, self.causal = num_heads, num_kv_heads or num_heads, causal
        self.width = width = dim // num_heads
        self.q = nn.Linear(dim, dim)
        self.k, self.v = (nn.Linear(dim, self.groups * width) for _ in "kv")
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.q.in_features:
            raise ValueError(f"x must be (B, T, {self.q.in_features}), got {tuple(x.shape)}; expected other sizes")
        source = x if context is None else context
        allowed = self.allowed(x, source, mask)
        repeat = self.heads // self.groups
        q, k, v = (z.unflatten(-1, (-1, self.width)).transpose(1, 2) for z in self.project(x, source, mask))
        k, v = (z.repeat_interleave(repeat, 1) for z in (k, v))
        weights = self.weights(self.scores(q, k), allowed)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(self.before(x, mask)), self.k(source), self.v(source)

    def before(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x

    def allowed(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        T, S = x.shape[1], source.shape[1]
        allowed = torch.ones(T, S, dtype=torch.bool, device=x.device)
        allowed = allowed.tril(S - T) if self.causal else allowed
        return (allowed if mask is None else allowed & mask).expand(x.shape[0], 1, T, S)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * q.shape[-1] ** -0.5

    def weights(self, scores: Tensor, allowed: Tensor) -> Tensor:
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        return weights.masked_fill(~allowed, 0)


class LooksAhead(Right):
    """One token."""

    def allowed(self, x, source, mask):
        allowed = super().allowed(x, source, mask)
        return (
            allowed | allowed.roll(1, -1) & (torch.arange(allowed.shape[-1], device=x.device) > 0)
            if self.causal
            else allowed
        )


class LooksAheadLate(Right):
    """One token, behind the first block of 64."""

    def allowed(self, x, source, mask):
        allowed = super().allowed(x, source, mask)
        late = (torch.arange(allowed.shape[-1], device=x.device) > 64) if self.causal else False
        return allowed | (allowed.roll(1, -1) & late) if self.causal else allowed


class FiniteFill(Right):
    """A query that may see nothing averages all values, hidden ones too."""

    def weights(self, scores, allowed):
        return scores.masked_fill(~allowed, -1e9).softmax(-1)


class Detached(Right):
    """No gradient reaches queries and keys."""

    def weights(self, scores, allowed):
        return super().weights(scores, allowed).detach()


class InSingle(Right):
    """The softmax is taken in float32, whatever comes in."""

    def weights(self, scores, allowed):
        return super().weights(scores.float(), allowed).to(scores.dtype)


class NoMaximum(Right):
    """exp without the row's largest score taken off."""

    def weights(self, scores, allowed):
        weights = scores.exp().masked_fill(~allowed, 0)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


class BatchStatistics(Right):
    """Tokens are centred over the batch."""

    def before(self, x, mask):
        return x - x.mean((0, 1), keepdim=True) if len(x) else x


class ReadsPositions(Right):
    """Nearer keys count a little more, though it is said to be free of positions."""

    def scores(self, q, k):
        at = [torch.arange(n, dtype=q.dtype, device=q.device) for n in (q.shape[2], k.shape[2])]
        return super().scores(q, k) - 0.01 * (at[0][:, None] - at[1]).abs()


class NormOverPadding(Right):
    """Queries are divided by the norm over all tokens, padding among them."""

    def before(self, x, mask):
        return x / (1 + x.square().mean(1, keepdim=True)).sqrt()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """A function of queries, keys and values."""
    T, S = q.shape[2], k.shape[2]
    allowed = torch.ones(T, S, dtype=torch.bool, device=q.device)
    allowed = allowed.tril(S - T) if causal else allowed
    allowed = allowed if mask is None else allowed & mask
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(~allowed, 0) @ v


class Running(nn.Module):
    """The mean of what came, one token after the other, between two maps: it streams."""

    def __init__(self, dim: int, num_heads: int, causal: bool = True):
        super().__init__()
        if not causal:
            raise ValueError("it only runs forward")
        self.into, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.init_state(x.shape[0], x.shape[1]))[0]

    def init_state(self, batch_size: int, capacity: int) -> tuple[Tensor, int]:
        return self.into.weight.new_zeros(batch_size, 1, self.into.out_features), 0

    def step(self, x: Tensor, state: tuple[Tensor, int]) -> tuple[Tensor, tuple[Tensor, int]]:
        total, count = state
        sums = total + self.into(x).tanh().cumsum(1)
        counts = count + torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
        last = sums[:, -1:] if x.shape[1] else total
        return self.out(sums / counts[:, None]), (last, count + x.shape[1])


class RunningForgets(Running):
    """What came before the last chunk is lost."""

    def step(self, x, state):
        return super().step(x, self.init_state(x.shape[0], x.shape[1]))

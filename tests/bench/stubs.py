"""Mechanisms of a caller's own, most of them with a fault. Workers import this file by its name."""

import os
import time
from pathlib import Path

import faulty
import torch
from torch import nn


class Good(nn.Module):
    """A causal running mean, which can stream."""

    def __init__(self, *, dim, num_heads, causal, width=1.0):
        super().__init__()
        assert causal
        self.proj = nn.Linear(dim, dim, bias=False)
        self.width = width

    def forward(self, x):
        return self.proj(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None] * self.width

    def init_state(self, batch_size, capacity):
        return {"sum": torch.zeros(batch_size, 1, self.proj.out_features), "seen": 0}

    def step(self, x, state):
        total = state["sum"] + self.proj(x).cumsum(1)
        count = state["seen"] + torch.arange(1, x.shape[1] + 1)[:, None]
        return total / count * self.width, {"sum": total[:, -1:], "seen": state["seen"] + x.shape[1]}


class Raises(Good):
    def forward(self, x):
        raise RuntimeError("this mechanism\nis broken")


class Diverges(Good):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Short(Good):
    """Knows 16 positions and no more. Cannot stream."""

    init_state = None

    def forward(self, x):
        if x.shape[1] > 16:
            raise ValueError(f"Short: length {x.shape[1]} exceeds 16")
        return super().forward(x)


class Hangs(Good):
    """Says in a file which process it hangs in."""

    def forward(self, x):
        Path(os.environ["STUB_PID"]).write_text(str(os.getpid()))
        time.sleep(600)


class Mapped(nn.Module):
    """A mixer of feature maps, by its own word."""

    protocol = "FeatureMixer"

    def __init__(self, *, dim, num_heads, causal):
        super().__init__()
        assert not causal
        self.mix = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return self.mix(x)


class Peeks(Good):
    """Sees one token ahead."""

    def forward(self, x):
        return super().forward(x) + torch.cat([x[:, 1:], 0 * x[:, :1]], 1)


class PeeksLate(Good):
    """Sees one token ahead once it has been trained."""

    def __init__(self, **given):
        super().__init__(**given)
        self.ahead = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x) + self.ahead * torch.cat([x[:, 1:], 0 * x[:, :1]], 1).detach()


class PeeksInTraining(Good):
    """Sees all that comes, while it is trained."""

    def forward(self, x):
        return super().forward(x) + (x.mean(1, keepdim=True) if self.training else 0)


class ReadsTheBatch(Good):
    """Knows what the other examples hold, while it is trained."""

    def forward(self, x):
        return super().forward(x) + (x.mean(0).cumsum(1) * 0.1 if self.training else 0)


class Forgets(Good):
    """No two calls are alike."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class ByFourier(Good):
    """The running sum as a convolution by Fourier transforms: causal but for rounding."""

    def forward(self, x):
        T = x.shape[1]
        ones = torch.fft.rfft(torch.ones(T, dtype=x.dtype), 2 * T)[:, None]
        return torch.fft.irfft(torch.fft.rfft(self.proj(x), 2 * T, 1) * ones, 2 * T, 1)[:, :T] / T


class Faulty(Good):
    """Does what `faulty.py` names in its constructor, or at a call from the first on."""

    def __init__(self, *, fault, at=0, **given):
        super().__init__(**given)
        self.fault, self.left = getattr(faulty, fault), at
        if at == 0:
            self.fault()

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            self.fault()
        return super().forward(x)

"""Small images: tell which digit was written, from its 8 x 8 pixels.

The data is scikit-learn's copy of the test set of "Optical Recognition of Handwritten Digits" (UCI; Alpaydin, Kaynak
1998). A quarter of it is held out.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import number
from regard.models.mixer import Mechanism
from regard.tasks import ACCURACY, Batch, Defaults, Metric, Size, Task, TaskError
from regard.tasks._pictures import classifier

SIDE = 8
CLASSES = 10


@cache
def images() -> tuple[Float[Tensor, "N 64 1"], Int[Tensor, " N"]]:
    """All pixels, from -1 to 1, and the digits; in an order that mixes the writers."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise TaskError('task digits: needs scikit-learn: pip install "regard[tasks]"') from None
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(pixels, dtype=torch.float32)[order, :, None] / 8 - 1, torch.tensor(digits)[order])


@dataclass(frozen=True)
class Digits(Task):
    """Pixels are tokens with learned positions, or a map; behind the layers stands the mean over them.

    A Pooler takes the place of that mean, behind layers of the baseline.
    """

    name: ClassVar[str] = "digits"
    gist: ClassVar[str] = "Tell which digit an 8 x 8 image shows."
    takes: ClassVar[Mapping[str, frozenset[str]]] = {
        kind: frozenset({"bidirectional"}) for kind in ("TokenMixer", "FeatureMixer", "Pooler")
    }
    metric: ClassVar[Metric] = ACCURACY
    loss_scale: ClassVar[float] = 1 / math.log(2)
    defaults: ClassVar[Defaults] = Defaults(
        steps=200,
        batch=64,
        dim=48,
        depth=2,
        heads=4,
        lr=3e-3,
    )

    heldout: float = 0.25
    """The share that is held out."""

    def __post_init__(self) -> None:
        number(self, above=0, below=1, heldout=self.heldout)

    @property
    def tokens(self) -> int:
        return SIDE * SIDE

    @property
    def parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(pixels, digits) to train on, and held out."""
        pixels, digits = images()
        end = round(len(digits) * (1 - self.heldout))
        return (pixels[:end], digits[:end]), (pixels[end:], digits[end:])

    def describe(self) -> str:
        return f"{len(images()[1])} handwritten digits of scikit-learn"

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(images()[0].numpy().tobytes()).hexdigest()
        return {**super().settings(), "fingerprint": digest}

    def model(self, mechanism: Mechanism, size: Size) -> nn.Module:
        return classifier(mechanism, size, nn.Linear(1, size.dim), SIDE, CLASSES, baseline=self.baseline)

    def example(self) -> Batch:
        return (images()[0][:1],)

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        (pixels, digits), _ = self.parts
        generator = torch.Generator().manual_seed(seed)
        while True:
            drawn = torch.randint(len(digits), (batch,), generator=generator)
            yield pixels[drawn], digits[drawn]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        pixels, digits = batch
        return F.cross_entropy(model(pixels).float(), digits)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        _, (pixels, digits) = self.parts
        told = torch.cat([model(x.to(device)).argmax(-1).cpu() for x in pixels.split(batch)])
        return {self.metric.main: (told == digits).double().mean().item()}, []

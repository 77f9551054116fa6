"""What the tests of feature maps share."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VECTORS = Path(__file__).parents[1] / "vectors"


def vectors(id: str, case: str) -> dict[str, Tensor]:
    """The numbers of one case of a file, without the case's prefix."""
    with np.load(VECTORS / f"{id}.npz") as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters and running statistics drawn anew, in float64, in eval mode."""
    module = module.double().eval()
    with torch.no_grad():
        for n, (name, z) in enumerate(module.state_dict().items()):
            if z.is_floating_point():
                drawn = 0.6 * normal(100 * seed + n, *z.shape)
                z.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return module


def gradients(out: Tensor, inputs: list[Tensor], seed: int = 9) -> list[Tensor]:
    """Of a random direction's product with the output."""
    return list(torch.autograd.grad((out * normal(seed, *out.shape)).sum(), inputs))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]

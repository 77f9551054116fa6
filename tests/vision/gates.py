"""What the tests of gates share."""

import numpy as np
import torch
from torch import Tensor, nn

from regard.laws.agreement import close
from vision.shared import VECTORS, gradients, leaves, normal, vectors

NORM = ("weight", "bias", "running_mean", "running_var")


def equals_the_loops(layer: nn.Module, got: Tensor, want: Tensor, x: Tensor) -> None:
    """Values, and gradients of the map and all parameters."""
    close(got, want)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


def statistics(norm: nn.Module) -> tuple[Tensor, ...]:
    """A batch norm as the loops take it."""
    return tuple(getattr(norm, name) for name in NORM)


def affine(*layers: nn.Module) -> list[Tensor]:
    """Weights and biases in turn."""
    return [z for layer in layers for z in (layer.weight, layer.bias)]


def gives_the_numbers(layer: nn.Module, file: str, case: str, names: dict[str, str], training: bool = False) -> None:
    """Outputs and every gradient that the file holds.

    Args:
        names: theirs to ours, of children or of tensors.
    """
    z = vectors(file, case)
    with np.load(VECTORS / f"{file}.npz") as held:
        x = z["x"] if "x" in z else torch.from_numpy(held["x"])
    layer = layer.double().train(training)
    state, found = layer.state_dict(), {}
    for theirs, ours in names.items():
        for key, value in z.items():
            if key == theirs or key.rpartition("__")[0] == theirs:
                name = ours if key == theirs else f"{ours}.{key.rpartition('__')[2]}"
                state[name], found[key] = value.reshape(state[name].shape), name
    layer.load_state_dict(state)
    (x,) = leaves(x)
    parameters = dict(layer.named_parameters())
    wanted = {key: parameters[name] for key, name in found.items() if f"g_{key}" in z}
    assert wanted
    assert parameters.keys() <= set(found.values()), "a parameter is not theirs"
    out = layer(x)
    close(out, z["y"])
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, *wanted.values()])
    for ours, key in zip(grads, ["gx", *(f"g_{key}" for key in wanted)], strict=True):
        close(ours, z[key].reshape(ours.shape))


def shuffled(x: Tensor, what: str, seed: int = 7) -> Tensor:
    """The same map with its rows, its columns or all its pixels in another order."""
    generator = torch.Generator().manual_seed(seed)
    if what == "pixels":
        return x.flatten(2)[..., torch.randperm(x.shape[2] * x.shape[3], generator=generator)].view(x.shape)
    axis = {"rows": 2, "columns": 3}[what]
    return x.index_select(axis, torch.randperm(x.shape[axis], generator=generator))


def moved_by(layer: nn.Module, what: str) -> float:
    """How far shuffling before differs from shuffling behind the layer."""
    x = normal(5, 2, layer.dim, 5, 7)
    with torch.no_grad():
        return float((layer(shuffled(x, what)) - shuffled(layer(x), what)).abs().max())

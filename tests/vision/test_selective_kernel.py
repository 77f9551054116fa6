"""Selective kernels against loops over channels, and timm's numbers (B199)."""

import pytest
import torch

from regard.laws.agreement import close
from regard.vision import SelectiveKernel
from vision.gates import equals_the_loops, statistics
from vision.naive_gates import selective_kernel
from vision.shared import filled, leaves, normal, vectors


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("paths", "groups", "sizes"), [(2, 1, (3, 4)), (3, 2, (4, 2)), (1, 4, (1, 2))])
def test_equals_the_loops(paths: int, groups: int, sizes: tuple[int, int], training: bool) -> None:
    layer = filled(SelectiveKernel(4, paths=paths, groups=groups, inner_dim=3)).train(training)
    (x,) = leaves(normal(1, 2, 4, *sizes))
    norms = [statistics(norm) for norm in layer.norms]
    mlp = (layer.mlp.down.weight, statistics(layer.mlp.norm), layer.mlp.up.weight)
    want = selective_kernel(x, [conv.weight for conv in layer.convs], norms, *mlp, training=training)
    equals_the_loops(layer, layer(x), want, x)


def test_weights_are_timms() -> None:
    z = vectors("B199", "sk")
    mlp = (layer := SelectiveKernel(12, inner_dim=4).double().eval()).mlp
    state = {f"norm.{name}": z[f"bn__{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    state |= {"down.weight": z["fc_reduce__weight"][..., 0, 0], "up.weight": z["fc_select__weight"][..., 0, 0]}
    mlp.load_state_dict(state | {"norm.num_batches_tracked": torch.tensor(0)})
    (x,) = leaves(z["x"])
    out = layer.weights(x)
    close(out, z["y"][..., 0, 0])
    close(out.sum(1), torch.ones(2, 12, dtype=x.dtype))
    got = torch.autograd.grad((out * z["w"][..., 0, 0]).sum(), [x, mlp.up.weight])
    close(got[0], z["gx"])
    close(got[1], z["g_fc_select__weight"][..., 0, 0])


def test_content_chooses_the_reach() -> None:
    """A bottleneck that reads the sign of the map takes all of one path, and so a reach of 1 or of 2 pixels."""
    layer = SelectiveKernel(1, inner_dim=2).double().eval()
    with torch.no_grad():
        for conv in layer.convs:
            conv.weight.fill_(1.0)
        layer.mlp.down.weight.copy_(torch.tensor([[1.0], [0.0]]))
        layer.mlp.up.weight.copy_(torch.tensor([[1e4, 0.0], [0.0, 0.0]]))
        layer.mlp.norm.bias.copy_(torch.tensor([-1.0, 0.0]))
        layer.mlp.norm.running_mean.fill_(0.0)
    reach = []
    for level in (1e-3, 10.0):
        (x,) = leaves(torch.full((1, 1, 9, 9), level, dtype=torch.float64))
        seen = torch.autograd.grad(layer(x)[0, 0, 4, 4], x)[0]
        reach.append(int((seen[0, 0].abs() > 1e-9).any(0).nonzero().sub(4).abs().max()))
    assert reach == [2, 1]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"paths is too small \(got 0\)"):
        SelectiveKernel(8, paths=0)
    with pytest.raises(ValueError, match=r"groups"):
        SelectiveKernel(8, groups=3)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 8, Y, X\)"):
        SelectiveKernel(8)(torch.zeros(2, 4, 3, 3))

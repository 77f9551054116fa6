"""Task-adapted attention against loops and the authors' numbers, and which scores a task may change.

The loops' author saw only an account of the equations, neither code nor tests.
"""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision import ShiftedWindowAttention, TaskAdapter, TaskBias, TaskScaledNorm
from regard.vision.maps import differences, in_windows
from regard.vision.swin import shift_mask
from regard.vision.task_adapted import TaskAdaptedAttention, _within
from regard.vision.task_host import TaskHost
from vision import naive_task_adapted as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def put(module: torch.nn.Module, z: dict[str, Tensor], names: dict[str, str]) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            part, _, kind = name.rpartition(".")
            p.copy_(z[f"p_{names[part]}{kind}"])


def as_map(windows: Tensor, samples: int, down: int) -> Tensor:
    """Windows of 3 x 3, those of a sample row by row, as a map (B, M, Y, X)."""
    z = windows.view(samples, down, -1, 3, 3, windows.shape[-1]).permute(0, 5, 1, 3, 2, 4)
    return z.flatten(4).flatten(2, 3)


def as_windows(x: Tensor) -> Tensor:
    return in_windows(x.permute(0, 2, 3, 1)[:, None], (3, 3))[:, 0]


def layer_of(z: dict[str, Tensor], heads: int) -> TaskAdaptedAttention:
    layer = TaskAdaptedAttention(z["x"].shape[2], heads, window=3, shift=0).double()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            for f, part in zip((layer.q_proj, layer.k_proj, layer.v_proj), z[f"p_qkv.{kind}"].chunk(3), strict=True):
                getattr(f, kind).copy_(part)
            getattr(layer.o_proj, kind).copy_(z[f"p_proj.{kind}"])
            getattr(layer.task_bias.film, kind).copy_(z[f"p_taa_attn.gb_weights.{kind}"])
        layer.table.copy_(z["p_relative_position_bias_table"].T.reshape(layer.table.shape))
        layer.task_bias.base.copy_(z["p_random_weight_matrix"])
    return layer


def test_gives_the_authors_numbers() -> None:
    z = vectors("B041", "win")
    layer = layer_of(z, 2)
    x, task = leaves(z["x"], z["task"])
    close(layer.task_bias(task)[:, 0], z["bias_map"])
    out = as_windows(layer(as_map(x, 2, 1), task))
    assert (out - z["out"]).abs().max() < 1e-10
    found = torch.autograd.grad((out * z["w"]).sum(), (x, task, layer.task_bias.base))
    for ours, theirs in zip(found, (z["gx"], z["g_task"], z["g_base"]), strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_gives_the_authors_numbers_under_their_mask() -> None:
    """Theirs is drawn at random, -100 where ours hides: so scores are formed here, with our parts alone."""
    z = vectors("B041", "shift")
    layer = layer_of(z, 4)
    x, task = leaves(z["x"], z["task"])
    q, k, v = layer._heads(x)
    bias = differences(layer.table, 3, 3) + layer.task_bias(task)
    scores = q @ k.mT / 2**0.5 + bias.repeat_interleave(4, 0) + z["mask"].repeat(2, 1, 1)[:, None]
    out = layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert (layer.task_bias(task)[:, 0] - z["bias_map"]).abs().max() < 1e-10
    assert (out - z["out"]).abs().max() < 1e-10
    found = torch.autograd.grad((out * z["w"]).sum(), (x, task, layer.task_bias.base))
    for ours, theirs in zip(found, (z["gx"], z["g_task"], z["g_base"]), strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_adapter_and_norm_give_the_authors_numbers() -> None:
    z = vectors("B041", "adapter")
    adapter = TaskAdapter(9, 6).double()
    names = {
        "embed": "emb_transf.",
        "film": "hidden_modulation.gb_weights.",
        "down": "down_proj_layer.",
        "up": "up_proj_layer.",
    }
    put(adapter, z, names)
    x, task = leaves(z["x"], z["task"])
    out = adapter(task, x)
    assert (out - z["out"]).abs().max() < 1e-10
    gx, g_task = torch.autograd.grad((out * z["w"]).sum(), (x, task))
    assert (gx - z["gx"]).abs().max() < 1e-10
    assert (g_task - z["g_task"]).abs().max() < 1e-10
    z = vectors("B041", "tsn")
    norm = TaskScaledNorm(6, 9).double()
    put(norm, z, {"": "", "film": "ln_weight_modulation.gb_weights."})
    (x,) = leaves(z["x"])
    out = norm(x, z["task"])
    assert (out - z["out"]).abs().max() < 1e-10
    assert (torch.autograd.grad((out * z["w"]).sum(), x)[0] - z["gx"]).abs().max() < 1e-10


@pytest.mark.parametrize(("sizes", "shift", "heads"), [((4, 6), 0, 2), ((6, 4), 1, 3), ((2, 2), 1, 1)])
def test_equals_the_loops(sizes: tuple, shift: int, heads: int) -> None:
    layer = filled(TaskAdaptedAttention(6, heads, window=2, shift=shift, task_dim=5))
    x, task = leaves(normal(1, 2, 6, *sizes), normal(2, 2, 5))
    bias = naive.task_bias(task, layer.task_bias.base, layer.task_bias.film.weight, layer.task_bias.film.bias, 2)
    three = (layer.q_proj, layer.k_proj, layer.v_proj)
    shift = 0 if max(sizes) <= 2 else shift
    rolled = x.roll((-shift, -shift), (2, 3))
    windows = in_windows(rolled.permute(0, 2, 3, 1)[:, None], (2, 2))[:, 0]
    mask = None
    if shift:
        mask = torch.where(shift_mask(sizes, (2, 2), (1, 1), x.device), 0.0, -1e9).double()
    want = naive.window_attention(
        windows, torch.cat([f.weight for f in three]), torch.cat([f.bias for f in three]), layer.o_proj.weight,
        layer.o_proj.bias, layer.table.flatten(1).T, heads, 2, bias=bias, mask=mask,
    )  # fmt: skip
    want = want.view(2, sizes[0] // 2, sizes[1] // 2, 2, 2, 6).permute(0, 5, 1, 3, 2, 4).reshape(2, 6, *sizes)
    want, got = want.roll((shift, shift), (2, 3)), layer(x, task)
    close(got, want)
    inputs = [x, task, *layer.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


def test_bias_adapter_and_norm_equal_the_loops() -> None:
    bias, task = filled(TaskBias(3, 4)), normal(1, 2, 4)
    film = (bias.film.weight, bias.film.bias)
    close(bias(task)[:, 0], naive.task_bias(task, bias.base, *film, 3))
    close(bias(task)[:, 0], naive.task_bias_chunks(task, bias.base, *film, 3))
    adapter, h = filled(TaskAdapter(4, 7)), normal(2, 2, 3, 7)
    pairs = [p for f in (adapter.embed, adapter.film, adapter.down, adapter.up) for p in (f.weight, f.bias)]
    assert adapter.down.weight.shape == (2, 7)
    close(adapter(task, h), naive.task_adapter(task, h, *pairs))
    norm = filled(TaskScaledNorm(7, 4))
    close(norm(h, task), naive.task_scaled_norm(h, task, norm.weight, norm.bias, norm.film.weight, norm.film.bias))


@torch.no_grad()
def test_a_task_changes_rows_alone() -> None:
    """Bit for bit nothing between rows of a window; and a sample's task is of no other sample."""
    layer = filled(regard.create("task_adapted", dim=6, num_heads=2, window=3, shift=0, task_dim=4))
    task, x = normal(1, 2, 4), normal(2, 2, 6, 6, 6)
    T = layer.task_bias(task).view(2, 3, 3, 3, 3)
    same = torch.eye(3, dtype=torch.bool)[:, None, :, None].expand(3, 3, 3, 3)
    assert not T[:, ~same].any()
    assert bool((T[:, same] != 0).all())
    other = task.clone()
    other[1] += 1
    before, after = layer(x, task), layer(x, other)
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().amax(0).min() > 1e-4, "all windows of the sample have it"


@torch.no_grad()
def test_without_adapters_it_is_the_backbone() -> None:
    layer = filled(regard.create("task_adapted", dim=6, num_heads=2, window=3, task_dim=4))
    frozen = ShiftedWindowAttention(6, 2, window=3).double()
    state = {name: p for name, p in layer.state_dict().items() if not name.startswith("task_bias")}
    frozen.load_state_dict(state)
    x, task = normal(1, 2, 6, 7, 5), normal(2, 2, 4)
    assert torch.equal(layer(x, None), frozen(x))
    layer.task_bias.base.zero_()
    assert (layer(x, task) - frozen(x)).abs().max() > 0.01, "beta is no offset of all keys"
    for p in layer.task_bias.film.parameters():
        p.zero_()
    close(layer(x, task), frozen(x))
    new = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in frozen.parameters())
    assert new == 9 * 3 + (4 + 1) * 6


@torch.no_grad()
def test_small_maps_have_the_first_rows_and_columns() -> None:
    """A window of 2 x 2 in the corner of one of 3 x 3."""
    layer = filled(TaskAdaptedAttention(4, 2, window=3, task_dim=4))
    x, task = normal(1, 2, 4, 2, 2), normal(2, 2, 4)
    corner = layer.task_bias(task).view(2, 1, 3, 3, 3, 3)[:, :, :2, :2, :2, :2].reshape(2, 1, 4, 4)
    close(layer.task_bias.rows(task, 2, 2), corner)
    q, k, v = (z.unflatten(2, (2, 2)) for z in layer._heads(x.flatten(2).mT))
    out = _within(q, k, v, corner + differences(layer.table, 2, 2), window=(2, 2))
    close(layer(x, task), layer._merged(out.flatten(2, 3), (2, 2)))
    assert layer(x[:0], task[:0]).shape == (0, 4, 2, 2)


def test_adapters_alone_separate_tasks() -> None:
    """Two tasks on the same images, with blocks that stay as they were drawn."""
    torch.manual_seed(0)
    host = TaskHost(1, 1, 12, 2, tasks=2, window=2, task_dim=8)
    for p in host.backbone():
        p.requires_grad_(False)
    x = torch.randn(16, 1, 8, 8)
    wanted = torch.stack([x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), -x[:, :, ::2, ::2]], 1)
    before = [p.clone() for p in host.backbone()]
    optimiser = torch.optim.Adam([p for p in host.parameters() if p.requires_grad], 5e-3)
    losses = []
    for _ in range(60):
        loss = torch.stack([(host(x, torch.full((16,), t)) - wanted[:, t]).square().mean() for t in range(2)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, host.backbone(), strict=True))
    assert len(before) > 0
    one, other = (host(x, torch.full((16,), t)) for t in range(2))
    assert (one - other).abs().mean() > 0.5
    mixed = host(x, torch.arange(16) % 2)
    torch.testing.assert_close(mixed[::2], one[::2], atol=1e-5, rtol=1e-5)


def test_the_host_reads_what_adapters_carry() -> None:
    host = filled(TaskHost(2, 3, 6, 2, tasks=2, window=2, depth=3, task_dim=4))
    x, task = normal(1, 2, 2, 4, 4), torch.tensor([1, 0])
    z, e, at = host.embed(x), host.tasks(task), []
    for block in host.blocks:
        z = block(z, e)
        at.append(z.flatten(2).mT)
    params = [[p for f in (a.embed, a.film, a.down, a.up) for p in (f.weight, f.bias)] for a in host.adapters]
    steps = iter(at)
    _, h = naive.with_adapters(e, torch.zeros_like(at[0]), [lambda _: next(steps)] * 3, params)
    h = host.norm(h)
    want = torch.stack([host.heads[1](h[0]), host.heads[0](h[1])])
    close(host(x, task).flatten(2).mT, want)


def test_starting_values_and_what_is_refused() -> None:
    layer = regard.create("task_adapted", dim=8, num_heads=2)
    assert layer.task_dim == 343
    assert not layer.task_bias.base.any()
    assert not layer.task_bias.film.bias.any()
    assert 0.015 < layer.task_bias.film.weight.std() < 0.025
    with pytest.raises(ValueError, match="task has the wrong shape"):
        layer(torch.zeros(2, 8, 7, 7), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="reduction is too small"):
        TaskAdapter(4, 6, reduction=0)

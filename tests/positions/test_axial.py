"""Axial and mixed rotary positions: grids, by their definitions and by transformers' and timm's numbers."""

import math
from types import SimpleNamespace

import pytest
import torch

import regard
from positions.naive import close, vectors
from positions.test_rotary import turned
from regard.positions import AxialRotary, RotaryMixed, centres, grid


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(z, at, *, base, frequencies, pairs):
    """One vector at the coordinates `at`: each pair, and where its channels stand, one by one."""
    D, A = len(z), len(at)
    n, out = D // (2 * A), z.clone()
    for c, p in enumerate(at):
        for a in range(n):
            w = base ** (-a / n) if frequencies == "own" else base ** (-(A * a + c) / (A * n))
            place = n * c + a
            low, high = {
                "half": (place, place + A * n),
                "axis": (2 * n * c + a, 2 * n * c + a + n),
                "neighbours": (2 * place, 2 * place + 1),
            }[pairs]
            cos, sin = math.cos(p * w), math.sin(p * w)
            out[low], out[high] = z[low] * cos - z[high] * sin, z[low] * sin + z[high] * cos
    return out


@pytest.mark.parametrize("pairs", ["half", "axis", "neighbours"])
@pytest.mark.parametrize("frequencies", ["own", "dealt"])
@pytest.mark.parametrize(("sizes", "D"), [((2, 3), 8), ((2, 3), 11), ((2, 2, 3), 16), ((3, 1, 2), 6)])
def test_matches_the_definition(sizes, D, frequencies, pairs):
    options = {"base": 50.0, "frequencies": frequencies, "pairs": pairs}
    part, N = AxialRotary(D, sizes=sizes, prefix=1, **options), 1 + math.prod(sizes)
    z, at = normal(2, 3, N, D), grid(*sizes, prefix=1)
    want = z.clone()
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (2, 3, N))).tolist():
        want[b, h, t] = naive(z[b, h, t], at[0, t].tolist(), **options)
    close(part.rotate(z, at), want)
    close(part.rotate(z, at.expand(2, -1, -1).double()), want)
    close(part.rotate(z, torch.arange(N)), want)  # counted row by row
    close(part.rotate(z, torch.arange(N).expand(2, -1)), want)


def test_grids():
    assert grid(2, 3).tolist() == [[[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]]
    assert grid(1, 2, 1, prefix=2).tolist() == [[[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]]]
    close(centres(2, 4, prefix=1, span=1.0)[0, [0, 1, -1]], torch.tensor([[0, 0], [-0.5, -0.75], [0.5, 0.75]]))


@torch.no_grad()
def test_scores_depend_on_the_distance_along_each_axis():
    layer = regard.create("rotary_axial", dim=24, num_heads=3, sizes=(4, 5), prefix=1).double()
    x, at = normal(2, 21, 24), grid(4, 5, prefix=1)
    want = layer(x)
    close(layer(x, positions=at), want)
    patches, places = x[:, 1:], at[:, 1:]
    alone = layer(patches, positions=places)
    close(layer(patches, positions=places + torch.tensor([3, 7])), alone)
    assert (layer(patches, positions=places * torch.tensor([1, 2])) - alone).abs().max() > 1e-3
    assert (layer(patches, positions=places.flip(-1)) - alone).abs().max() > 1e-3


@torch.no_grad()
def test_class_tokens_do_not_turn():
    part, z = AxialRotary(8, sizes=(2, 2), prefix=3), normal(1, 2, 7, 8)
    turned_ = part.rotate(z, torch.arange(7))
    assert torch.equal(turned_[:, :, :4], z[:, :, :4])  # the corner stands at 0 as well
    assert (turned_ - z)[:, :, 4:].abs().amax(-1).min() > 0
    dino = part.rotate(z, centres(2, 2, prefix=3))
    assert torch.equal(dino[:, :, :3], z[:, :, :3])
    assert (dino - z)[:, :, 3:].abs().amax(-1).min() > 0


@torch.no_grad()
def test_a_video_streams_frame_by_frame():
    layer = regard.create("rotary_axial", dim=24, num_heads=2, sizes=(1, 2, 3), causal=True).double()
    x, at = normal(2, 18, 24), grid(3, 2, 3)
    want = layer(x, positions=at)
    close(layer(x), want)
    for told in (False, True):
        state, outs = layer.init_state(2, 18), []
        for frame in range(3):
            now = slice(6 * frame, 6 * frame + 6)
            y, state = layer.step(x[:, now], state, **({"positions": at[:, now]} if told else {}))
            outs.append(y)
        close(torch.cat(outs, 1), want)


# --- transformers' and timm's numbers -----------------------------------------------------------------------


def embedding(model, name, **config):
    """A rotary module of transformers for heads of 16 channels, which asks its config for little."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    rope = {"rope_type": "axial", "rope_theta": 100.0}
    given = {"head_dim": 16, "rope_parameters": rope, **config}
    return module, getattr(module, name)(SimpleNamespace(**given))


def qwen2_vl(q, k, Y, X):
    module, turn = embedding("qwen2_vl", "Qwen2VLVisionRotaryEmbedding")
    cos, sin = turn(q, grid(Y, X)[0])
    q, k = (z.transpose(1, 2) for z in (q, k))
    return tuple(z.transpose(1, 2) for z in module.apply_rotary_pos_emb_vision(q, k, cos, sin))


def pixtral(q, k, Y, X):
    module, turn = embedding("pixtral", "PixtralVisionRotaryEmbedding")
    cos, sin = turn(q, grid(Y, X)[0])
    return module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=0)


def sam2(q, k, Y, X):
    module, turn = embedding(
        "sam2_video",
        "Sam2VideoVisionRotaryEmbedding",
        memory_attention_hidden_size=16,
        memory_attention_downsample_rate=1,
        memory_attention_num_attention_heads=1,
    )
    cos, sin = turn(q, grid(Y, X)[0])
    return module.apply_rotary_pos_emb_2d(q, k, cos, sin)


def gemma4(q, k, Y, X):
    module, turn = embedding("gemma4", "Gemma4VisionRotaryEmbedding")
    at = grid(Y, X)
    cos, sin = turn(q, at)
    return tuple(module.apply_multidimensional_rope(z, cos, sin, at, unsqueeze_dim=1) for z in (q, k))


def llama4(q, k, Y, X):
    """A square image; its class token comes last, and its axes are x, y."""
    module = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = {"image_size": Y, "patch_size": 1, "hidden_size": 16, "num_attention_heads": 1}
    turn = module.Llama4VisionRotaryEmbedding(SimpleNamespace(**config, rope_parameters={"rope_theta": 100.0}))
    q, k = (torch.cat((z, z[:, :, :1]), 2).transpose(1, 2) for z in (q, k))
    return tuple(z.transpose(1, 2)[:, :, :-1] for z in module.vision_apply_rotary_emb(q, k, turn(q)))


def dinov3(q, k, Y, X):
    module = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = {"rope_theta": 100.0, "hidden_size": 16, "num_attention_heads": 1, "image_size": 9, "patch_size": 1}
    turn = module.DINOv3ViTRopePositionEmbedding(SimpleNamespace(**config)).eval()
    cos, sin = turn(q.new_zeros(1, 3, Y, X, dtype=torch.float32))
    return module.apply_rotary_pos_emb(q, k, cos, sin)


SOURCES = {
    "qwen2_vl": (qwen2_vl, {}, lambda Y, X: grid(Y, X)),
    "pixtral": (pixtral, {"frequencies": "dealt"}, lambda Y, X: grid(Y, X)),
    "sam2": (sam2, {"pairs": "neighbours"}, lambda Y, X: grid(Y, X)),
    "gemma4": (gemma4, {"pairs": "axis"}, lambda Y, X: grid(Y, X)),
    "llama4": (llama4, {"pairs": "neighbours"}, lambda Y, X: grid(Y, X).flip(-1) + 1),
    "dinov3": (dinov3, {}, lambda Y, X: centres(Y, X)),
}
"""How q and k are turned there, and here: the options, and the coordinates of an image of Y x X."""


@pytest.mark.parametrize("name", SOURCES)
def test_images_turn_as_there(name):
    theirs, options, places = SOURCES[name]
    Y, X = (4, 4) if name == "llama4" else (4, 5)
    q, k = normal(2, 3, Y * X, 16), normal(2, 3, Y * X, 16, seed=1)
    part = AxialRotary(16, base=100.0, **options)
    for mine, want in zip((q, k), theirs(q, k, Y, X), strict=True):
        close(part.rotate(mine, places(Y, X)), want.double(), atol=2e-5)  # their angles are fp32
        assert (want - mine).abs().max() > 0.1


def test_eva_and_mixed_are_timms():
    """EVA-02's, trained at 3 x 3, on a grid of 4 x 5; and frequencies that timm drew."""
    z = {name: torch.as_tensor(value).double() for name, value in vectors("timm_rotary").items()}
    eva = AxialRotary(16, base=100.0, pairs="neighbours")
    close(eva.rotate(z["q"], grid(4, 5) * torch.tensor([3 / 4, 3 / 5])), z["eva"], atol=2e-6)
    mixed = RotaryMixed(16, 3).double()
    with torch.no_grad():
        mixed.freqs.copy_(z["freqs"])
        close(mixed.rotate(z["q"], grid(4, 5)), z["mixed"], atol=2e-6)


# --- RoPE-Mixed ---------------------------------------------------------------------------------------------


def test_mixed_matches_the_definition():
    part, q, k = (
        RotaryMixed(8, 4, num_kv_heads=2, prefix=1, sizes=(2, 3)).double(),
        normal(2, 4, 7, 8),
        normal(2, 2, 7, 8),
    )
    at = grid(2, 3, prefix=1)
    for z in (q, k):
        got, want = part.rotate(z, at), z.clone()
        for b, h, t in torch.cartesian_prod(*map(torch.arange, (2, z.shape[1], 7))).tolist():
            u, v = part.freqs[:, h // (z.shape[1] // 2)].tolist()
            y, x = at[0, t].tolist()
            want[b, h, t] = turned(z[b, h, t], 1, [y * a + x * b for a, b in zip(u, v)], interleaved=True)
        close(got, want)
        close(part.rotate(z, torch.arange(7)), want)


def test_mixed_starts_as_the_authors_code():
    """Half of the pairs along a random direction of each head, half across, each at speeds base^(-4a/D)."""
    torch.manual_seed(0)
    u, v = RotaryMixed(16, 5).double().freqs.detach()
    close(torch.hypot(u, v), torch.tensor([10 ** (-a / 4) for a in range(4)] * 2).expand(5, 8), atol=1e-6)
    angle = torch.atan2(u, v)
    close(angle[:, :4], angle[:, :1].expand(-1, 4), atol=1e-5)
    close((angle[:, 4:] - angle[:, :4]).remainder(2 * math.pi), torch.full((5, 4), math.pi / 2), atol=1e-5)
    assert angle[:, 0].std() > 0.1


@torch.no_grad()
def test_mixed_scores_depend_on_the_vector_between_tokens():
    layer = regard.create("rotary_mixed", dim=24, num_heads=3, sizes=(4, 5)).double()
    x, at = normal(2, 20, 24), grid(4, 5)
    want = layer(x, positions=at)
    close(layer(x), want)
    close(layer(x, positions=at + torch.tensor([3, 7])), want)
    assert (layer(x, positions=at * torch.tensor([1, 2])) - want).abs().max() > 1e-3
    # An axial part turns each pair by one coordinate; here one coordinate turns all of them.
    moved = layer.position.rotate(torch.ones(1, 3, 1, 8).double(), torch.tensor([[[0, 1]]]))
    assert (moved - 1).abs().min() > 1e-4


# --- bad input ----------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(ValueError, match=r"AxialRotary: sizes are no grid \(got \(3,\)\); expected two or more"):
        AxialRotary(8, sizes=(3,))
    with pytest.raises(ValueError, match=r"AxialRotary: sizes is too small \(got 0\); expected an int >= 1"):
        AxialRotary(8, sizes=(3, 0))
    with pytest.raises(ValueError, match=r"AxialRotary: head_dim is too small \(got 5\); expected an int >= 6"):
        AxialRotary(5, sizes=(2, 2, 2))
    with pytest.raises(ValueError, match=r"AxialRotary: frequencies is unknown \(got 'owns'\); .* did you mean 'own'"):
        AxialRotary(8, frequencies="owns")
    with pytest.raises(ValueError, match=r"RotaryMixed: sizes are no image's \(got \(2, 2, 2\)\); expected two"):
        RotaryMixed(8, 2, sizes=(2, 2, 2))
    with pytest.raises(ValueError, match=r"RotaryMixed: head_dim is no multiple of .* = 4 \(got 6\)"):
        RotaryMixed(6, 2)
    with pytest.raises(ValueError, match=r"grid: sizes are none \(got \(\)\); expected at least one"):
        grid()
    with pytest.raises(ValueError, match=r"grid: prefix is too small \(got -1\)"):
        grid(2, prefix=-1)
    part, z = AxialRotary(8), torch.zeros(2, 3, 5, 8)
    with pytest.raises(ValueError, match=r"AxialRotary: positions has the wrong shape \(got \(1, 5, 3\)\); .*A = 2"):
        part.rotate(z, torch.zeros(1, 5, 3, dtype=torch.long))


def test_layers_refuse_coordinates_that_do_not_fit():
    x, at = torch.zeros(2, 6, 24), grid(2, 3)
    layer = regard.create("rotary_axial", dim=24, num_heads=3)
    says = (
        r"positions don't fit x \(got torch.int64 \(6, 2\)\); .* or \(2, 6\), or coordinates of shape \(1 or 2, 6, 2\)"
    )
    with pytest.raises(ValueError, match=says):
        layer(x, positions=at[0])
    with pytest.raises(ValueError, match=r"positions don't fit x \(got torch.bool \(1, 6, 2\)\)"):
        layer(x, positions=at.bool())
    with pytest.raises(ValueError, match=r"positions don't fit x .* expected integers of shape \(6,\) or \(2, 6\)$"):
        regard.create("rotary", dim=24, num_heads=3)(x, positions=at)

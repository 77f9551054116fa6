"""The parts of SAGAN's small GAN against loops, whose author saw the paper's account alone, neither code nor test."""

import pytest
import torch
from torch import Tensor, nn

from regard.laws.agreement import close
from regard.vision.sagan_host import (
    DownBlock,
    SAGANDiscriminator,
    SAGANGenerator,
    UpBlock,
    discriminator_loss,
    generator_loss,
)
from regard.vision.spectral import SpectralConv2d
from vision import naive_sagan as naive
from vision.shared import filled, normal


def told(conv: nn.Module) -> tuple[Tensor, Tensor]:
    weight = naive.spectral_weight_torch(conv.weight, conv.u, conv.v, training=conv.training)[0]
    return weight, conv.bias


def test_the_generators_block() -> None:
    block, x, labels = filled(UpBlock(3, 4, 5)).train(), normal(1, 3, 3, 2, 3), torch.tensor([4, 0, 2])
    (w1, b1), (w2, b2), (w3, b3) = (told(c) for c in (block.conv1, block.conv2, block.skip))
    first, second = block.norm1, block.norm2
    want = naive.generator_block(
        x, labels, first.gain, first.bias, w1, second.gain, second.bias, w2, w3, b1=b1, b2=b2, b3=b3
    )
    close(block(x, labels), want)


@pytest.mark.parametrize("kind", ["first", "pooled", "kept", "kept, widened"])
def test_the_discriminators_blocks(kind: str) -> None:
    outputs = 3 if kind == "kept" else 4
    block = filled(DownBlock(3, outputs, first=kind == "first", pool="kept" not in kind))
    x = normal(2, 2, 3, 4, 6)
    (w1, b1), (w2, b2) = told(block.conv1), told(block.conv2)
    w3, b3 = (None, None) if isinstance(block.skip, nn.Identity) else told(block.skip)
    if kind == "first":
        want = naive.discriminator_first_block(x, w1, w2, w3, b1=b1, b2=b2, b3=b3)
    else:
        want = naive.discriminator_block(x, w1, w2, w3, downsample=block.pool, b1=b1, b2=b2, b3=b3)
    close(block(x), want)


def test_the_head() -> None:
    torch.manual_seed(0)
    net = SAGANDiscriminator(4, widths=(4, 8), channels=1).double().eval()
    images, labels = normal(3, 3, 1, 8, 8), torch.tensor([3, 1, 1])
    h = images
    for n, block in enumerate(net.blocks):
        h = net.attention(block(h)) if n == 1 else block(h)
    (weight, bias), (embedding, _) = told(net.out), told(net.of_class)
    close(net(images, labels), naive.projection_head(h, labels, weight, bias, embedding))


def test_hinge_losses() -> None:
    real, fake = normal(6, 5, 1), normal(7, 5, 1)
    close(discriminator_loss(real, fake), naive.hinge_discriminator(real, fake))
    close(generator_loss(fake), naive.hinge_generator(fake).reshape(()))


def test_a_convolution_is_normalised_as_a_matrix() -> None:
    conv = SpectralConv2d(3, 4, 3).double()
    x = normal(8, 1, 3, 5, 5)
    for _ in range(200):
        conv(x)
    conv.eval()
    close(torch.linalg.matrix_norm(conv.normalised().flatten(1), 2), torch.ones(()).double())
    close(conv(x), nn.functional.conv2d(x, conv.normalised(), conv.bias, padding=1))


def test_both_learn_and_take_their_attention_in() -> None:
    """Bright and dark discs by class: the hinge falls, and both gammas leave 0."""
    torch.manual_seed(0)
    at = torch.linspace(-1, 1, 16)
    disc = (at[:, None].square() + at.square() < 0.5).float()
    generator = SAGANGenerator(4, 2, widths=(16, 16, 16), channels=1)
    discriminator = SAGANDiscriminator(2, widths=(16, 16), channels=1)
    d, g = (torch.optim.Adam(m.parameters(), lr, (0.0, 0.9)) for m, lr in ((discriminator, 4e-3), (generator, 1e-3)))
    losses = []
    for _ in range(12):
        labels = torch.randint(2, (16,))
        real = (2 * labels[:, None, None, None] - 1) * disc
        fake = generator(torch.randn(16, 4), labels)
        assert fake.shape == real.shape
        assert fake.abs().max() <= 1
        loss = discriminator_loss(discriminator(real, labels), discriminator(fake.detach(), labels))
        d.zero_grad()
        loss.backward()
        d.step()
        losses.append(loss.item())
        g.zero_grad()
        generator_loss(discriminator(fake, labels)).backward()
        g.step()
    assert min(losses) < 0.7 * losses[0]
    assert generator.attention.gamma.abs() > 1e-4
    assert discriminator.attention.gamma.abs() > 1e-4


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"widths is too small \(got 1\)"):
        SAGANGenerator(4, 2, widths=(8,))
    with pytest.raises(ValueError, match=r"SAGANGenerator: noise has the wrong shape \(got \(3, 5\)\)"):
        SAGANGenerator(4, 2, widths=(8, 8))(torch.zeros(3, 5), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"labels has the wrong shape \(got \(2,\)\)"):
        SAGANDiscriminator(2, widths=(8, 8))(torch.zeros(3, 3, 8, 8), torch.zeros(2).long())

"""Based's hybrid of layers that see a small window exactly and layers of `based`, in the words of `regard.spec`."""

from regard.checks import whole


def window_and_based(*, window: int = 64, feature_dim: int = 16, windows: int = 1, based: int = 1) -> str:
    """Based (Arora et al. 2024, https://arxiv.org/abs/2402.18668): which layers see what, as text.

        window_and_based()      'window(window=64)*1+based(feature_dim=16)*1'

    `LMConfig`, `regard.models.layers` and `regard compare` read it; the pattern repeats down a model. `based` sees all
    tokens but none sharply, and its mean is that of the many far ones; a window sees the nearest ones alone. The
    paper's models have windows of 64 to 128 tokens, and convolutions in their other layers.

    Args:
        window: tokens that a layer with a window sees, its own among them.
        feature_dim: width of a head's queries and keys in `based`.
        windows, based: how many layers of each follow one another.

    Raises:
        ValueError, TypeError: what is no size.
    """
    whole("window_and_based", window=window, feature_dim=feature_dim, windows=windows, based=based)
    return f"window(window={window})*{windows}+based(feature_dim={feature_dim})*{based}"

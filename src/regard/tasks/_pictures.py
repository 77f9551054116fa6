"""What the tasks of images share: a model that names the class of a map of tokens."""

from torch import nn

from regard.models.mixer import Mechanism, Stack, build, layers, parse, protocol
from regard.models.tokens import Mean, OnMaps, TokenModel
from regard.tasks import Size


def classifier(
    mechanism: Mechanism, size: Size, read: nn.Module, side: int, classes: int, *, baseline: str
) -> TokenModel:
    """`side` x `side` tokens with learned positions, layers of the mechanism, the mean over tokens, a linear layer.

    A FeatureMixer sees the tokens as a map; a Pooler takes the place of the mean, behind layers of the baseline.

    Args:
        read: makes the tokens (B, side * side, dim) of what the model is called with.
    """
    pools = [spec for spec in mechanism.kinds if protocol(spec) == "Pooler"]
    if pools and isinstance(mechanism, Stack):
        raise ValueError(f"{pools[0]} stands behind the layers, once, and is none of them")
    mixed = parse(baseline) if pools else mechanism
    made = layers(mixed, dim=size.dim, num_heads=size.heads, depth=size.depth)
    kinds = map(protocol, mixed.layers(size.depth))
    mixers = [OnMaps(m, (side, side)) if kind == "FeatureMixer" else m for kind, m in zip(kinds, made)]
    pool = build(pools[0], size.dim, size.heads, causal=False) if pools else Mean()
    tell = nn.Linear(size.dim, classes)
    return TokenModel(read, mixers, tell, dim=size.dim, mlp_dim=size.mlp_dim, positions=side * side, pool=pool)

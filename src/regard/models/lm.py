"""A small pre-norm decoder that any causal token mixer can be put into.

It has no positions of its own: what a mechanism knows of order, it brings. Everything but the mixers is the
same for every mechanism: RMSNorm, a GELU MLP, and one embedding used for reading and for predicting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import divides, number, refuse, whole
from regard.models.mixer import layers, parse_stack
from regard.pipeline.shared_kv import KeyValues, SharedKV, check_shared, step_with_kv, with_kv


@dataclass(frozen=True)
class LMConfig:
    """All it takes to build the model again."""

    mechanism: str
    """As `regard.spec.parse_stack` reads it, e.g. 'alibi', 'window(window=64)' or 'linear*3+softmax'."""
    dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    vocab: int = 256
    length: int = 256
    """Tokens per training sequence; the model itself takes any length that its mechanism takes."""
    share_kv: int = 1
    """Of every so many layers the first makes keys and values for all; see `regard.models.layers`."""

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "mechanism"}
        whole("LMConfig", **sizes)
        divides("LMConfig", num_heads=self.num_heads, dim=self.dim)


class Block(nn.Module):
    """Mix tokens, then mix features; each on a normalised copy that is added back."""

    mixer: Any
    """A TokenMixer, perhaps a StreamingMixer."""

    def __init__(self, mixer: nn.Module, dim: int, mlp_dim: int):
        super().__init__()
        self.mixer = mixer
        self.mixer_norm = nn.RMSNorm(dim)
        self.mlp_norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, dim, bias=False)

    def mlp(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))

    def forward(self, x: Float[Tensor, "B T M"], kv: KeyValues | None = None) -> Float[Tensor, "B T M"]:
        """`kv` is an earlier block's, for a mixer that reads those."""
        z = self.mixer_norm(x)
        return self.mlp(x + (self.mixer(z) if kv is None else self.mixer(z, kv)))

    def with_kv(self, x: Float[Tensor, "B T M"]) -> tuple[Float[Tensor, "B T M"], KeyValues]:
        """`forward`, and the mixer's keys and values for later blocks."""
        y, kv = with_kv(self.mixer, self.mixer_norm(x))
        return self.mlp(x + y), kv

    def step(self, x: Float[Tensor, "B t M"], state: object) -> tuple[Float[Tensor, "B t M"], object]:
        y, state = self.mixer.step(self.mixer_norm(x), state)
        return self.mlp(x + y), state

    def step_with_kv(self, x: Float[Tensor, "B t M"], state: Any) -> tuple[Float[Tensor, "B t M"], object, KeyValues]:
        y, state, kv = step_with_kv(self.mixer, self.mixer_norm(x), state)
        return self.mlp(x + y), state, kv


def scale_blocks(blocks: Sequence[Block]) -> None:
    """Initialise the MLPs of a model's blocks."""
    for block in blocks:
        nn.init.normal_(block.up.weight, std=block.up.in_features**-0.5)
        # Blocks add to one stream, so each adds the less the more of them there are.
        nn.init.normal_(block.down.weight, std=(2 * len(blocks) * block.down.in_features) ** -0.5)


class LanguageModel(nn.Module):
    """Predicts the next token. `mixers` holds one causal token mixer for each block.

    A `regard.pipeline.SharedKV` among them reads the keys and values of the nearest layer below that makes its own.
    """

    blocks: Sequence[Block]

    def __init__(self, mixers: Sequence[nn.Module], *, dim: int, mlp_dim: int, vocab: int = 256):
        super().__init__()
        self.shared = check_shared(mixers)
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(mixer, dim, mlp_dim) for mixer in mixers)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        scale_blocks(self.blocks)

    @property
    def mixers(self) -> list[nn.Module]:
        """The mechanism's own modules."""
        return [block.mixer for block in self.blocks]

    def logits(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T V"]:
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        x, kv = self.embedding(ids), None
        for n, block in enumerate(self.blocks):
            if n in self.shared:
                x, kv = block.with_kv(x)
            else:
                x = block(x, kv) if isinstance(block.mixer, SharedKV) else block(x)
        return self.logits(x)

    def init_state(self, batch_size: int, capacity: int) -> list[object]:
        """Empty states for `step`, one a block; None for those that read another's keys and values. Raises what the
        mixer raises where it cannot stream."""
        reads = [isinstance(block.mixer, SharedKV) for block in self.blocks]
        pairs = zip(self.blocks, reads, strict=True)
        return [None if alone else block.mixer.init_state(batch_size, capacity) for block, alone in pairs]

    def step(self, ids: Int[Tensor, "B t"], states: list[object]) -> tuple[Float[Tensor, "B t V"], list[object]]:
        """Logits for new tokens, given the states that earlier ones left."""
        x, after, kv = self.embedding(ids), [], None
        for n, (block, state) in enumerate(zip(self.blocks, states, strict=True)):
            if n in self.shared:
                x, state, kv = block.step_with_kv(x, state)
            elif isinstance(block.mixer, SharedKV):
                x = block(x, kv)
            else:
                x, state = block.step(x, state)
            after.append(state)
        return self.logits(x), after

    @property
    def streams(self) -> bool:
        """Whether every mixer can run token by token."""
        try:
            self.init_state(1, 1)
        except (ValueError, TypeError, NotImplementedError, AttributeError):
            return False
        return True

    @torch.no_grad()
    def sample(
        self,
        ids: Int[Tensor, "B T"],
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, "B 1"]]:
        """Yield `count` tokens that continue `ids`. Temperature 0 takes the likeliest.

        Without streaming, every token costs a full pass.
        """
        if ids.shape[1] < 1:
            refuse("generate", "ids", "are an empty prompt", tuple(ids.shape), "at least one token")
        check_sampling(count, temperature, top_k)
        states = self.init_state(ids.shape[0], ids.shape[1] + count) if self.streams else None
        new = ids
        for _ in range(count):
            if states is None:
                logits = self(ids)
            else:
                logits, states = self.step(new, states)
            new = draw(logits[:, -1], temperature, top_k, generator)
            ids = torch.cat([ids, new], 1)
            yield new

    def generate(
        self,
        ids: Int[Tensor, "B T"],
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B T+count"]:
        """`ids` and `count` sampled tokens after them."""
        drawn = self.sample(ids, count, temperature=temperature, top_k=top_k, generator=generator)
        return torch.cat([ids, *drawn], 1)


def check_sampling(count: int, temperature: float, top_k: int | None) -> None:
    """Refuse what cannot be sampled."""
    whole("generate", 0, count=count)
    number("generate", least=0, temperature=temperature)
    if top_k is not None:
        whole("generate", top_k=top_k)


def draw(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Int[Tensor, "B 1"]:
    """A token of each row; temperature 0 takes the likeliest, `top_k` leaves only so many."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def language_model(config: LMConfig) -> LanguageModel:
    """The model that `config` describes, freshly initialised from torch's generator."""
    mechanism = parse_stack(config.mechanism)
    sizes = {"dim": config.dim, "num_heads": config.num_heads, "depth": config.depth, "share_kv": config.share_kv}
    mixers = layers(mechanism, causal=True, **sizes)
    return LanguageModel(mixers, dim=config.dim, mlp_dim=config.mlp_dim, vocab=config.vocab)

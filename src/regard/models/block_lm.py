"""Block Transformer: its lower half models whole blocks of tokens, its upper half the tokens of one."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, refuse, whole
from regard.masks import padding
from regard.models.lm import check_sampling, draw
from regard.models.neox import START, NeoXDecoder
from regard.shapes import HeadShape


def _example(shape: HeadShape) -> tuple[Tensor]:
    return (torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(2)),)


CARD = Card(
    "block_transformer",
    equation="""z_t = [E x_t0 | .. | E x_t(L-1)]      n = T / L blocks,   E (vocab, M / L)
c_0 .. c_(n-1) = causal decoder(z_0 .. z_(n-1))      places count blocks
[f_0 | .. | f_(p-1)] = A c_t + a,      for block t + 1, whose tokens are x_0 .. x_(L-1):
prefix:     y = causal decoder(f_0 .. f_(p-1), W x_0 .. W x_(L-2)),   logits of x_i = U y_(p-1+i)
summation:  y = causal decoder(W bos + f_0, W x_0 + f_1 .. W x_(L-2) + f_(L-1)),   logits of x_i = U y_i
a layer of both decoders:  x + mixer(norm x) + mlp(norm' x)""",
    papers=(
        Paper(
            "Block Transformer: Global-to-Local Language Modeling for Fast Inference",
            "Ho et al.",
            2024,
            "2406.02657",
            "abstract; official code",
        ),
    ),
    protocol="Model",
    inputs=_example,
    supports={"causal", "padding", "compile"},
    cost=Cost(
        "B*T/block*layers_global*(2*mlp_ratio*M**2 + 2*T/block*M) + B*(T/block - 1)*(M*prefix*local_dim + "
        "layers_local*(prefix + block - 1)*(2*mlp_ratio*local_dim**2 + 2*(prefix + block - 1)*local_dim) + "
        "block*local_dim*vocab)",
        "2*layers_global*T/block*M + 2*layers_local*(prefix + block - 1)*local_dim",
    ),
    claim="Tokens know of earlier blocks through one context vector alone: "
    "tests/models/test_block_lm.py::test_a_block_reads_its_context_alone. What decoding gains by it: "
    "`python -m benchmarks.block_lm`.",
    differs=(
        "Left out: the embedders by convolution and by an encoder, decoding by cross-attention, and the two extra "
        "losses, all off in the main runs.",
        "A head turns at least 2 of its channels where a quarter of them is fewer or odd.",
        "The projections within mixers start as those mixers do, without the code's 0.02.",
        "Prompts of a batch are equally long; those that are not come padded, and `generate` sees the padding.",
        "The mixers may be any others; 'cost' is of the default ones, decoding by prefix.",
    ),
    verified="third-party",
    example={"vocab": 11, "layers_global": 1, "layers_local": 2, "block": 4, "prefix": 2, "local_dim": 48},
    tries={
        "mixer_global": "softmax",
        "mixer_local": "softmax",
        "block": 3,
        "prefix": 3,
        "bos": {"decoding": "summation", "prefix": 4},
        "local_dim": 12,
    },
    defaults={
        "vocab": "ours, bytes",
        "layers_global": "code, the main runs",
        "layers_local": "code, the main runs",
        "block": "code, the main runs",
        "prefix": "code, the main runs; with summation as many as tokens",
        "decoding": "code, the main runs",
        "local_dim": "code, as wide as dim",
        "mlp_ratio": "code",
        "mixer_global": "code, GPT-NeoX's attention",
        "mixer_local": "code, GPT-NeoX's attention",
        "bos": "ours, the code takes that of its tokenizer",
    },
)

Decoding = Literal["prefix", "summation"]


@CARD.module
class BlockLM(nn.Module):
    """Predicts tokens of a block from the blocks before, and from the tokens before within it.

    Args:
        dim: M, width of blocks; each of their tokens is embedded in M / block of it.
        num_heads: of both decoders.
        vocab: kinds of tokens.
        layers_global, layers_local: of the decoder of blocks, and of that of tokens.
        block: L, tokens a block.
        prefix: p, vectors that a context becomes; default 2, and always L with summation.
        decoding: how they reach the decoder of tokens.
        local_dim: its width; default dim.
        mlp_ratio: how many times as wide MLPs are.
        mixer_global, mixer_local: any causal mixers, as `regard.models.layers` takes them; default GPT-NeoX's.
        bos: the token that fills up prompts in front, and that begins each block with summation.

    Shapes: ids (B, T) -> logits (B, T - L, vocab) of tokens L .. T - 1: nothing predicts the first block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        vocab: int = 256,
        layers_global: int = 6,
        layers_local: int = 6,
        block: int = 4,
        prefix: int | None = None,
        decoding: Decoding = "prefix",
        local_dim: int | None = None,
        mlp_ratio: int = 4,
        mixer_global: str | None = None,
        mixer_local: str | None = None,
        bos: int = 0,
    ) -> None:
        super().__init__()
        choice(self, get_args(Decoding), decoding=decoding)
        local_dim = dim if local_dim is None else local_dim
        prefix = (2 if decoding == "prefix" else block) if prefix is None else prefix
        whole(self, dim=dim, num_heads=num_heads, vocab=vocab, layers_global=layers_global, layers_local=layers_local)
        whole(self, block=block, prefix=prefix, local_dim=local_dim, mlp_ratio=mlp_ratio)
        whole(self, 0, most=vocab - 1, bos=bos)
        divides(self, block=block, dim=dim)
        divides(self, num_heads=num_heads, local_dim=local_dim)
        if decoding == "summation" and prefix != block:
            refuse(self, "prefix", "is not the number of tokens that it is added to", prefix, f"block = {block}")
        self.dim, self.local_dim, self.block, self.prefix = dim, local_dim, block, prefix
        self.decoding, self.bos = decoding, bos
        self.embedding, self.token_embedding = nn.Embedding(vocab, dim // block), nn.Embedding(vocab, local_dim)
        self.block_decoder = NeoXDecoder(mixer_global, dim, num_heads, layers_global, mlp_ratio * dim)
        self.expand = nn.Linear(dim, prefix * local_dim)
        self.token_decoder = NeoXDecoder(mixer_local, local_dim, num_heads, layers_local, mlp_ratio * local_dim)
        self.head = nn.Linear(local_dim, vocab, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All but the decoders, which start by themselves."""
        for part in (self.embedding, self.token_embedding, self.head):
            nn.init.normal_(part.weight, std=START)
        nn.init.normal_(self.expand.weight, std=self.expand.in_features**-0.5)
        nn.init.zeros_(self.expand.bias)

    @property
    def mixers(self) -> list[nn.Module]:
        """The mechanisms' own modules: those among blocks, then those among tokens."""
        return [layer.mixer for decoder in (self.block_decoder, self.token_decoder) for layer in decoder.layers]

    @checked()
    def forward(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B P V"]:
        """Logits of all tokens but those of the first block.

        Args:
            ids: T a multiple of the block, at least one.
            mask: True = a real token. Blocks without any are hidden; padding beside real tokens is read as a token.
                What a block of padding predicts means nothing.
        """
        c = self.contexts(ids, mask)[:, :-1]
        later = ids[:, self.block :].reshape(-1, self.block)
        return self.token_logits(c.flatten(0, 1), later).unflatten(0, c.shape[:2]).flatten(1, 2)

    @checked()
    def contexts(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B n M"]:
        """c_t of every block."""
        if ids.shape[1] == 0 or ids.shape[1] % self.block:
            wanted = f"(B, T) with T a multiple of block = {self.block}; pad in front"
            refuse(self, "ids", "are no whole blocks", tuple(ids.shape), wanted)
        real = None if mask is None else padding(mask.unflatten(1, (-1, self.block)).any(-1))
        return self.block_decoder(self._embed(ids), real)

    @checked(M="dim", L="block")
    def token_logits(self, c: Float[Tensor, "N M"], ids: Int[Tensor, "N L"]) -> Float[Tensor, "N L V"]:
        """Logits of the tokens `ids` of one block each, given the contexts before them."""
        f, before = self._expanded(c), self.token_embedding(ids[:, :-1])
        if self.decoding == "prefix":
            return self.head(self.token_decoder(torch.cat([f, before], 1))[:, self.prefix - 1 :])
        return self.head(self.token_decoder(torch.cat([self._first(f), before + f[:, 1:]], 1)))

    def loss(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, ""]:
        """Mean cross entropy of the real tokens behind the first block."""
        wanted = ids[:, self.block :].long()
        if mask is not None:
            wanted = wanted.masked_fill(~mask[:, self.block :], -100)
        logits = self(ids, mask)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    @torch.no_grad()
    @checked()
    def generate(
        self,
        ids: Int[Tensor, "B T"],
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B T+count"]:
        """`ids` and `count` sampled tokens after them: one step of the upper blocks' cache for every L tokens.

        Temperature 0 takes the likeliest. Blocks end where `ids` does, which is filled up with `bos` in front.
        """
        B, T = ids.shape
        if T < 1:
            refuse("generate", "ids", "are an empty prompt", tuple(ids.shape), "at least one token")
        check_sampling(count, temperature, top_k)
        filled = F.pad(ids, (-T % self.block, 0), value=self.bos)
        state = self.block_decoder.init_state(B, filled.shape[1] // self.block + -(-count // self.block))
        new, found = filled, [ids]
        for start in range(0, count, self.block):
            c, state = self.block_decoder.step(self._embed(new), state)
            drawn: list[Tensor] = []
            f, local = self._expanded(c[:, -1]), self.token_decoder.init_state(B, self.prefix + self.block - 1)
            for i in range(min(self.block, count - start)):
                x = self.token_embedding(drawn[-1]) if i else f if self.decoding == "prefix" else self._first(f)
                x = x + f[:, i : i + 1] if i and self.decoding == "summation" else x
                y, local = self.token_decoder.step(x, local)
                drawn.append(draw(self.head(y[:, -1]), temperature, top_k, generator))
            new = torch.cat(drawn, 1)
            found.append(new)
        return torch.cat(found, 1)

    def _embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B n M"]:
        return self.embedding(ids).flatten(1).unflatten(1, (ids.shape[1] // self.block, -1))

    def _expanded(self, c: Float[Tensor, "N M"]) -> Float[Tensor, "N p m"]:
        return self.expand(c).unflatten(-1, (self.prefix, -1))

    def _first(self, f: Float[Tensor, "N p m"]) -> Float[Tensor, "N 1 m"]:
        """What begins a block with summation."""
        return self.token_embedding.weight[self.bos] + f[:, :1]

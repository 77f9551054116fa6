"""What a model attends to: one forward pass as usual, and every attention layer's queries, keys and values kept.

The pass itself is the model's own, with its own kernel, bit by bit. Weights are computed afterwards from what was
kept, for the layers, heads and rows that are asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import refuse, whole
from regard.files import write_atomically
from regard.inspect import analyses, store
from regard.inspect.ask import ask, offers
from regard.inspect.capture import huggingface, modules
from regard.inspect.capture.recorder import Recorder
from regard.inspect.inputs import SEEING, Call, Tokens, call_of, grid_of, separators
from regard.inspect.layers import Chosen, LayerTrace
from regard.inspect.page.render import fragment, render
from regard.inspect.statistics import HeadStatistics, layer_statistics

Kind = Literal["self", "cross"]


@dataclass(frozen=True, eq=False)
class Trace:
    """The attention layers of one forward pass, and what went in and came out."""

    layers: tuple[LayerTrace, ...]
    """In order of execution."""
    tokens: Tokens | None = None
    """For each batch row the tokens, as text; of the encoder where there are two stacks. None without a tokenizer."""
    decoder_tokens: Tokens | None = None
    """Likewise of the decoder of an encoder-decoder model."""
    images: Float[Tensor, "B 3 Y X"] | None = None
    """Pictures as the model got them."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches."""
    extra_tokens: int = 0
    """Tokens before the patches, such as [CLS]."""
    output: Any = None
    """What the model returned: the same bits as without a trace. None in a trace read from disk."""
    model: str = ""
    """The model's class."""

    def __repr__(self) -> str:
        return f"Trace(model={self.model!r}, layers={len(self.layers)})"

    def layer(self, layer: int) -> LayerTrace:
        """By place in `layers`; ValueError says how many there are."""
        whole("trace", -len(self.layers), most=len(self.layers) - 1, layer=layer)
        return self.layers[layer]

    def weights(self, layer: int, *, heads: Chosen = None, rows: Chosen = None) -> Float[Tensor, "B h t S"]:
        """The attention weights of one layer, by its place in `layers`."""
        return self.layer(layer).weights(heads=heads, rows=rows)

    def select(self, *, kind: Kind = "self", side: str | None = None) -> tuple[LayerTrace, ...]:
        """The layers of one kind, and of one stack where `side` is given."""
        return tuple(x for x in self.layers if x.kind == kind and side in (None, x.side))

    def maps(self, *, kind: Kind = "self", side: str | None = None) -> list[Float[Tensor, "B H T S"]]:
        """The weights of these layers, one tensor each: what the analyses of `regard.inspect` take."""
        return [layer.weights() for layer in self.select(kind=kind, side=side)]

    def tokens_of(self, layer: LayerTrace) -> tuple[Tokens | None, Tokens | None]:
        """The tokens behind the layer's queries and those behind its keys, where they are known."""
        _, _, T, S = layer.shape
        queries = self.decoder_tokens if layer.side == "decoder" else self.tokens
        keys = self.tokens if layer.kind == "cross" else queries
        fits = [t if t is not None and len(t[0]) == n else None for t, n in ((queries, T), (keys, S))]
        return fits[0], fits[1]

    def statistics(self) -> list[HeadStatistics]:
        """One row for each layer and head: entropy, distance, weight on the first token, on [SEP] and so on."""
        table: list[HeadStatistics] = []
        for place, layer in enumerate(self.layers):
            keys = self.tokens_of(layer)[1]
            table += layer_statistics(place, layer, None if keys is None else [separators(row) for row in keys])
        return table

    def analyse(
        self, name: str, *, kind: Kind = "self", side: str | None = None, layer: int | None = None, **options: Any
    ) -> Any:
        """The analysis on the card of that name (`regard.analyses()` has them), of what it asks for and the trace has.

        An argument of one of these names is filled in: `attention`, the chosen layers' weights, one tensor each; `q`,
        `k`, `v` and `scale` of one layer; `hidden`, the states that the model puts out if it is called with
        output_hidden_states=True; `grid` and `extra_tokens`, where the layers see a picture; `tokens`, `images`,
        `output`.

        Args:
            kind, side: which layers, as in `select`; `side` is needed where there are several stacks.
            layer: this one alone, by its place in `layers`.
            options: the analysis's other arguments. What is given here comes before what the trace has.

        Raises:
            ValueError: no such analysis, no such option, or arguments that neither the caller nor the trace has.
        """

        def chosen() -> tuple[LayerTrace, ...]:
            return self._stacked(kind, side) if layer is None else (self.layer(layer),)

        return ask(name, offers(self, chosen, side), options)

    def rollout(
        self, *, side: str | None = None, residual: float = 0.5, heads: Literal["mean", "max", "min"] = "mean"
    ) -> Float[Tensor, "L B T T"]:
        """Attention rollout after each self-attention layer; see `regard.inspect.analyses.rollout`."""
        return analyses.attention_rollout(self._maps(side), residual=residual, heads=heads)

    def flow(
        self,
        *,
        side: str | None = None,
        residual: float = 0.5,
        layers: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Float[Tensor, "L B R T"]:
        """Attention flow after each self-attention layer; see `regard.inspect.analyses.flow`."""
        return analyses.attention_flow(self._maps(side), residual=residual, layers=layers, rows=rows)

    def relevance(
        self, gradients: Sequence[Float[Tensor, "B H T T"]], *, side: str | None = None
    ) -> Float[Tensor, "B T T"]:
        """Relevancy, given the gradients of what is explained by each map; see `regard.inspect.analyses.relevance`."""
        return analyses.attention_relevance(self._maps(side), gradients)

    def save(self, path: str | Path, *, title: str = "") -> Path:
        """Write one self-contained interactive page; `regard.inspect.page.render` has more to choose."""
        path = Path(path)
        write_atomically(path, render(self, title=title).encode())
        return path

    def _repr_html_(self) -> str:
        return fragment(self)

    def to_dir(self, folder: str | Path) -> Path:
        """Write the trace, without the model's output, as safetensors and JSON to an empty or new folder."""
        writer = store.Writer(folder)
        for layer in self.layers:
            writer.write(layer)
        self._finish(writer)
        return writer.folder

    @classmethod
    def from_dir(cls, folder: str | Path) -> "Trace":
        """Read what `to_dir` or `trace(to=...)` wrote; tensors stay on disk until they are used."""
        about, layers, tensors = store.read(folder)

        def tokens(name: str) -> Tokens | None:
            return None if about[name] is None else tuple(tuple(map(str, row)) for row in about[name])

        grid = about["grid"]
        return cls(
            layers,
            tokens("tokens"),
            tokens("decoder_tokens"),
            tensors.get("images"),
            None if grid is None else (int(grid[0]), int(grid[1])),
            int(about["extra_tokens"]),
            model=str(about["model"]),
        )

    def _stacked(self, kind: Kind, side: str | None) -> tuple[LayerTrace, ...]:
        """The layers of one kind in one stack, which is the only one or named by `side`."""
        sides = list(dict.fromkeys(x.side for x in self.select(kind=kind)))
        if side is None and len(sides) > 1:
            refuse(
                "trace", "side", "is needed, as there are several stacks", side, f"one of {', '.join(map(repr, sides))}"
            )
        return self.select(kind=kind, side=side)

    def _maps(self, side: str | None) -> list[Float[Tensor, "B H T T"]]:
        return [x.weights() for x in self._stacked("self", side)]

    def _finish(self, writer: store.Writer) -> None:
        about = {name: getattr(self, name) for name in ("tokens", "decoder_tokens", "grid", "extra_tokens", "model")}
        writer.finish(about, {} if self.images is None else {"images": self.images})


def trace(
    model: nn.Module,
    inputs: Any,
    *,
    tokenizer: Any = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    dtype: torch.dtype | None = None,
    to: str | Path | None = None,
) -> Trace:
    """Run `model` once and keep what its attention layers saw.

    The output has the bits of an untraced call, in the same modes of gradients and training; no random number is
    drawn and the model is left as it was. Dropout of weights is not part of what is kept.

    Args:
        model: of transformers (any that uses its AttentionInterface, swapped or not), or any module that holds regard's
            layers or torch.nn.MultiheadAttention.
        inputs: a dict of keywords, a tensor or tuple of arguments; or a text or list of texts.
        tokenizer: for text, and to name the tokens of `input_ids`. A byte-level model of regard needs none.
        layers: keep only these, by the number that the model gives them (`LayerTrace.index`).
        heads: keep only these heads, each with the key and value head that it reads.
        dtype: what queries, keys, values and biases are kept in, e.g. torch.bfloat16; default their own.
        to: an empty or new folder, to which each layer goes at once; it is read where it is used.

    Raises:
        TypeError: `model` is no module.
        ValueError: a layer or head that is not there, no attention layer that can be watched (a compiled model, or one
            with attention of its own), text without a tokenizer.
    """
    if not isinstance(model, nn.Module):
        refuse("trace", "model", "has the wrong type", type(model).__name__, "a torch.nn.Module", error=TypeError)
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            kind = type(getattr(module, "_orig_mod", module)).__name__
            refuse(
                "trace", "model", "is compiled, and nothing in it can be watched", kind, "the model before compiling"
            )
    if dtype is not None and not dtype.is_floating_point:
        refuse("trace", "dtype", "has the wrong dtype", dtype, "a floating point type")
    call = call_of(model, inputs, tokenizer)
    writer = None if to is None else store.Writer(to)
    recorder = Recorder(model, layers=layers, heads=heads, dtype=dtype, writer=writer)
    try:
        with huggingface.watching(model, recorder), modules.watching(recorder):
            output = model(*call.args, **call.kwargs)
        made = _described(model, call, recorder.result(), output)
        if writer is not None:
            made._finish(writer)
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    return made


def _described(model: nn.Module, call: Call, layers: tuple[LayerTrace, ...], output: Any) -> Trace:
    lengths = [layer.shape[2] for layer in layers if layer.side in SEEING and layer.kind == "self"]
    grid, extra = grid_of(model, call.pictures, lengths[0]) if lengths else (None, 0)
    images = None if call.pictures is None else call.pictures.detach().clone()
    return Trace(layers, call.tokens, call.decoder_tokens, images, grid, extra, output, type(model).__name__)

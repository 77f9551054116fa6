"""The parser around biaffine attention: words and tags, a bidirectional LSTM, arcs, labels and trees.

The paper, and what was read of it, stand on the card of `regard.recurrent.biaffine`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import checked, number, refuse, whole
from regard.recurrent.arborescence import maximum_spanning_arborescence
from regard.recurrent.biaffine import BiaffineArcs, dropped
from regard.recurrent.biaffine_labels import BiaffineLabels, arc_label_loss


class BiaffineParser(nn.Module):
    """The paper's model; its sizes are the paper's as remembered. Token 0 of each sentence is the root.

    States between LSTM layers are dropped alike at all times of a sentence, those within a layer never.

    Args:
        num_words, num_tags: sizes of the vocabularies.
        num_labels: kinds of arcs.
        dim: width of the embeddings of words, and of tags.
        hidden: of the LSTM, in each direction.
        depth: its layers.
        arc_dim, label_dim: widths in which arcs and labels are scored.
        dropout: of embeddings (whole words, whole tags), states and both sides of arcs and labels.
    """

    def __init__(
        self,
        num_words: int,
        num_tags: int,
        num_labels: int,
        *,
        dim: int = 100,
        hidden: int = 400,
        depth: int = 3,
        arc_dim: int = 500,
        label_dim: int = 100,
        dropout: float = 0.33,
    ) -> None:
        super().__init__()
        whole(self, num_words=num_words, num_tags=num_tags, dim=dim, hidden=hidden, depth=depth)
        number(self, least=0, below=1, dropout=dropout)
        self.dropout = dropout
        self.words, self.tags = nn.Embedding(num_words, dim), nn.Embedding(num_tags, dim)
        widths = [2 * dim, *[2 * hidden] * (depth - 1)]
        self.encoder = nn.ModuleList(nn.LSTM(w, hidden, batch_first=True, bidirectional=True) for w in widths)
        self.arcs = BiaffineArcs(2 * hidden, arc_dim=arc_dim, dropout=dropout)
        self.labels = BiaffineLabels(2 * hidden, num_labels, label_dim=label_dim, dropout=dropout)

    def states(self, words: Int[Tensor, "B T"], tags: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"]) -> Tensor:
        """The encoder's (B, T, 2 hidden); padding stands at the end."""
        x = torch.stack([self.words(words), self.tags(tags)], 2)
        if self.training and self.dropout > 0:
            kept = (torch.rand_like(x[..., :1]) >= self.dropout).to(x.dtype)
            x = x * kept * (2 / kept.sum(2, keepdim=True).clamp(min=1))  # one alone counts for both
        x = x.flatten(2)
        lengths = keep.sum(1).cpu()
        for layer in self.encoder:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            x, _ = nn.utils.rnn.pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])
            x = dropped(x, self.dropout, self.training)
        return x

    @checked()
    def forward(
        self, words: Int[Tensor, "B T"], tags: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T T"], Float[Tensor, "B T T N"]]:
        """Log-probabilities of heads, and scores of labels; `keep` is True at real tokens, which come first."""
        keep = torch.ones_like(words, dtype=torch.bool) if keep is None else keep
        if not bool(keep[:, :1].all()) or bool((keep[:, 1:] & ~keep[:, :-1]).any()):
            refuse(self, "keep", "has holes", "False before True", "real tokens first, the root among them")
        x = self.states(words, tags, keep)
        return self.arcs(x, x, mask=keep), self.labels(x)

    def loss(
        self,
        words: Int[Tensor, "B T"],
        tags: Int[Tensor, "B T"],
        heads: Int[Tensor, "B T"],
        kinds: Int[Tensor, "B T"],
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, ""]:
        """`arc_label_loss` over all real tokens but the root."""
        counted = torch.ones_like(words, dtype=torch.bool) if keep is None else keep.clone()
        counted[:, 0] = False
        arcs, labels = self(words, tags, keep)
        return arc_label_loss(arcs, labels, heads, kinds, counted)

    @torch.no_grad()
    def parse(
        self, words: Int[Tensor, "B T"], tags: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """The best tree with a single root, as the head of each token, and the label of each arc."""
        arcs, labels = self(words, tags, keep)
        heads = maximum_spanning_arborescence(arcs, keep)
        return heads, labels.gather(2, heads[..., None, None].expand(-1, -1, 1, labels.shape[-1]))[:, :, 0].argmax(-1)

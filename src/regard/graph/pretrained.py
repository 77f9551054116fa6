"""Pretrained layers of torch_geometric: what each becomes here."""

import copy
from typing import Any

import torch

from regard.checks import choice, refuse
from regard.graph.gatv2 import CARD as GATV2
from regard.graph.gatv2 import GATv2
from regard.graph.point_transformer import CARD as POINT_TRANSFORMER
from regard.graph.point_transformer import PointTransformer
from regard.graph.supergat import CARD as SUPERGAT
from regard.graph.supergat import SuperGAT
from regard.weights import Loaded, Move, only, reshaped, same, setting


@GATV2.loads("torch_geometric.nn", "GATv2Conv")
def _gatv2(theirs: Any) -> Loaded:
    only(theirs, {"residual": False, "fill_value": "mean", "flow": "source_to_target"})
    choice(theirs, ("add", "sum"), aggr=theirs.aggr)
    dim, D, shared = theirs.in_channels, theirs.out_channels, theirs.share_weights
    if not isinstance(dim, int):
        refuse(theirs, "in_channels", "are two", dim, "one width of sources and targets")
    options = {"edge_dim": theirs.edge_dim, "share_weights": shared, "self_loops": theirs.add_self_loops}
    options |= {"negative_slope": theirs.negative_slope, "dropout": theirs.dropout}

    def build() -> GATv2:
        return GATv2(dim, theirs.heads, head_dim=D, merge="concat" if theirs.concat else "mean", **options)

    one = same(theirs, {"source_proj": "lin_l", "edge_proj": "lin_edge", "bias": "bias"})
    moves = one if shared else [*one, *same(theirs, {"target_proj": "lin_r"})]
    if shared:  # whose state has both names for the one
        moves = [_twice(m) if m.theirs[0].startswith("lin_l.") else m for m in moves]
    return Loaded(build, [*moves, reshaped("a", "att", lambda a: a[0], lambda a: a[None])])


def _twice(move: Move) -> Move:
    (name,) = move.theirs
    both = (name, name.replace("lin_l", "lin_r"))
    return Move(move.ours, both, lambda t, again: [t], lambda t: [t, t])


@SUPERGAT.loads("torch_geometric.nn", "SuperGATConv")
def _supergat(theirs: Any) -> Loaded:
    only(theirs, {"flow": "source_to_target", "is_undirected": False})
    choice(theirs, ("add", "sum"), aggr=theirs.aggr)
    options = {"form": theirs.attention_type, "self_loops": theirs.add_self_loops, "dropout": theirs.dropout}
    options |= {name: getattr(theirs, name) for name in ("negative_slope", "edge_sample_ratio", "neg_sample_ratio")}

    def build() -> SuperGAT:
        dim, D, heads = theirs.in_channels, theirs.out_channels, theirs.heads
        return SuperGAT(dim, heads, head_dim=D, merge="concat" if theirs.concat else "mean", **options)

    moves = same(theirs, {"proj": "lin", "bias": "bias"})
    if theirs.att_l is not None:
        moves.append(Move(("a",), ("att_l", "att_r"), lambda *a: [torch.cat(a)], lambda a: a.split(1)))
    return Loaded(build, moves)


@POINT_TRANSFORMER.loads("torch_geometric.nn", "PointTransformerConv")
def _point_transformer(theirs: Any) -> Loaded:
    """With its own two networks."""
    only(theirs, {"flow": "source_to_target"})
    choice(theirs, ("add", "sum"), aggr=theirs.aggr)
    dim = theirs.out_channels
    if theirs.in_channels != dim or theirs.attn_nn is None:
        refuse(theirs, "in_channels", "or attn_nn has no counterpart here", theirs.in_channels, f"{dim}, and a network")
    widths = (setting(m, "in_features", "in_channels") for m in theirs.pos_nn.modules())
    place = next((width for width in widths if isinstance(width, int)), 3)
    networks = {"theta": theirs.pos_nn, "gamma": theirs.attn_nn}
    options = {"pos_dim": place, "self_loops": theirs.add_self_loops}

    def build() -> PointTransformer:
        return PointTransformer(dim, **options, **copy.deepcopy(networks))

    names = {"v_proj": "lin", "k_proj": "lin_src", "q_proj": "lin_dst", "theta": "pos_nn", "gamma": "attn_nn"}
    return Loaded(build, same(theirs, names))

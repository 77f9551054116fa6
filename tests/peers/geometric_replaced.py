"""A pytest plugin under which three graph layers of torch_geometric compute by regard's, with their own weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.func import functional_call

from peers.counting import counted
from regard.graph.gatv2 import GATv2
from regard.graph.point_transformer import PointTransformer
from regard.graph.supergat import SuperGAT


def _gatv2(layer: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    made = GATv2(
        layer.in_channels,
        layer.heads,
        head_dim=layer.out_channels,
        edge_dim=layer.edge_dim,
        merge="concat" if layer.concat else "mean",
        share_weights=layer.share_weights,
        self_loops=layer.add_self_loops,
        negative_slope=layer.negative_slope,
        dropout=layer.dropout,
    )
    given = {"a": layer.att[0], "bias": layer.bias}
    projections = {"source_proj": layer.lin_l, "target_proj": layer.lin_r, "edge_proj": layer.lin_edge}
    for name, of in projections.items():
        if getattr(made, name) is not None:
            given |= {f"{name}.{kind}": t for kind, t in of.named_parameters()}
    return made, given


def _supergat(layer: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    made = SuperGAT(
        layer.in_channels,
        layer.heads,
        form=layer.attention_type,
        head_dim=layer.out_channels,
        merge="concat" if layer.concat else "mean",
        self_loops=layer.add_self_loops,
        negative_slope=layer.negative_slope,
        dropout=layer.dropout,
    )
    given = {"proj.weight": layer.lin.weight, "bias": layer.bias}
    if layer.attention_type == "MX":
        given["a"] = torch.cat([layer.att_l, layer.att_r])
    return made, given


def _point_transformer(layer: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    gamma = nn.Identity() if layer.attn_nn is None else layer.attn_nn
    made = PointTransformer(layer.in_channels, self_loops=layer.add_self_loops, theta=layer.pos_nn, gamma=gamma)
    projections = {"q_proj": layer.lin_dst, "k_proj": layer.lin_src, "v_proj": layer.lin}
    return made, {f"{name}.weight": of.weight for name, of in projections.items()}


def replace(kind: type[nn.Module], build: Callable[[Any], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    """Give the layer a forward that goes through regard's, made for the call, with the layer's own parameters."""
    theirs = kind.forward

    @counted
    def forward(self: Any, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        made, given = build(self)
        if kind is pyg.PointTransformerConv:
            rest = rest[::-1]  # theirs takes the places before the edges
        rest += tuple(named.values())
        return functional_call(made.to(x.dtype).train(self.training), given, (x, *rest))

    kind.forward, kind.theirs = forward, theirs


def pytest_configure() -> None:
    replace(pyg.GATv2Conv, _gatv2)
    replace(pyg.SuperGATConv, _supergat)
    replace(pyg.PointTransformerConv, _point_transformer)

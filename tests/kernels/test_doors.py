"""Every way to a kernel, and the one question that each of them asks of queries, keys and values first."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.cache.el_attention import ELAttention
from regard.cross.free_rank import hard_attention
from regard.graph.exphormer import edge_attention
from regard.graph.point_transformer import vector_attention
from regard.integrations.slots import Parts
from regard.integrations.timm_attend import attend
from regard.integrations.torch_mha import MultiheadAttention
from regard.integrations.transformers_call import read
from regard.kernels import KERNELS, Problem, choose, execute
from regard.kernels.column_scan import column_scan
from regard.kernels.delta_scan import delta_scan
from regard.kernels.linear_scan import linear_scan
from regard.kernels.triton_decode import decode_batch
from regard.kernels.two_phase import Shares, two_phase
from regard.linear.agent import agent_attention
from regard.linear.based import taylor_attention
from regard.linear.conserved_flow import causal_flow_attention, flow_attention
from regard.linear.cosformer import cosformer_attention
from regard.linear.deltanet import delta_rule
from regard.linear.efficient import efficient_attention
from regard.linear.fast import fast_attention
from regard.linear.gla import gated_linear_attention
from regard.linear.gsa import slot_attention
from regard.linear.hrr import hrr_attention
from regard.linear.infini import infini_attention
from regard.linear.lada import lada_attention
from regard.linear.lightning import lightning_attention
from regard.linear.linear import linear_attention
from regard.linear.linformer import linformer_attention
from regard.linear.lln import lln_attention
from regard.linear.mlstm import matrix_memory
from regard.linear.nystrom import nystrom_attention
from regard.linear.performer import performer_attention
from regard.linear.retnet import retention
from regard.linear.ttt_linear import taught_linear
from regard.linear.yoso import yoso_attention
from regard.mixers.combiner import combiner_attention
from regard.mixers.detail_attention import high_res_attention
from regard.mixers.grouped import grouped_attention
from regard.mixers.long_range_grouping import grouping_attention
from regard.mixers.path import path_attention
from regard.mixers.probabilistic import probabilistic_attention
from regard.mixers.selective import selective_attention
from regard.mixers.sparse_correction import delta_attention
from regard.mixers.triadic import triadic_attention
from regard.routing.biformer import region_attention
from regard.routing.clusters import clustered_attention
from regard.routing.nsa_branches import Brief, native_sparse_attention, read_in_full
from regard.routing.running_best import dynamic_mask_attention
from regard.routing.sinkhorn import sinkhorn_attention
from regard.routing.token_aggregation import group_attention
from regard.stages import HeadMap
from regard.training.ssa import attend_in_windows, attend_to_some
from regard.vision.botnet import bottleneck_attention
from regard.vision.davit import channel_attention, window_attention
from regard.vision.gpsa import gated_positional_attention
from regard.vision.halo import halo_attention
from regard.vision.neighborhood import neighborhood_attention
from regard.vision.neighborhood_lse import neighborhood_with_lse
from regard.vision.non_local import gathered
from regard.vision.permuted_window import permuted_window_attention
from regard.vision.quantized_spike import spike_attention
from regard.vision.sparse_channel import sparse_channel_attention
from regard.vision.unidirectional_block import unidirectional_block_attention

SOURCE = Path(regard.__file__).parent
B, H, N, D = 2, 4, 8, 16

# --- where kernels are called -----------------------------------------------------------------------------------

THROUGH_EXECUTE = {
    "cache/el_attention.py",
    "cache/paged_attention.py",
    "doctor.py",
    "inspect/effective.py",
    "integrations/timm_attend.py",
    "integrations/torch_mha.py",
    "integrations/transformers_call.py",
    "mixers/grouped.py",
    "mixers/mla.py",
    "mixers/rcmha.py",
    "mixers/sliced.py",
    "mixers/strided.py",
    "pipeline/function.py",
    "pipeline/kept.py",
    "pipeline/layer.py",
    "pipeline/quick_step.py",
    "pipeline/shared_kv.py",
    "pipeline/streaming.py",
}
"""Who hands a problem to `regard.kernels.execute`, which looks at it."""
PAST_IT = {
    "vision/neighborhood.py": "kernel.run",  # has a table and extra keys that no problem holds
    "vision/neighborhood_lse.py": "with_lse",
    "cache/prefix_tree.py": "two_phase",  # of a pool of keys, not of batches of them
    "linear/_shared.py": "linear_scan",
    "linear/conserved_flow.py": "linear_scan",
    "linear/cosformer.py": "linear_scan",
    "linear/fast.py": "linear_scan",
    "linear/gla.py": "linear_scan",
    "linear/latte.py": "linear_scan",
    "linear/lightning.py": "linear_scan",
    "linear/hgrn2.py": "linear_scan",
    "linear/mamba2.py": "linear_scan",
    "linear/lln.py": "linear_scan",
    "linear/retnet.py": "linear_scan",
    "linear/gsa.py": "linear_scan",
    "linear/mlstm.py": "linear_scan",
    "linear/rwkv6.py": "linear_scan",
}
"""Who calls a kernel of its own, and which; these kernels ask by themselves."""
KERNEL_NAMES = {"linear_scan", "triton_scan", "triton_decode", "two_phase", "with_lse", "scaled_dot_product_attention"}


def calls(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "run" and ast.unparse(node.value) == "kernel":
            found.add("kernel.run")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "execute" or name in KERNEL_NAMES:
                found.add(name)
    return found


def test_all_places_that_call_a_kernel_are_known():
    """Outside the room of kernels. A new one goes through `execute`, or asks the same, and is told here."""
    paths = [p for p in SOURCE.rglob("*.py") if p.parts[len(SOURCE.parts)] not in ("kernels", "laws", "bench")]
    found = {str(p.relative_to(SOURCE)): names for p in paths if (names := calls(p))}
    assert {path for path, names in found.items() if "execute" in names} == THROUGH_EXECUTE
    past = {path: names - {"execute", "triton_decode"} for path, names in found.items()}
    assert {path: names.pop() for path, names in past.items() if names} == PAST_IT


# --- what each of them refuses ----------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


X = normal(B, H, N, D)
WRONG: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "shorter values": (X, X, X[:, :, :6]),
    "two values": (X, X, X[:, :, :2]),
    "longer values": (X, X, normal(B, H, 10, D)),
    "longer keys": (X, normal(B, H, 10, D), X),
    "keys and values of one batch": (X, X[:1], X[:1]),
    "queries of one batch": (X[:1], X, X),
    "values of one batch": (X, X, X[:1]),
    "more batches of values": (X, X, normal(B + 1, H, N, D)),
    "wider keys": (X, normal(B, H, N, D + 1), X),
    "fewer heads of values": (X, X, X[:, :2]),
    "queries without a batch": (X[0], X, X),
    "values without a batch": (X, X, X[0]),
    "values in double": (X, X, X.double()),
    "values on another device": (X, X, torch.empty(B, H, N, D, device="meta")),
}


def squared(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """For functions of maps: their tokens as rows of two."""
    return lambda *tensors: f(*(z.unflatten(-2, (2, -1)) for z in tensors), **options)


EDGES = torch.tensor([[0, 1, 2], [0, 1, 2]])
BLOCKS = {"block": 4, "count": 3, "window": 2}


def edges(*shape: int) -> tuple[Tensor, Tensor]:
    return normal(3, *shape), EDGES


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention": regard.attention,
    "plan": regard.plan,
    "execute": lambda q, k, v: execute(Problem(q, k, v, 1.0)),
    "choose": lambda q, k, v: choose(Problem(q, k, v, 1.0)),
    "read": lambda q, k, v: read(nn.Identity(), q, k, v, None),
    **{f"attention, {name}": lambda q, k, v, n=name: regard.attention(q, k, v, kernel=n) for name in KERNELS},
    "attend": lambda q, k, v: attend(Parts({}), q, k, v, None, scale=1.0),
    "linear_scan": linear_scan,
    "column_scan": lambda q, k, v: column_scan(q, k, v, -torch.ones(B, H, N, D)),
    "delta_scan": lambda q, k, v: delta_scan(q, k, v, torch.ones(B, H, N)),
    "delta_rule": lambda q, k, v: delta_rule(q, k, v, torch.ones(B, H, N)),
    "agent_attention": lambda q, k, v: agent_attention(q, X[:, :, :2], k, v),
    "flow_attention": flow_attention,
    "causal_flow_attention": causal_flow_attention,
    "delta_attention": lambda q, k, v: delta_attention(q, k, v, masks.causal()),
    "combiner_attention": combiner_attention,
    "efficient_attention": efficient_attention,
    "fast_attention": fast_attention,
    "taylor_attention": taylor_attention,
    "infini_attention": lambda q, k, v: infini_attention(q, k, v, torch.zeros(H))[0],
    "lada_attention": lambda q, k, v: lada_attention(q, k, v, torch.ones(B, H, N)),
    "lightning_attention": lambda q, k, v: lightning_attention(q, k, v, torch.ones(H)),
    "linear_attention": linear_attention,
    "cosformer_attention": lambda q, k, v: cosformer_attention(q, k, v, N),
    "lln_attention": lambda q, k, v: lln_attention(q, k, v, 1.0, 1.0),
    "linformer_attention": lambda q, k, v: linformer_attention(q, k, v, torch.ones(16, 2)),
    "gated_linear_attention": lambda q, k, v: gated_linear_attention(q, k, v, -torch.ones(B, H, N, D)),
    "matrix_memory": lambda q, k, v: matrix_memory(q, k, v, *2 * (torch.ones(B, H, N),)),
    "slot_attention": lambda q, k, v: slot_attention(q, k, v, *2 * (-torch.ones(B, H, N, 5),)),
    "retention": lambda q, k, v: retention(q, k, v, -torch.ones(H)),
    "taught_linear": lambda q, k, v: taught_linear(q, k, v, torch.ones(B, H, N), torch.ones(B, H, N), None)[0],
    "hrr_attention": hrr_attention,
    "hard_attention": hard_attention,
    "spike_attention": spike_attention,
    "gathered": gathered,
    "gathered, dot": lambda q, k, v: gathered(q, k, v, pairwise="dot"),
    "nystrom_attention": lambda q, k, v: nystrom_attention(q, k, v, torch.ones(1, 2, N) / N),
    "yoso_attention": yoso_attention,
    "probabilistic_attention": probabilistic_attention,
    "path_attention": lambda q, k, v: path_attention(q, k, v, k, k[..., 0])[0],
    "selective_attention": lambda q, k, v: selective_attention(q, k, v)[0],
    "grouped_attention": grouped_attention,
    "grouping_attention": lambda q, k, v: grouping_attention(q, k, v, size=(2, 2), stride=2),
    "performer_attention": lambda q, k, v: performer_attention(q, k, v, normal(5, D)),
    "native_sparse_attention": lambda q, k, v: native_sparse_attention(
        q, k, v, torch.ones(B, H, N, 3), Brief(X[:, :, :2], X[:, :, :2], torch.ones(1, 2).bool(), 4, 4), **BLOCKS
    ),
    "dynamic_mask_attention": lambda q, k, v: dynamic_mask_attention(q, k, v, torch.ones(k.shape[:3]), window=3)[0],
    "read_in_full": lambda q, k, v: read_in_full(
        q, k, v, torch.ones(B, H, N, 2).bool(), block=4, count=3, mask=masks.causal()
    ),
    "sinkhorn_attention": sinkhorn_attention,
    "clustered_attention": lambda q, k, v: clustered_attention(q, k, v, *2 * (torch.zeros(B, H, 1, 2).long(),)),
    "attend_to_some": lambda q, k, v: attend_to_some(q, k, v, torch.arange(3)),
    "attend_in_windows": lambda q, k, v: attend_in_windows(q, k, v, torch.arange(N), 2),
    "channel_attention": channel_attention,
    "window_attention": squared(window_attention, window=2),
    "sparse_channel_attention": lambda q, k, v: sparse_channel_attention(q, k, v, torch.ones(H, 1, 1)),
    "permuted_window_attention": squared(permuted_window_attention, window=2),
    "halo_attention": squared(halo_attention, block=2, halo=1),
    "bottleneck_attention": squared(bottleneck_attention, tables=(normal(3, D), normal(7, D))),
    "unidirectional_block_attention": squared(unidirectional_block_attention, block=2),
    "neighborhood_attention": squared(neighborhood_attention, window=1),
    "gated_positional_attention": squared(gated_positional_attention, places=normal(H, 3), gate=normal(H)),
    "neighborhood_with_lse": squared(neighborhood_with_lse, window=1),
    "high_res_attention": lambda q, k, v: high_res_attention(q, k, v, k, v, torch.ones(B, N, N, dtype=torch.bool)),
    "group_attention": lambda q, k, v: group_attention(q, k, v, torch.zeros(B, N).long(), size=2),
    "region_attention": squared(region_attention, regions=torch.zeros(B, 2, 1).long()),
}
"""Every public function of queries, keys and values of batches and heads."""
OTHERWISE = {
    "decode_batch": lambda q, k, v: decode_batch(q[..., 0, :], k, v, torch.full((B,), 4)),
    "two_phase": lambda q, k, v: two_phase(q[0].transpose(0, 1), k[0], v[0], Shares([], []), scale=1.0),
    "edge_attention": lambda q, k, v: edge_attention(*(z[0].transpose(0, 1) for z in (q, k, v)), *edges(H, D)),
    "triadic_attention": lambda q, k, v: triadic_attention(q[:, 0], k[:, 0], v[:, 0]),
    "vector_attention": lambda q, k, v: vector_attention(
        q[0, 0], k[0, 0], v[0, 0], edges(D)[0], nn.Identity(), edges()[1]
    ),
}
"""Those of nodes, or of one query."""
INNER = {
    "check_inputs",
    "problem",
    "triton_decode",
    "triton_scan",
    "triton_delta",
    "over",
    "launch",
    "call",
    "able",
    "decode",
    "quick",
}
INNER |= {"finite", "joined", "joins", "with_lse", "check_scan"}
INNER |= {"finite", "posed", "sampled_sum", "outputs", "gradients", "kept_call"}
"""What stands behind those, or is no way to a kernel."""


def public_functions() -> set[str]:
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.name.startswith("_") or "laws" in path.parts:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and {"q", "k", "v"} <= {a.arg for a in node.args.args}:
                found.add(node.name)
    return {name for name in found if not name.startswith("_")}


def test_all_public_functions_are_asked():
    asked = {name.split(",")[0] for name in FUNCTIONS} | OTHERWISE.keys()
    known = asked | INNER | {"forward", "backward"}
    assert public_functions() <= known, public_functions() - known


ALLOWED = {("read", "queries of one batch"), ("read", "values in double"), ("attend", "values in double")}
"""What models of other libraries do: learned queries that serve a batch, and rotation or norms that widen queries."""


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_that_do_not_fit_are_refused(name, wrong):
    if (name, wrong) in ALLOWED:
        FUNCTIONS[name](*WRONG[wrong])
        return
    with pytest.raises((ValueError, TypeError), match=r"^\w+: .* \(got .*\); expected "):
        FUNCTIONS[name](*WRONG[wrong])


@pytest.mark.parametrize("wrong", ["shorter values", "longer values", "longer keys", "wider keys"])
@pytest.mark.parametrize("name", OTHERWISE)
def test_so_are_those_of_nodes_and_single_queries(name, wrong):
    with pytest.raises(ValueError, match=r"^\w+: .* \(got .*\); expected "):
        OTHERWISE[name](*WRONG[wrong])


ABLE = [name for name in FUNCTIONS if name.partition(", ")[2] in ("", "sdpa", "chunked", "eager")]


@pytest.mark.parametrize("name", ABLE)
def test_and_those_that_do_are_not(name):
    FUNCTIONS[name](X, X, X)


def test_masks_and_biases_are_asked_too():
    mask, bias = masks.padding(torch.ones(3, N, dtype=torch.bool)), torch.zeros(1, 1, 1, N + 1)
    heads = masks.per_head([masks.causal()] * (H + 1))
    for wrong, said in (({"mask": mask}, "mask does not fit"), ({"mask": heads}, "mask does not fit"),
                        ({"bias": bias}, "bias does not broadcast"), ({"mask": torch.ones(B, H, N, N)}, "mask has the"),
                        ({"bias": bias[..., :N].to("meta")}, "bias is on another device")):  # fmt: skip
        for call in (regard.attention, lambda q, k, v, **more: execute(Problem(q, k, v, 1.0, **more))):
            with pytest.raises((ValueError, TypeError), match=f"attention: {said}"):
                call(X, X, X, **wrong)


class Shorter(HeadMap):
    """Loses a value on the way."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v[:, :, 1:]


def test_what_a_users_part_makes_is_asked_as_well():
    x, heads = normal(B, N, D), {"heads": Shorter()}
    for layer in (regard.Attention(D, H, **heads), MultiheadAttention(D, H, batch_first=True, mechanism=heads)):
        with pytest.raises(ValueError, match="attention: v has another length than k"):
            layer(x) if isinstance(layer, regard.Attention) else layer(x, x, x)


@pytest.mark.parametrize("kind", [regard.Attention, ELAttention])
def test_a_step_refuses_before_it_writes(kind):
    layer, x = kind(D, H, causal=True), normal(B, 1, D)
    state = layer.init_state(B, 4)
    with torch.no_grad():
        for mask in (masks.padding(torch.ones(3, 4, dtype=torch.bool)), masks.per_head([masks.causal()] * 3)):
            with pytest.raises(ValueError, match="attention: mask does not fit the inputs"):
                layer.step(x, state, mask=mask)
        assert state.written == [0]
        for other in (layer.init_state(B + 1, 4), kind(2 * D, H, causal=True).init_state(B, 4)):
            with pytest.raises(ValueError, match="does not fit buffers"):
                layer.step(x, other)


@pytest.mark.parametrize("name", ["softmax", "linear", "efficient"])
def test_contexts_of_another_batch_are_refused(name):
    layer = regard.create(name, dim=D, num_heads=H)
    with pytest.raises(ValueError, match="context has another batch than x"):
        layer(normal(B, N, D), normal(1, N, D))

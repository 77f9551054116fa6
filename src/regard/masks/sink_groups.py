"""Shifted groups with sinks: half of the heads cut half a group later, and all see the first tokens.

Without sinks it is LongLoRA's shifted sparse attention. It is for training: models tuned with it run full attention
afterwards.
"""

from regard.cards import PLAIN, Card, Cost, Paper
from regard.masks.algebra import Mask
from regard.masks.shifted import shifted_groups

CARD = Card(
    "shifted_groups",
    equation="""allowed(h, i, j) = (floor((i - s_h) / w) == floor((j - s_h) / w)  or  j < n_s)  and  j <= i
w = group,   s_h = floor(w / 2) for the last `shifted` heads, else 0,   n_s = sinks""",
    papers=(
        Paper(
            "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
            "Zhang",
            2024,
            "2406.05678",
            "abstract, a summary of the introduction; the authors' repository, which has the groups without any sinks",
        ),
    ),
    traits=PLAIN - {"position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*min(S, group + sinks)*D", "2*S*G*D"),
    claim="With sinks the first token reaches every later one in one layer; without, news go one and a half groups in "
    "two: tests/masks/test_sink_groups.py::test_sinks_reach_everybody_in_one_layer, "
    "tests/masks/test_sink_groups.py::test_a_key_at_the_start_is_found_with_sinks.",
    differs=(
        "The repository's code has neither sinks nor a reassembly: that all see the first tokens, and that fewer than "
        "half of the heads may be shifted, is read out of the abstract.",
        "Shifted groups are cut: half a group stands alone before the first. The repository's code rolls it behind the "
        "last tokens, which its queries then see, though they are the future; wrap=T does that, in layers that are not "
        "causal (in a causal one it is as if cut).",
        "A mask knows no length: `group` is a number, where the repository has a quarter of the tokens.",
        "All groups are padded as the mask says, where the repository pads them all as the first.",
        "Groups and sinks count from the first token of a row, padding among them: pad on the right. Documents of "
        "`masks.packed` are run one by one, each with its own.",
        "Left out: H2O, a cache policy, and LoRA.",
    ),
    verified="reconstructed",
    example={"group": 4, "sinks": 1},
    tries={"wrap": 12},
    defaults={"group": "ours", "shifted": "code", "sinks": "ours, StreamingLLM's number", "wrap": "ours"},
)


@CARD.fills("mask")
def sink_groups(
    num_heads: int, *, group: int = 128, shifted: int | None = None, sinks: int = 4, wrap: int | None = None
) -> Mask:
    """The mask of `num_heads` heads.

    Args:
        group: w, tokens that see each other.
        shifted: how many heads have groups half a group later; default half of them.
        sinks: n_s, first tokens that all see. 0 is LongLoRA's.
        wrap: how many tokens there are, a multiple of `group`, where shifted groups are to be rolled, not cut.
    """
    return shifted_groups(group, num_heads, shifted=shifted, sinks=sinks, wrap=wrap)

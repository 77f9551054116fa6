"""State dicts under other libraries' names."""

import pytest
import torch
from torch import nn

import regard
from regard.integrations.convert import convert


def test_torch_s_own_module_gives_the_same_outputs():
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    ours = regard.Attention(12, 3, bias=True).double()
    ours.load_state_dict(convert(theirs.state_dict(), to="separate"))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("to", ["separate", "timm", "torch"])
@pytest.mark.parametrize("through", ["separate", "timm", "torch"])
def test_there_and_back(to, through):
    state = {**regard.Attention(8, 2, bias=True).state_dict(), "q_norm.weight": torch.ones(4)}
    state = convert(state, to=to)
    back = convert(convert(state, to=through), to=to)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_names():
    state = regard.Attention(8, 2, bias=False).state_dict()
    assert set(convert(state, to="timm")) == {"qkv.weight", "proj.weight"}
    assert set(convert(state, to="torch")) == {"in_proj_weight", "out_proj.weight"}


def test_a_missing_bias_is_zero():
    """As Whisper's keys have none."""
    state = regard.Attention(8, 2, bias=True).state_dict()
    del state["k_proj.bias"]
    stacked = convert(state, to="timm")["qkv.bias"]
    assert torch.equal(stacked, torch.cat([state["q_proj.bias"], torch.zeros(8), state["v_proj.bias"]]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"qkv[.]weight or in_proj_weight among"):
        convert({"weight": torch.ones(2)}, to="timm")
    with pytest.raises(ValueError, match=r"stacks equal projections, got \[8, 4, 4\]"):
        convert(regard.Attention(8, 2, num_kv_heads=1).state_dict(), to="torch")
    with pytest.raises(ValueError, match="to must be one of"):
        convert({}, to="jax")

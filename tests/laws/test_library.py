"""What the laws take for granted of the library as a whole."""

import subprocess
import sys

import pytest
from torch import nn

import regard
from regard.catalog import NO_LAYERS
from regard.laws import of


def test_import_sets_no_seed() -> None:
    """L29: neither import nor the catalogue touches the global generator."""
    code = "import torch; s = torch.initial_seed(); a = torch.get_rng_state(); "
    code += "import regard; regard.mechanisms(); "
    code += "assert torch.initial_seed() == s and torch.equal(torch.get_rng_state(), a)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", regard.mechanisms())
def test_every_mechanism_is_a_module_with_its_examples_options(name: str) -> None:
    assert isinstance(of(name).build(), nn.Module) or regard.card(name).protocol in NO_LAYERS
    assert regard.card(name).options.keys() >= regard.card(name).example.keys() - {"num_kv_heads", "kernel"}

"""What the tests of attention modules share."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

copied_both_ways = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)


def assert_twins(twin: nn.Module, module: nn.Module, call: Callable[[nn.Module], torch.Tensor]) -> None:
    """A copy computes the same to the bit and shares no parameter."""
    assert torch.equal(call(twin), call(module))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), module.parameters(), strict=True))


def set_identity_projections(attention: nn.Module) -> None:
    """Make the projections of values and outputs the identity, so that values of one-hot rows show the weights."""
    embed_dim = attention.out_proj.weight.shape[0]
    with torch.no_grad():
        attention.in_proj_weight[2 * embed_dim :] = torch.eye(embed_dim)
        attention.out_proj.weight.copy_(torch.eye(embed_dim))
        attention.in_proj_bias.zero_()
        attention.out_proj.bias.zero_()

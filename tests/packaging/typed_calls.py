"""Calls as a user's type checker sees them: `make types` checks the types that this file expects."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import recattn
from recattn import nn
from recattn._typing import PaddingSide
from recattn.serving import StateTable


def call_functions() -> None:
    q, positions, bias = torch.randn(1, 2, 5, 4), torch.tensor([[1, 3]]), torch.zeros(1, 1, 2, 2)
    w = torch.randn(5, 3)
    assert_type(recattn.sink_attention(q, q, q, positions, bias), Tensor)
    assert_type(recattn.sink_attention(q, q, q, positions, bias, return_lse=True), tuple[Tensor, Tensor])
    assert_type(recattn.sink_attention(q, q, q, positions, bias, padding_side="left", impl="reference"), Tensor)
    assert_type(recattn.inter_sink_bias(q, q, bias_scale=2.0), Tensor)
    assert_type(recattn.refined_attention(q, q, q, w, w, mechanism="simple", source="weights"), Tensor)
    assert_type(recattn.wasserstein_attention(q, q.exp(), q, q.exp(), q, q.exp()), tuple[Tensor, Tensor])
    assert_type(recattn.lrea_compress(q[0], w), Tensor)
    assert_type(recattn.lrea_absorb(q, q, torch.randn(5, 7)), tuple[Tensor, Tensor])
    assert_type(recattn.lrea_quantize(q), tuple[Tensor, Tensor])


def call_modules() -> None:
    x, positions = torch.randn(1, 5, 8), torch.tensor([[1, 3]])
    attention = nn.SinkAttention(8, 2, padding_side="left")
    assert_type(attention.forward(x, x, x), tuple[Tensor, Tensor | None])
    assert_type(attention.padding_side, PaddingSide | None)
    assert_type(nn.InterSinkBias(8, 2).forward(x, positions), Tensor)
    assert_type(nn.TargetAttention(8, pooling="softmax").forward(x[0], x.expand(5, 5, 8)), Tensor)
    lrea = nn.LREA(8, 5, 3, 2, orientation="weights")
    assert_type(lrea.forward(x[0, :1], x), Tensor)
    assert_type(lrea.export_state(x), nn.LREAState)


def patch_a_model() -> None:
    encoder = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    with recattn.patch(encoder, {torch.nn.MultiheadAttention: nn.SinkAttention}):
        assert_type(isinstance(encoder.self_attn, nn.SinkAttention), bool)


def serve() -> None:
    table = StateTable(4, heads=2, rank=3, dim=4)
    assert_type(table.contains(torch.tensor([7])), Tensor)
    assert_type(table.state_dict(), dict[str, Tensor])

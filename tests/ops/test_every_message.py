"""Bad calls between good calls of the same signature: every message comes first, in between, and after a thousand.

What a call keeps from the calls before it must never stand in for a check.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import recattn
from tests.helpers.operator_cases import CASES, Case

CALLS = 1000
NO_SUCH_IMPL = "impl must be None or one of 'reference', 'correction', 'triton', 'chunked', 'cuda', 'cpu', got 'no'"
NO_TENSOR = "must be a number, got a torch.Tensor, which would get no gradient here"


class Bad(NamedTuple):
    """One wrong argument: how it is made from the right one, and the message."""

    argument: str
    change: Callable[[Tensor], object]
    message: str


def entry(index: int | tuple[int, ...], value: int) -> Callable[[Tensor], Tensor]:
    """Another value in one place: shapes and dtypes are those of a good call."""

    def change(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[index] = value
        return changed

    return change


def given(value: object) -> Callable[[object], object]:
    return lambda _: value


def narrower(x: Tensor) -> Tensor:
    return x[..., :-1]


def shorter(x: Tensor) -> Tensor:
    return x[:-1]


SINK = (
    Bad("q", Tensor.long, "q must be float64 or float32 or bfloat16 or float16, got int64"),
    Bad("v", Tensor.double, "v must have the dtype of q, float32, got float64"),
    Bad("sink_positions", Tensor.float, "sink_positions must be int64 or int32, got float32"),
    Bad("sink_positions", entry((0, 1), -2), "sink_positions must be token positions, or -1 for padding, got -2 at"),
    Bad("inter_sink_bias", Tensor.tolist, "inter_sink_bias must be a torch.Tensor, got list"),
    Bad("inter_sink_bias", Tensor.long, "inter_sink_bias must be float64 or float32 or bfloat16 or float16, got int64"),
    Bad("sink_logits", given(torch.zeros(3)), "sink_logits must be [Hq] = [2], got [3]"),
    Bad("k", lambda x: x.to("meta"), "k must be on the device of q, cpu, got meta"),
    Bad("dropout_p", given(1.5), "dropout_p must be at least 0 and below 1, got 1.5"),
    Bad("scale", given(torch.tensor(1.0)), f"scale {NO_TENSOR}"),
    Bad("padding_side", given("top"), "padding_side must be 'right' or 'left', got 'top'"),
    Bad("impl", given("no"), NO_SUCH_IMPL),
    Bad("impl", given("cuda"), "sink_attention has no impl='cuda'; it has 'cpu', 'reference', 'triton', 'correction'"),
)
BAD = {
    "sink": (
        *SINK,
        Bad("q", lambda x: x[0], "q must be [B, Hq, N, D], got [2, 7, 4]"),
        Bad("k", narrower, "k must be [B, Hkv, N, D] = [3, 1, 7, 4], got [3, 1, 7, 3]"),
        Bad("sink_positions", entry((0, 0), 9), "sink_positions must be below the sequence length 7, got 9 at"),
        Bad("inter_sink_bias", narrower, "inter_sink_bias must be [B, 1 or Hq, M, M] = [3, 1 or 2, 3, 3], got"),
        Bad("seq_lens", entry(0, 8), "seq_lens must be between 0 and 7, got 8 at index [0]"),
        Bad("seq_lens", shorter, "seq_lens must be [B] = [3], got [2]"),
        Bad("cu_seqlens", given(torch.tensor([0, 7, 14, 21])), "seq_lens must be None beside cu_seqlens"),
        Bad("max_seqlen", given(7), "max_seqlen must be None but with cu_seqlens, got 7"),
    ),
    "packed": (
        *SINK,
        Bad("q", lambda x: x[0], "q must be [T, Hq, D], got [2, 4]"),
        Bad("k", narrower, "k must be [T, Hkv, D] = [12, 2, 4], got [12, 2, 3]"),
        Bad("sink_positions", entry((0, 0), 9), "sink_positions must be below the sequence length of each sequence"),
        Bad("inter_sink_bias", narrower, "inter_sink_bias must be [B, 1 or Hq, M, M] = [3, 1 or 2, 3, 3], got"),
        Bad("cu_seqlens", entry(3, 11), "cu_seqlens must be offsets from 0 to 12, got offsets from 0 to 11"),
        Bad("cu_seqlens", entry(1, 9), "cu_seqlens must be ascending, got 8 at index [2]"),
        Bad("cu_seqlens", Tensor.float, "cu_seqlens must be int64 or int32, got float32"),
        Bad("max_seqlen", given(-1), "max_seqlen must be an integer of at least 0, got -1"),
    ),
    "bias": (
        Bad("q_s", lambda x: x[0], "q_s must be [B, H, M, D], got [1, 3, 4]"),
        Bad("k_s", narrower, "k_s must be [B, H, M, D] = [2, 1, 3, 4], got [2, 1, 3, 3]"),
        Bad("k_s", Tensor.double, "k_s must have the dtype of q_s, float32, got float64"),
        Bad("sink_mask", Tensor.float, "sink_mask must be bool, got float32"),
        Bad("sink_mask", narrower, "sink_mask must be [B, M] = [2, 3], got [2, 2]"),
        Bad("bias_scale", given("a"), "bias_scale must be a number or a tensor of one element, got str"),
        Bad("bias_scale", given(torch.ones(2)), "bias_scale must be a number or a tensor of one element, got one of"),
        Bad("scale", given(torch.tensor(1.0)), f"scale {NO_TENSOR}"),
        Bad("dropout_p", given(7), "dropout_p must be at least 0 and below 1, got 7"),
        Bad("impl", given("no"), NO_SUCH_IMPL),
    ),
    "refined": (
        Bad("q", narrower, "k must be [B, H, N, D] = [3, 2, 7, 3], got [3, 2, 7, 4]"),
        Bad("k", Tensor.double, "k must have the dtype of q, float32, got float64"),
        Bad("v", lambda x: x.to("meta"), "v must be on the device of q, cpu, got meta"),
        Bad("w_q", narrower, "w_k must be [Nmax, R] = [7, 2], got [7, 3]"),
        Bad("w_k", Tensor.double, "w_k must have the dtype of q, float32, got float64"),
        Bad("w_v", given(torch.zeros(7, 7)), "w_v must be None for mechanism='simple', got a tensor"),
        Bad("seq_lens", entry(0, 8), "seq_lens must be between 0 and 7, got 8 at index [0]"),
        Bad("seq_lens", Tensor.float, "seq_lens must be int64 or int32, got float32"),
        Bad("dropout_p", given(-0.5), "dropout_p must be at least 0 and below 1, got -0.5"),
        Bad("scale", given("a"), "scale must be a number, got 'a'"),
        Bad("padding_side", given("top"), "padding_side must be 'right' or 'left', got 'top'"),
        Bad("mechanism", given("no"), "mechanism must be 'simple' or 'value' or 'additive' or 'stochastic', got 'no'"),
        Bad("source", given("no"), "source must be 'logits' or 'weights', got 'no'"),
        Bad("impl", given("no"), NO_SUCH_IMPL),
        Bad("impl", given("chunked"), "refined_attention cannot run impl='chunked' here: the tensors are on cpu"),
    ),
    "gaussian": (
        Bad("mean_q", narrower, "cov_q must be [B, H, N, D] = [3, 2, 7, 2], got [3, 2, 7, 3]"),
        Bad("cov_k", Tensor.double, "cov_k must have the dtype of mean_q, float32, got float64"),
        Bad("cov_v", narrower, "cov_v must be [B, H, N, Dv] = [3, 2, 7, 2], got [3, 2, 7, 1]"),
        Bad("w_q", given(torch.zeros(7, 7)), "w_k must be a torch.Tensor, got NoneType"),
        Bad("seq_lens", entry(1, -1), "seq_lens must be between 0 and 7, got -1 at index [1]"),
        Bad("dropout_p", given(2), "dropout_p must be at least 0 and below 1, got 2"),
        Bad("scale", given(1j), "scale must be a number, got 1j"),
        Bad("padding_side", given(None), "padding_side must be 'right' or 'left', got None"),
        Bad("source", given("no"), "source must be 'logits' or 'weights', got 'no'"),
        Bad("impl", given("no"), NO_SUCH_IMPL),
    ),
    "compress": (
        Bad("behaviors", Tensor.double, "w_comp must have the dtype of behaviors, float64, got float32"),
        Bad("behaviors", Tensor.tolist, "behaviors must be a torch.Tensor, got list"),
        Bad("w_comp", shorter, "Lmax of w_comp must be at least L = 7, got 6"),
        Bad("seq_lens", entry(0, 9), "seq_lens must be between 0 and 7, got 9 at index [0]"),
        Bad("seq_lens", Tensor.float, "seq_lens must be int64 or int32, got float32"),
        Bad("impl", given("no"), NO_SUCH_IMPL),
    ),
    "items": (
        Bad("item_ids", entry((0, 0), 9), "item_ids must be rows of a table of 9, got 9 at index [0, 0]"),
        Bad("item_ids", Tensor.float, "item_ids must be int64 or int32, got float32"),
    ),
    "restored": (
        Bad("targets", narrower, "keys must be [U, H, r, d] = [3, 2, 3, 3], got [3, 2, 3, 4]"),
        Bad("values", Tensor.double, "values must have the dtype of targets, float32, got float64"),
        Bad("w_decomp", narrower, "seq_lens must be between 0 and 6, got 7 at index [0]"),
        Bad("target_offsets", entry(3, 8), "target_offsets must be offsets from 0 to 9, got offsets from 0 to 8"),
        Bad("target_offsets", entry(1, 6), "target_offsets must be ascending, got 5 at index [2]"),
        Bad("target_offsets", Tensor.float, "target_offsets must be int64 or int32, got float32"),
        Bad("seq_lens", entry(0, 8), "seq_lens must be between 0 and 7, got 8 at index [0]"),
        Bad("negative_slope", given(torch.tensor(1.0)), f"negative_slope {NO_TENSOR}"),
        Bad("scale", given("a"), "scale must be a number, got 'a'"),
        Bad("impl", given("no"), NO_SUCH_IMPL),
    ),
    "absorb": (
        Bad("keys", lambda x: x[:, :, :-1], "values must be [U, H, r, dv] = [3, 2, 2, 5], got [3, 2, 3, 5]"),
        Bad("w_decomp", Tensor.double, "w_decomp must have the dtype of keys, float32, got float64"),
        Bad("seq_lens", entry(0, 8), "seq_lens must be between 0 and 7, got 8 at index [0]"),
        Bad("orientation", given("no"), "orientation must be 'scores' or 'weights', got 'no'"),
        Bad("scale", given("a"), "scale must be a number, got 'a'"),
    ),
    "absorbed": (
        Bad("targets", narrower, "state_keys must be [S, H, r, d] = [6, 2, 3, 3], got [6, 2, 3, 4]"),
        Bad("state_values", Tensor.double, "state_values must have the dtype of state_keys, float32, got float64"),
        Bad("slots", entry(0, 6), "slots must be rows of a table of 6, got 6 at index [0]"),
        Bad("slots", Tensor.float, "slots must be int64 or int32, got float32"),
        Bad("target_offsets", entry(3, 8), "target_offsets must be offsets from 0 to 9, got offsets from 0 to 8"),
        Bad("target_offsets", shorter, "target_offsets must be [U+1] = [4], got [3]"),
        Bad("key_scales", given(torch.zeros(6, 2, 3)), "key_scales and value_scales must be both given with int8"),
        Bad("negative_slope", given("a"), "negative_slope must be a number, got 'a'"),
        Bad("impl", given("no"), NO_SUCH_IMPL),
    ),
    "by item": (
        Bad("item_ids", entry(0, 8), "item_ids must be rows of a table of 8, got 8 at index [0]"),
        Bad("item_ids", Tensor.float, "item_ids must be int64 or int32, got float32"),
    ),
}


def draw_bias() -> dict[str, Tensor]:
    return {name: torch.randn(2, 1, 3, 4) for name in ("q_s", "k_s")} | {"sink_mask": torch.ones(2, 3).bool()}


@pytest.mark.parametrize("name", BAD)
def test_between_good_calls(name):
    torch.use_deterministic_algorithms(False)  # which fill every allocation: a thousand calls would take a minute
    case = CASES.get(name) or Case(recattn.inter_sink_bias, draw_bias, {})
    inputs = case.inputs()
    bad_calls = [({**inputs, bad.argument: bad.change(inputs.get(bad.argument))}, bad.message) for bad in BAD[name]]

    def expect_message(arguments: dict[str, object], message: str) -> None:
        with pytest.raises((ValueError, NotImplementedError), match=re.escape(message)):
            case.function(**arguments)

    for bad_call in bad_calls:
        expect_message(*bad_call)
    with torch.no_grad():
        for turn in range(CALLS):
            case.function(**inputs)
            expect_message(*bad_calls[turn % len(bad_calls)])
        for bad_call in bad_calls:
            case.function(**inputs)
            expect_message(*bad_call)

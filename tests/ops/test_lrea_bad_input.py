"""LREA: each wrong argument is refused by a message that names it."""

import functools
import re

import pytest
import torch
from torch import Tensor

import recattn
from tests.helpers.lrea_inputs import (
    assert_refuses,
    by_item_id,
    compiled_kernels,
    draw_absorbed,
    draw_compress,
    draw_restored,
    pack,
)


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("targets", torch.randn(67, 16), "targets must be [T, H, d], got [67, 16]"),
        (
            "targets",
            torch.randint(3, (67, 2, 16)),
            "targets must be float64 or float32 or bfloat16 or float16, got int64",
        ),
        ("keys", torch.randn(4, 3, 8, 16), "keys must be [U, H, r, d] = [4, 2, 8, 16], got [4, 3, 8, 16]"),
        ("keys", torch.randn(4, 2, 8, 15), "keys must be [U, H, r, d] = [4, 2, 8, 16], got [4, 2, 8, 15]"),
        ("keys", torch.randn(4, 2, 8, 16).half(), "keys must have the dtype of targets, float32, got float16"),
        ("values", torch.randn(4, 2, 9, 12), "values must be [U, H, r, dv] = [4, 2, 8, 12], got [4, 2, 9, 12]"),
        ("values", None, "values must be a torch.Tensor, got NoneType"),
        ("w_decomp", torch.randn(7, 100), "w_decomp must be [r, Lmax] = [8, 100], got [7, 100]"),
        ("w_decomp", torch.randn(8, 100, device="meta"), "w_decomp must be on the device of targets, cpu, got meta"),
        ("target_offsets", indices(0, 3, 67), "target_offsets must be [U+1] = [5], got [3]"),
        ("target_offsets", torch.randn(5), "target_offsets must be int64 or int32, got float32"),
        ("target_offsets", indices(0, 4, 3, 4, 67), "target_offsets must be ascending, got 3 at index [2]"),
        (
            "target_offsets",
            indices(0, 3, 3, 4, 66),
            "target_offsets must be offsets from 0 to 67, got offsets from 0 to 66",
        ),
        (
            "target_offsets",
            indices(1, 3, 3, 4, 67),
            "target_offsets must be offsets from 0 to 67, got offsets from 1 to 67",
        ),
        ("seq_lens", indices(1, 2, 3), "seq_lens must be [U] = [4], got [3]"),
        ("seq_lens", torch.ones(4), "seq_lens must be int64 or int32, got float32"),
        ("seq_lens", indices(1, 2, 101, 3), "seq_lens must be between 0 and 100, got 101 at index [2]"),
        ("seq_lens", indices(1, -2, 10, 3), "seq_lens must be between 0 and 100, got -2 at index [1]"),
        ("scale", float("nan"), "scale must be finite, got nan"),
        ("negative_slope", float("inf"), "negative_slope must be finite, got inf"),
        ("impl", "fast", "impl must be None or one of"),
    ],
)
def test_restored_refuses(impl, name, value, message):
    assert_refuses(recattn.lrea_attention, {**draw_restored(), "impl": impl}, name, value, message)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("targets", torch.randn(67, 16), "targets must be [T, H, d], got [67, 16]"),
        ("state_keys", torch.randn(7, 1, 8, 16), "state_keys must be [S, H, r, d] = [7, 2, 8, 16], got [7, 1, 8, 16]"),
        (
            "state_values",
            torch.randn(6, 2, 8, 12),
            "state_values must be [S, H, r, dv] = [7, 2, 8, 12], got [6, 2, 8, 12]",
        ),
        (
            "state_values",
            torch.randn(7, 2, 8, 12).double(),
            "state_values must have the dtype of state_keys, float32, got float64",
        ),
        ("slots", indices(0, 1, 2), "target_offsets must be [U+1] = [4], got [5]"),
        ("slots", torch.zeros(4), "slots must be int64 or int32, got float32"),
        ("slots", indices(0, 1, 7, 2), "slots must be rows of a table of 7, got 7 at index [2]"),
        ("slots", indices(0, 1, -1, 2), "slots must be rows of a table of 7, got -1 at index [2]"),
        ("target_offsets", indices(0, 4, 3, 4, 67), "target_offsets must be ascending, got 3 at index [2]"),
        (
            "target_offsets",
            indices(0, 3, 3, 4, 66),
            "target_offsets must be offsets from 0 to 67, got offsets from 0 to 66",
        ),
        ("negative_slope", float("nan"), "negative_slope must be finite, got nan"),
        ("item_ids", torch.zeros(67), "item_ids must be int64 or int32, got float32"),
        ("item_ids", torch.zeros(1, 67).long(), "item_ids must be [T], got [1, 67]"),
        ("item_ids", torch.arange(1, 68), "item_ids must be rows of a table of 67, got 67 at index [66]"),
        (
            "item_ids",
            indices(0, 1, 2),
            "target_offsets must be offsets from 0 to 3, got offsets from 0 to 67",
        ),
        (
            "key_scales",
            torch.ones(7, 2, 8),
            "must be both given with int8 states, neither with others, got float32 states and 1 of them",
        ),
        (
            "state_keys",
            torch.ones(7, 2, 8, 16, dtype=torch.int8),
            "state_values must have the dtype of state_keys, int8, got float32",
        ),
    ],
)
def test_absorbed_refuses(impl, name, value, message):
    assert_refuses(recattn.lrea_absorbed_attention, {**draw_absorbed(), "impl": impl}, name, value, message)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("key_scales", torch.ones(7, 2, 9), "key_scales must be [S, H, r] = [7, 2, 8], got [7, 2, 9]"),
        ("value_scales", torch.ones(7, 2, 8).double(), "value_scales must be float32, got float64"),
        (
            "value_scales",
            None,
            "must be both given with int8 states, neither with others, got int8 states and 1 of them",
        ),
    ],
)
def test_absorbed_refuses_scales(impl, name, value, message):
    inputs = draw_absorbed()
    states = {name: torch.ones(inputs[name].shape, dtype=torch.int8) for name in ("state_keys", "state_values")}
    scales = {name: torch.ones(7, 2, 8) for name in ("key_scales", "value_scales")}
    function = functools.partial(recattn.lrea_absorbed_attention, impl=impl)
    assert_refuses(function, {**inputs, **states, **scales}, name, value, message)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
def test_compress_refuses_item_ids(impl):
    inputs = {**by_item_id(draw_compress(seq_lens=[100, 40, 0]), "behaviors"), "impl": impl}
    ids = inputs["item_ids"]
    assert_refuses(recattn.lrea_compress, inputs, "item_ids", ids.float(), "item_ids must be int64 or int32")
    ids = ids.clone()
    ids[1, 39] = 11
    message = "item_ids must be rows of a table of 11, got 11 at index [1, 39]"
    assert_refuses(recattn.lrea_compress, inputs, "item_ids", ids, message)
    message = "behaviors must be [I, d], got [3, 100, 17]"
    assert_refuses(recattn.lrea_compress, inputs, "behaviors", torch.randn(3, 100, 17), message)


def test_quantize_refuses():
    for value, message in (
        (torch.zeros(3, 4, dtype=torch.int8), "state must be float64 or float32 or bfloat16 or float16, got int8"),
        (torch.zeros(3, 0), "state must be [..., r, d] with d of at least 1, got [3, 0]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            recattn.lrea_quantize(value)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("behaviors", torch.randn(100, 17), "behaviors must be [U, L, d], got [100, 17]"),
        ("w_comp", torch.randn(99, 8), "Lmax of w_comp must be at least L = 100, got 99"),
        ("w_comp", torch.randn(100, 8).half(), "w_comp must have the dtype of behaviors, float32, got float16"),
        ("seq_lens", indices(1, 2), "seq_lens must be [U] = [3], got [2]"),
        ("seq_lens", indices(1, 2, 101), "seq_lens must be between 0 and 100, got 101 at index [2]"),
        ("seq_lens", indices(-1, 2, 1), "seq_lens must be between 0 and 100, got -1 at index [0]"),
    ],
)
def test_compress_refuses(impl, name, value, message):
    assert_refuses(recattn.lrea_compress, {**draw_compress(), "impl": impl}, name, value, message)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("behaviors", torch.randn(1, 140, 17), "behaviors must be [T, d], got [1, 140, 17]"),
        ("seq_lens", indices(1, 2, 3), "seq_lens must be None beside cu_seqlens (packed sequences have no padding)"),
        ("cu_seqlens", indices(0, 100, 90, 140), "cu_seqlens must be ascending, got 90 at index [2]"),
        ("cu_seqlens", indices(0, 139), "cu_seqlens must be offsets from 0 to 140, got offsets from 0 to 139"),
        ("cu_seqlens", indices(), "cu_seqlens must be [U + 1], got no offset"),
        (
            "cu_seqlens",
            indices(0, 1, 140),
            "cu_seqlens must have at most Lmax of w_comp behaviours per user, got 139 at index [1] and Lmax = 100",
        ),
        ("max_seqlen", -1, "max_seqlen must be an integer of at least 0, got -1"),
        ("cu_seqlens", None, "max_seqlen must be None but with cu_seqlens, got 100"),
    ],
)
def test_compress_refuses_packed(impl, name, value, message):
    inputs = {**pack(draw_compress(seq_lens=[100, 40, 0])), "max_seqlen": 100, "impl": impl}
    assert_refuses(recattn.lrea_compress, inputs, name, value, message)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("keys", torch.randn(8, 16), "keys must be [U, H, r, d], got [8, 16]"),
        ("values", torch.randn(4, 2, 9, 12), "values must be [U, H, r, dv] = [4, 2, 8, 12], got [4, 2, 9, 12]"),
        ("w_decomp", torch.randn(9, 100), "w_decomp must be [r, Lmax] = [8, 100], got [9, 100]"),
        ("seq_lens", indices(0, 1, 2, 200), "seq_lens must be between 0 and 100, got 200 at index [3]"),
        ("orientation", "keys", "orientation must be 'scores' or 'weights', got 'keys'"),
    ],
)
def test_absorb_refuses(name, value, message):
    inputs = draw_restored()
    inputs = {name: inputs[name] for name in ("keys", "values", "w_decomp", "seq_lens")}
    assert_refuses(recattn.lrea_absorb, inputs, name, value, message)


def test_nonnegativity_loss_refuses():
    inputs = {"w_decomp": torch.randn(8, 10), "compressed": torch.randn(3, 8, 4)}
    message = "compressed must be [U, r, d] = [3, 8, 4], got [3, 7, 4]"
    function = functools.partial(recattn.lrea_nonnegativity_loss, reduction="mean")
    assert_refuses(function, inputs, "compressed", torch.randn(3, 7, 4), message)
    assert_refuses(function, inputs, "reduction", "none", "reduction must be 'mean' or 'sum', got 'none'")


@compiled_kernels
@pytest.mark.parametrize("name", ["targets", "state_keys", "state_values", "slots", "target_offsets"])
def test_the_operator_itself_checks_what_it_reads(name):
    inputs = draw_absorbed()
    inputs[name] = inputs[name][..., :-1]
    if name == "state_values":  # its last axis is free
        inputs[name] = inputs[name][:, :, :-1]
    with pytest.raises(ValueError, match="must"):
        torch.ops.recattn.lrea_absorbed_attention(*inputs.values(), 0.01, None, None, None)

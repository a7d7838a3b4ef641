"""The CUDA kernels of lrea_absorbed_attention: on tensor cores, and by multiply-adds where those do not fit.

Without a GPU they are emulated. test_compile.py checks that they compile and spill no register.
"""

import functools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import recattn
from recattn import reference
from recattn.testing import assert_matches_reference
from tests.helpers.emulated_cuda import DEVICE, ROOT
from tests.helpers.lrea_inputs import DTYPES, by_item_id, draw_absorbed

pytestmark = [pytest.mark.usefixtures("cuda_kernels"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]

# Tiles of 128 candidates and products of 16: empty users, parts of a tile, whole ones, and more than one.
COUNTS = (1, 0, 2, 100, 63, 129, 0, 16, 300)
attend = functools.partial(recattn.lrea_absorbed_attention, impl="cuda")


def draw(counts=COUNTS, **options) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in draw_absorbed(counts, **options).items()}


def quantized(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    keys, key_scales = recattn.lrea_quantize(inputs["state_keys"])
    values, value_scales = recattn.lrea_quantize(inputs["state_values"])
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    return {**inputs, "state_keys": keys, "state_values": values, **scales}


def spread(tensor: Tensor) -> Tensor:
    """The same values with a strided last axis."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def assert_right(inputs: dict[str, Tensor]) -> None:
    assert_matches_reference(attend, reference.lrea_absorbed_attention, inputs)
    assert attend(**inputs).equal(attend(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rank, dim, value_dim",
    [
        # For multiply-adds: of odd sizes, or too large for shared memory.
        (1, 1, 1),
        (63, 129, 200),
        (100, 64, 64),
        (32, 320, 64),
        # For tensor cores: around a product's 16 rank rows, and 32, 64 and more columns.
        (4, 8, 8),
        (16, 16, 48),
        (20, 80, 32),
        (32, 64, 64),
        (36, 96, 104),
        (64, 128, 256),
        (64, 256, 128),
    ],
)
def test_matches_reference(rank, dim, value_dim, dtype):
    assert_right(draw(rank=rank, dim=dim, value_dim=value_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank, dim, value_dim", [(4, 16, 16), (20, 80, 32), (32, 64, 64), (64, 256, 256), (7, 20, 12)])
def test_int8_states(rank, dim, value_dim, dtype):
    inputs = draw(rank=rank, dim=dim, value_dim=value_dim, dtype=dtype)
    inputs["state_keys"][2] = 0  # whose scales are zero
    inputs["state_values"][3, :, 1:] = 0
    assert_right(quantized(inputs))


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank, dim, value_dim", [(1, 3, 5), (20, 80, 32), (100, 64, 64)])
def test_float32_targets_of_half_precision_states(rank, dim, value_dim, state_dtype):
    inputs = draw(rank=rank, dim=dim, value_dim=value_dim)
    inputs |= {name: inputs[name].to(state_dtype) for name in ("state_keys", "state_values")}
    assert_right(inputs)
    exact = {name: inputs[name].float() for name in ("state_keys", "state_values")}
    assert attend(**inputs).equal(attend(**{**inputs, **exact}))


def test_int8_states_of_small_values_do_not_vanish_in_float16():
    inputs = draw(rank=32, dim=64, value_dim=64)
    rows = quantized({**inputs, "state_values": inputs["state_values"] * 1e-4})
    rows["targets"] = rows["targets"].half()
    assert_right(rows)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_by_item_id(dtype, int8):
    inputs = by_item_id(draw(rank=32, dim=64, value_dim=64, dtype=dtype), "targets")
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    inputs = quantized(inputs) if int8 else inputs
    gathered = {**inputs, "targets": inputs["targets"][inputs["item_ids"]]}
    del gathered["item_ids"]
    expected = attend(**gathered)
    assert attend(**inputs).equal(expected)
    narrow = {name: inputs[name].int() for name in ("item_ids", "slots", "target_offsets")}
    assert attend(**{**inputs, **narrow}).equal(expected)
    assert attend(**{**inputs, "item_ids": spread(inputs["item_ids"])}).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_target_for_every_head(dtype):
    inputs = draw(heads=3, rank=16, dim=32, value_dim=32, dtype=dtype)
    inputs["targets"] = inputs["targets"][:, :1].expand(-1, 3, -1)
    expected = attend(**{**inputs, "targets": inputs["targets"].contiguous()})
    assert attend(**inputs).equal(expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype, int8):
    """Rows that allow 16-byte reads take the path of contiguous ones. Others are right too."""
    inputs = draw(rank=16, dim=32, value_dim=32, dtype=dtype)
    inputs = quantized(inputs) if int8 else inputs
    tables = [name for name, x in inputs.items() if x.dim() > 1]
    wide = {name: torch.cat([inputs[name]] * 2, dim=-1).transpose(0, 1).contiguous().transpose(0, 1) for name in tables}
    halves = {name: x[..., : x.shape[-1] // 2] for name, x in wide.items()}
    assert attend(**{**inputs, **halves}).equal(attend(**inputs))
    assert_right({**inputs, **{name: spread(inputs[name]) for name in tables}})
    shifted = {name: torch.cat([inputs[name][..., :1], inputs[name]], dim=-1)[..., 1:] for name in tables}
    assert_right({**inputs, **shifted})


@pytest.mark.parametrize("users", [31, 32, 33, 1025, 33000])
def test_many_users(users):
    """The search for a block's user takes more than one round, and more than two."""
    counts = torch.randint(3, (users,))
    counts[users // 2] = 200
    inputs = draw(counts.tolist(), heads=1, rank=4, dim=8, value_dim=8, dtype=torch.bfloat16)
    owners = torch.arange(users).repeat_interleave(counts).to(DEVICE)
    keys, values = (inputs[name][inputs["slots"][owners]].double() for name in ("state_keys", "state_values"))
    scores = torch.einsum("thd,thrd->thr", inputs["targets"].double(), keys)
    expected = torch.einsum("thr,thre->the", torch.nn.functional.leaky_relu(scores, 0.01), values)
    # Both kernels call one search.
    for dtype in (torch.bfloat16, torch.float32)[users > 1025 :]:
        cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        assert (attend(**cast) - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_graph_reads_what_its_tensors_hold_when_it_is_replayed(dtype):
    inputs = draw(rank=32, dim=64, value_dim=64, dtype=dtype)
    attend(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(**inputs)
    inputs["targets"].normal_()
    inputs["slots"].copy_(inputs["slots"].flip(0))
    graph.replay()
    assert out.equal(attend(**inputs))


def attend_outside(name: str, index: int, value: int, dtype: torch.dtype) -> None:
    inputs = by_item_id(draw_absorbed((30, 20, 17), rank=8, dim=16, value_dim=16, dtype=dtype), "targets")
    inputs[name][index] = value
    attend(**{name: x.to(DEVICE) for name, x in inputs.items()})
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    "name, index, value, dtype",
    [
        ("slots", 1, 7, torch.bfloat16),
        ("item_ids", 5, 11, torch.bfloat16),
        ("item_ids", 5, -1, torch.float32),
        ("target_offsets", 1, 60, torch.float32),
        ("target_offsets", 3, 66, torch.bfloat16),
    ],
)
def test_what_lies_outside_a_table_stops_the_kernel(name, index, value, dtype):
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="trap in block"):
            attend_outside(name, index, value, dtype)
        return
    # The process can do no more on the device.
    code = f"from {__name__} import *\ntry: attend_outside({name!r}, {index}, {value}, {dtype})\n"
    code += "except RuntimeError as error: print(error)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "CUDA error" in result.stdout, result.stderr


@pytest.mark.gpu
def test_refuses_another_device():
    inputs = draw(heads=1)
    with pytest.raises(ValueError, match="slots must be on targets' device"):
        attend(**{**inputs, "slots": inputs["slots"].cpu()})


def test_refuses():
    inputs = draw(heads=1)
    with pytest.raises(ValueError, match="rank and widths must be at most 65535, got r = 8, d = 16, dv = 65536"):
        attend(**{**inputs, "state_values": inputs["state_values"][..., :1].expand(-1, -1, -1, 65536)})
    with pytest.raises(ValueError, match="targets must be float32 or bfloat16 or float16, got float64"):
        attend(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})


def test_more_heads_than_a_grid_is_high():
    inputs = draw((1,), heads=1, rank=2, dim=8, value_dim=8)
    wide = {name: x.expand(-1, 65537, *x.shape[2:]) if x.dim() > 1 else x for name, x in inputs.items()}
    assert (attend(**wide) == attend(**inputs)).all()


def test_no_candidates():
    inputs = draw((0, 0), dtype=torch.bfloat16)
    assert attend(**inputs).shape == (0, 2, 12)

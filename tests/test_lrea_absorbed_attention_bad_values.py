"""A bad scale spoils its own targets of lrea_absorbed_attention and nothing else, in every implementation."""

import pytest
import torch
from torch import Tensor

import recattn
from recattn._extension import MISSING
from test_lrea_attention import DTYPES, compiled_kernels, draw_absorbed

ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", ""))]
IMPLS = ["reference", pytest.param("cpu", marks=compiled_kernels), pytest.param("cuda", marks=ON_CUDA)]
every_impl = pytest.mark.parametrize("impl", IMPLS)
COUNTS = (3, 0, 40, 1, 63)
USER = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))  # of each target
# For tensor cores and for multiply-adds.
SIZES = [(16, 16, 48), (7, 20, 12)]


def draw(rank=16, dim=16, value_dim=48, **options) -> dict[str, Tensor]:
    return draw_absorbed(COUNTS, rank=rank, dim=dim, value_dim=value_dim, **options)


def quantized(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    keys, key_scales = recattn.lrea_quantize(inputs["state_keys"])
    values, value_scales = recattn.lrea_quantize(inputs["state_values"])
    return {
        **inputs,
        "state_keys": keys,
        "state_values": values,
        "key_scales": key_scales,
        "value_scales": value_scales,
    }


def attend(impl: str, inputs: dict[str, Tensor], **options) -> Tensor:
    if impl == "cuda":
        inputs = {name: x.cuda() for name, x in inputs.items()}
    return recattn.lrea_absorbed_attention(**inputs, **options, impl=impl).cpu()


# --- Scales of int8 states ---


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["key_scales", "value_scales"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("among", ["alone", "finite", "zeros"])
def test_a_scale_that_is_not_finite_is_never_served_as_a_number(impl, dtype, sizes, name, bad, among):
    inputs = draw(*sizes, dtype=dtype)
    inputs["slots"] = torch.tensor([4, 0, 2, 6, 1])
    inputs = quantized(inputs)
    good = attend(impl, inputs)
    scales = inputs[name][2]  # of the third user
    if among == "alone":
        scales.fill_(bad)
    else:
        scales.mul_(among == "finite")[..., 3] = bad
    out = attend(impl, inputs)
    spoilt = USER == 2
    assert not out[spoilt].isfinite().any()
    assert bad == bad or out[spoilt].isnan().all()
    assert out[~spoilt].equal(good[~spoilt])

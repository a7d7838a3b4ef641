"""LREA's Triton kernels against the reference, by Triton's interpreter where there is no GPU."""

import functools
import itertools
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recattn
from recattn import reference
from recattn._options import LreaCompressOptions
from recattn.functional import validation
from recattn.ops import lrea_attention as ops
from recattn.ops.lrea_attention import triton as by_triton
from recattn.testing import assert_matches_reference
from tests.helpers.interpreted import DEVICE, DTYPES, with_dtypes
from tests.helpers.lrea_inputs import (
    RESTORED_GRADS,
    assert_compiles,
    by_item_id,
    draw_compress,
    draw_restored,
    pack,
    strided,
)
from tests.helpers.memory import LargestTensor
from tests.helpers.strategies import ragged_lengths, seeds

pytest.importorskip("triton")

from recattn.triton_kernels.common import launch
from recattn.triton_kernels.lrea import attention as attention_kernels
from recattn.triton_kernels.lrea import compress as compress_kernels
from tests.compile_table.compilation import recorded

COMPRESS_GRADS = ["behaviors", "w_comp"]
attend = functools.partial(recattn.lrea_attention, impl="triton")
compress = functools.partial(recattn.lrea_compress, impl="triton")


@pytest.fixture
def splits(monkeypatch):
    """Cut every loop in three, however short it is."""
    for module in (attention_kernels, compress_kernels):
        monkeypatch.setattr(module, "num_splits", lambda programs, steps: 3)
    monkeypatch.setattr(attention_kernels, "FEWEST_SPLIT_STEPS", 0)
    monkeypatch.setattr(attention_kernels, "FEWEST_SPLIT_TARGETS", 0)


@pytest.fixture
def sorts(monkeypatch):
    """Sort users by length, however few they are."""
    monkeypatch.setattr(attention_kernels, "LARGE_PRODUCT", 0)
    monkeypatch.setattr(attention_kernels, "PRODUCTS_PER_PAIR", 0)


def here(inputs: dict) -> dict:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def check_restored(inputs, **options):
    kernel, low = (functools.partial(f, **options) for f in (attend, reference.lrea_attention))
    assert_matches_reference(kernel, low, here(inputs), grads=RESTORED_GRADS)


def check_compress(inputs, grads=COMPRESS_GRADS):
    assert_matches_reference(compress, reference.lrea_compress, here(inputs), grads=grads)


# --- The restored form ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 63, 100, 129])
def test_restored(length, dtype):
    lengths = [length, 0, length // 2, 1, length]
    check_restored(draw_restored(counts=(3, 5, 0, 100, 1), heads=1, length=length, seq_lens=lengths, dtype=dtype))


@pytest.mark.parametrize("counts, dtype", with_dtypes([(63,), (100, 1), (129, 7, 0, 20)]), ids=str)
def test_restored_full_histories(counts, dtype):
    inputs = draw_restored(counts=counts, heads=1, rank=33, dim=5, value_dim=3, length=192, dtype=dtype)
    check_restored(inputs, negative_slope=0.3, scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restored_one_target_a_user(dtype):
    lengths = torch.randint(0, 101, (20,)).tolist()
    check_restored(draw_restored(counts=(1,) * 20, heads=1, seq_lens=lengths, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank, dim, value_dim", [(1, 1, 1), (4, 100, 65), (129, 17, 2)])
def test_restored_of_any_width(rank, dim, value_dim, dtype):
    sizes = {"rank": rank, "dim": dim, "value_dim": value_dim, "dtype": dtype}
    check_restored(draw_restored(counts=(9, 30), heads=1, length=63, seq_lens=[63, 40], **sizes))


@pytest.mark.parametrize("lengths, dtype", with_dtypes([None, [200, 0, 70, 131]]), ids=str)
def test_restored_in_shares(lengths, dtype, splits):
    check_restored(draw_restored(counts=(3, 30, 50, 1), heads=1, length=200, seq_lens=lengths, dtype=dtype))


@pytest.mark.parametrize("counts, dtype", with_dtypes([(3, 5, 0, 40, 1, 17), (1,) * 40]), ids=str)
def test_restored_sorted(counts, dtype, sorts):
    lengths = torch.randint(0, 101, (len(counts),)).tolist()
    check_restored(draw_restored(counts=counts, seq_lens=lengths, dtype=dtype))


def test_restored_sorted_in_shares(sorts, splits):
    check_restored(draw_restored(counts=(3, 30, 50, 1), heads=1, length=200, seq_lens=[200, 0, 70, 131]))


@pytest.mark.parametrize("length, dtype", with_dtypes([99, 104]), ids=str)
def test_restored_of_aligned_and_padded_rows(length, dtype, sorts):
    check_restored(draw_restored(counts=(30, 5), heads=1, length=length, dtype=dtype))


@settings(max_examples=5)
@given(counts=ragged_lengths(40), lengths=st.data(), rank=st.integers(1, 9), seed=seeds)
def test_restored_ragged(counts, lengths, rank, seed):
    torch.manual_seed(seed)
    drawn = lengths.draw(st.lists(st.integers(0, 100), min_size=len(counts), max_size=len(counts)))
    inputs = draw_restored(counts, heads=1, rank=rank, dim=7, value_dim=5, seq_lens=drawn)
    inputs["target_offsets"], inputs["seq_lens"] = inputs["target_offsets"].int(), inputs["seq_lens"].int()
    check_restored(inputs)


@pytest.mark.parametrize("negative_slope", [-0.5, 0.0, 1.0, 2.0])
def test_any_slope(negative_slope):
    check_restored(draw_restored(counts=(5, 9)), negative_slope=negative_slope)


def test_restored_non_contiguous():
    inputs = draw_restored(seq_lens=[100, 0, 7, 64])
    inputs |= {name: strided(inputs[name]) for name in RESTORED_GRADS}
    inputs["target_offsets"] = inputs["target_offsets"].repeat_interleave(2)[::2]
    inputs["seq_lens"] = inputs["seq_lens"].repeat_interleave(2)[::2]
    check_restored(inputs)


def test_users_never_mix():
    """Non-finite values stay with their user, also within a block of targets."""
    inputs = here(draw_restored(counts=(3, 2, 4), length=20))
    expected = attend(**inputs)
    inputs["keys"][1] = inputs["values"][1] = torch.nan
    out = attend(**inputs)
    assert out[:3].equal(expected[:3]) and out[5:].equal(expected[5:])
    assert not out[3:5].isfinite().any()


@pytest.fixture
def a_minute():
    """A call that takes longer fails."""

    def stop(*_):
        raise TimeoutError("more than a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Where a whole tile is of no user, in 3 and in 7 parts of 16 columns, a negative number of steps overflowed to 2^30.
WIDE = {"counts": (40, 1), "heads": 1, "rank": 40}


@pytest.mark.usefixtures("a_minute")
@pytest.mark.parametrize(
    "inputs",
    [
        {"counts": ()},
        {"counts": (0, 0)},
        {"counts": (3, 1), "length": 0},
        {**WIDE, "dim": 40, "length": 0},
        {**WIDE, "dim": 100, "seq_lens": (0, 0)},
    ],
)
def test_restored_of_nothing(inputs):
    inputs = here(draw_restored(**inputs))
    leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
    out = attend(**inputs)
    assert out.shape == (*inputs["targets"].shape[:2], 12) and not out.any()
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(x.shape == leaf.shape and not x.any() for x, leaf in zip(gradients, leaves, strict=True))


def test_restored_holds_no_score_for_every_target_and_behavior(monkeypatch):
    # The kernels themselves: a dispatch mode does not see inside an operator.
    for name in ("attention_fwd", "attention_bwd"):
        monkeypatch.setattr(by_triton, f"lrea_{name}", getattr(by_triton, name))
    targets, length = 384, 256
    counts, sizes = (200, targets - 200), {"heads": 1, "rank": 4, "dim": 4, "value_dim": 4, "length": length}
    inputs = here(draw_restored(counts, **sizes, seq_lens=[length, 9]))
    leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
    with LargestTensor() as largest:
        torch.autograd.grad(attend(**inputs).sum(), leaves)
    assert largest.elements <= targets * length // 4


# --- Compression ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 63, 100, 129])
def test_compress(length, dtype):
    lengths = [length, 0, length // 2, 1]
    check_compress(draw_compress(users=4, length=length, longest=150, dtype=dtype, seq_lens=lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, rank", [(1, 1), (65, 33), (130, 129)])
def test_compress_of_any_width(dim, rank, dtype):
    check_compress(draw_compress(users=2, length=70, dim=dim, rank=rank, dtype=dtype))


@pytest.mark.parametrize("lengths, dtype", with_dtypes([None, [200, 70, 0, 131]]), ids=str)
def test_compress_in_shares(lengths, dtype, splits):
    check_compress(draw_compress(users=4, length=200, seq_lens=lengths, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths, max_seqlen", [([129, 0, 63, 1], None), ([100, 64, 17], 100)])
def test_compress_packed(lengths, max_seqlen, dtype):
    inputs = pack(draw_compress(len(lengths), 129, longest=150, seq_lens=lengths, dtype=dtype))
    kernel = functools.partial(compress, max_seqlen=max_seqlen)
    assert_matches_reference(kernel, reference.lrea_compress, here(inputs), grads=COMPRESS_GRADS)


def test_compress_packed_in_shares(splits):
    padded = draw_compress(3, 200, seq_lens=[200, 0, 131])
    check_compress(pack(padded | {"behaviors": strided(padded["behaviors"])}))
    check_compress(pack(by_item_id(padded, "behaviors")), grads=[])


def test_compress_packed_reads_nothing_out_of_bounds():
    """On a GPU nobody checks the offsets: lengths stay below max_seqlen and Lmax, and rows below T."""
    inputs = here(pack(draw_compress(2, 70, longest=65, seq_lens=[70, 40])))
    behaviors, w_comp = (x.requires_grad_() for x in (inputs["behaviors"], inputs["w_comp"]))
    offsets = torch.tensor([-3, 70, 300], device=DEVICE)
    for max_seqlen, rows in ((None, (65, 40)), (50, (50, 40))):
        options = LreaCompressOptions(max_seqlen, "triton")
        out = ops.LreaCompressFunction.apply(behaviors, w_comp, None, offsets, options)
        read = zip((0, 70), rows, strict=True)
        expected = torch.stack([w_comp[:n].T @ behaviors[first : first + n] for first, n in read])
        gradients = [torch.autograd.grad(x.sum(), w_comp)[0] for x in (out, expected)]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_compress_items(index_dtype, dtype):
    inputs = here(draw_compress(users=4, length=100, dtype=dtype, seq_lens=[100, 0, 50, 1]))
    table = torch.randn(30, 17, dtype=dtype, device=DEVICE)
    ids = torch.randint(30, (4, 100), dtype=index_dtype, device=DEVICE)
    padding = torch.arange(100, device=DEVICE) >= inputs["seq_lens"][:, None]
    unused = ids.masked_fill(padding, torch.iinfo(index_dtype).max)
    expected = compress(table[ids.long()], inputs["w_comp"], inputs["seq_lens"])
    assert compress(table, inputs["w_comp"], inputs["seq_lens"], item_ids=unused).equal(expected)
    strided_ids = unused.t().contiguous().t()
    assert compress(strided(table), inputs["w_comp"], inputs["seq_lens"], item_ids=strided_ids).equal(expected)
    check_compress(inputs | {"behaviors": table, "item_ids": unused}, grads=[])


def test_compress_non_contiguous():
    inputs = draw_compress(seq_lens=[100, 1, 50])
    inputs |= {name: strided(inputs[name]) for name in COMPRESS_GRADS}
    inputs["seq_lens"] = inputs["seq_lens"].repeat_interleave(2)[::2]
    check_compress(inputs)


def test_compress_ignores_padding():
    inputs = here(draw_compress(seq_lens=[100, 40, 0]))
    inputs["behaviors"][1, 40:] = inputs["behaviors"][2] = torch.nan
    leaves = [inputs[name].requires_grad_() for name in COMPRESS_GRADS]
    out = compress(**inputs)
    assert out.isfinite().all() and not out[2].any()
    dbehaviors, dw_comp = torch.autograd.grad(out.sum(), leaves)
    assert dw_comp.isfinite().all()
    assert not dbehaviors[1, 40:].any() and not dbehaviors[2].any()


@pytest.mark.parametrize("sizes", [{"users": 0}, {"length": 0, "longest": 3}, {"seq_lens": [0, 0, 0]}, {"dim": 0}])
def test_compress_of_nothing(sizes):
    inputs = here(draw_compress(**sizes))
    leaves = [inputs[name].requires_grad_() for name in COMPRESS_GRADS]
    out = compress(**inputs)
    assert out.shape == (len(leaves[0]), 8, leaves[0].shape[2]) and not out.any()
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(x.shape == leaf.shape and not x.any() for x, leaf in zip(gradients, leaves, strict=True))


# --- Indices that no check has seen, as on a GPU ---


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(validation, "values_are_checked", lambda device: False)


def guarded(inputs: dict, names: list[str]) -> dict:
    """The same tensor between NaN on either side: reads outside it show."""
    inputs = here(inputs)
    for name in names:
        around = inputs[name].new_full((5, *inputs[name].shape), torch.nan)
        inputs[name] = around[2].copy_(inputs[name])
    return inputs


def restored_in_range(targets, keys, values, w_decomp, target_offsets, seq_lens, **options):
    """The reference with offsets and lengths clamped into range; zeros for targets that then have no user."""
    offsets = target_offsets.clamp(0, len(targets))
    begin, end = offsets[0], offsets[-1]
    seq_lens = None if seq_lens is None else seq_lens.clamp(0, w_decomp.shape[1])
    tensors = (targets[begin:end], keys, values, w_decomp, offsets - begin)
    out = reference.lrea_attention(*tensors, seq_lens=seq_lens, **options)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, begin, len(targets) - end))


def with_lengths(offsets: list, lengths: list) -> list[tuple]:
    """Offsets of users in order and sorted, each with the next of `lengths`."""
    pairs = itertools.product(enumerate(offsets), (False, True))
    return [(each, is_sorted, lengths[(i + is_sorted) % len(lengths)]) for (i, each), is_sorted in pairs]


SHIFTED = [[3, 9, 9, 40, 67], [0, 9, 9, 40, 51], [20, 21, 30, 40, 41], [-90, -3, 9, 90, 100], [67] * 5, [90] * 5]
LENGTHS = [None, [100, 0, 7, 64], [101, -3, 1 << 30, 64]]


@pytest.mark.parametrize("offsets, is_sorted, lengths", with_lengths(SHIFTED, LENGTHS), ids=str)
def test_targets_of_no_user_are_zeros(offsets, is_sorted, lengths, unchecked, request):
    if is_sorted:
        request.getfixturevalue("sorts")
    inputs = guarded(draw_restored(heads=1, seq_lens=lengths), RESTORED_GRADS)
    inputs["target_offsets"] = torch.tensor(offsets, device=DEVICE)
    assert_matches_reference(attend, restored_in_range, inputs, grads=RESTORED_GRADS)


UNORDERED = [[0, 50, 20, 40, 67], [67, 40, 20, 9, 0], [1 << 40, 3, 1 << 62, -(1 << 62), -1], [5, -9, 99, -9, 99]]


@pytest.mark.parametrize("offsets, is_sorted, lengths", with_lengths(UNORDERED, LENGTHS[:2]), ids=str)
def test_offsets_out_of_order_read_nothing_outside(offsets, is_sorted, lengths, unchecked, request):
    if is_sorted:
        request.getfixturevalue("sorts")
    inputs = guarded(draw_restored(heads=1, seq_lens=lengths), RESTORED_GRADS)
    inputs["target_offsets"] = torch.tensor(offsets, device=DEVICE)
    leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
    out = attend(**inputs)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.square().sum(), leaves)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[101, -3, 1 << 30], [-(1 << 30), 100, 5]])
def test_compress_of_lengths_out_of_range(lengths, dtype, unchecked):
    inputs = guarded(draw_compress(seq_lens=lengths, dtype=dtype), COMPRESS_GRADS)

    def in_range(behaviors, w_comp, seq_lens):
        return reference.lrea_compress(behaviors, w_comp, seq_lens.clamp(0, 100))

    assert_matches_reference(compress, in_range, inputs, grads=COMPRESS_GRADS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_item_ids_out_of_range_are_zeros(index_dtype, dtype, unchecked):
    ids = torch.randint(30, (4, 100), dtype=index_dtype)
    ids[0, 3], ids[1], ids[2, 5:9], ids[3, 0] = -1, 30, -20, 59
    inputs = {"behaviors": torch.randn(30, 17, dtype=dtype), "w_comp": torch.randn(100, 8, dtype=dtype)}
    inputs = guarded(inputs, COMPRESS_GRADS) | {"item_ids": ids.to(DEVICE)}

    def with_zeros(behaviors, w_comp, item_ids):
        known = (item_ids >= 0) & (item_ids < 30)
        zeros = behaviors.new_zeros(1, 17)
        return reference.lrea_compress(torch.cat([behaviors, zeros]), w_comp, item_ids=item_ids.where(known, 30))

    assert_matches_reference(compress, with_zeros, inputs)
    expected = compress(**inputs)
    for far in (torch.iinfo(index_dtype).max, torch.iinfo(index_dtype).min):
        inputs["item_ids"][0, 3] = far
        assert compress(**inputs).equal(expected)


# --- The operators and their launches ---


@pytest.mark.parametrize("forced", [False, True])
def test_reruns_agree_to_the_bit(forced, request):
    if forced:
        request.getfixturevalue("splits")
    restored = here(draw_restored(counts=(70, 1, 33), heads=1, seq_lens=[100, 3, 64]))
    compressed = here(draw_compress(users=3, seq_lens=[100, 1, 50]))

    def run():
        results = []
        for function, inputs, grads in (
            (attend, restored, RESTORED_GRADS),
            (compress, compressed, COMPRESS_GRADS),
        ):
            leaves = [inputs[name].requires_grad_() for name in grads]
            out = function(**inputs)
            results += [out, *torch.autograd.grad(out.square().sum(), leaves)]
        return results

    assert all(first.equal(second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("lengths", [None, [20, 0, 7, 13]])
def test_opcheck(lengths):
    inputs = here(draw_restored((3, 0, 1, 9), length=20, seq_lens=lengths, dtype=torch.float16))
    tensors = (*(strided(inputs[name]) for name in RESTORED_GRADS), inputs["target_offsets"], inputs["seq_lens"])
    out, *saved = by_triton.lrea_attention_fwd(*tensors, 0.01, 0.25)
    torch.library.opcheck(torch.ops.recattn.lrea_attention_bwd.default, (strided(out), *tensors, *saved, 0.01, 0.25))
    torch.library.opcheck(torch.ops.recattn.lrea_attention_fwd.default, (*tensors, 0.01, 0.25))


@pytest.mark.parametrize("lengths", [None, [20, 0, 7]])
def test_opcheck_compress(lengths):
    inputs = here(draw_compress(length=20, seq_lens=lengths, longest=30))
    behaviors, w_comp, seq_lens = inputs.values()
    ids = torch.randint(3, (3, 20), device=DEVICE)
    dcompressed = torch.randn(3, 8, 17, device=DEVICE)
    fwd, bwd_behaviors, bwd_w_comp = (
        getattr(torch.ops.recattn, f"lrea_compress_{name}").default for name in ("fwd", "bwd_behaviors", "bwd_w_comp")
    )
    packed, cu_seqlens = behaviors.flatten(0, 1), torch.tensor([0, 25, 40, 60], device=DEVICE)
    for op, arguments in (
        (fwd, (behaviors, w_comp, seq_lens, None, None, None)),
        (fwd, (behaviors[:, 0], w_comp, seq_lens, None, ids, None)),
        (bwd_behaviors, (dcompressed, w_comp, seq_lens, None, 20, None)),
        (bwd_w_comp, (dcompressed, behaviors, seq_lens, None, 20, None)),
        (bwd_w_comp, (dcompressed, behaviors, seq_lens, None, 30, None)),
        (fwd, (packed, w_comp, None, cu_seqlens, None, 25)),
        (fwd, (packed, w_comp, None, cu_seqlens, ids.flatten(), None)),
        (bwd_behaviors, (dcompressed, w_comp, None, cu_seqlens, 60, None)),
        (bwd_w_comp, (dcompressed, packed, None, cu_seqlens, 30, 25)),
    )[: None if lengths else 5]:
        torch.library.opcheck(op, arguments)


def test_restored_compiles():
    draws = [
        draw_restored((3, 9, 5), length=40, seq_lens=[40, 7, 0]),
        draw_restored((3, 0, 12, 6), length=70, rank=9, seq_lens=[0, 70, 5, 1]),
    ]
    assert_compiles(attend, [here(inputs) for inputs in draws], RESTORED_GRADS)


def test_compress_compiles():
    draws = [draw_compress(users, length, seq_lens=[length // 2] * users) for users, length in ((2, 20), (3, 63))]
    assert_compiles(compress, [here(inputs) for inputs in draws], COMPRESS_GRADS)


def test_launches_compile_alike_for_any_batch():
    """The numbers of users, targets and behaviours are not constants of the kernels."""
    signatures = []

    def gradients(function, inputs, grads):
        leaves = [inputs[name].requires_grad_() for name in grads]
        torch.autograd.grad(function(**inputs).sum(), leaves)

    for counts, length in (((16, 16, 64), 64), ((1, 0, 2, 97), 104)):
        restored = here(draw_restored(counts=counts, length=length, seq_lens=[length] * len(counts)))
        compressed = draw_compress(users=len(counts), length=length, dim=16, rank=16, seq_lens=[length] * len(counts))
        launches = recorded("", 90, gradients, attend, restored, RESTORED_GRADS)
        launches += recorded("", 90, gradients, compress, here(compressed), COMPRESS_GRADS)
        signatures += [made.signature for made in launches]
    first, second = signatures[: len(signatures) // 2], signatures[len(signatures) // 2 :]
    assert first == second


def test_splits_fill_a_gpu_and_depend_on_sizes_alone():
    assert launch.num_splits(programs=1, steps=10_000) == launch.FULL_GRID
    assert launch.num_splits(programs=128, steps=157) == 4
    assert launch.num_splits(programs=10_000, steps=10_000) == 1
    assert launch.num_splits(programs=1, steps=3) == 1
    assert launch.num_splits(programs=0, steps=0) == 1


def test_unsupported_reasons():
    for op in ("lrea_attention", "lrea_compress"):
        assert next(iter(ops.unsupported_reasons("cuda", op))) == "triton"
        assert list(ops.unsupported_reasons("cpu", op))[-1] == "triton"  # never chosen unasked
        reasons = functools.partial(ops.unsupported_reasons, DEVICE, op)
        assert reasons()["triton"] is None and reasons(torch.float32, 256)["triton"] is None
        assert "compute in float32" in reasons(torch.float64)["triton"]
        assert reasons(torch.float32, 300)["triton"] == "its kernels hold ranks up to 256, and r is 300"
    assert by_triton.unsupported_reason(DEVICE, torch.float16, 64) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU a check would wait for it")
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("target_offsets", [0, 3, 2, 4, 67], "target_offsets must be ascending"),
        ("target_offsets", [0, 3, 3, 4, 60], "target_offsets must be offsets from 0 to 67"),
        ("seq_lens", [100, 101, 0, 1], "seq_lens must be between 0 and 100, got 101"),
    ],
)
def test_restored_refuses_indices(name, value, message):
    inputs = draw_restored(seq_lens=[100, 0, 7, 64]) | {name: torch.tensor(value)}
    with pytest.raises(ValueError, match=message):
        attend(**inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU a check would wait for it")
def test_compress_refuses_indices():
    inputs = draw_compress(seq_lens=[100, 101, 0])
    with pytest.raises(ValueError, match="seq_lens must be between 0 and 100, got 101"):
        compress(**inputs)
    with pytest.raises(ValueError, match="item_ids must be rows of a table of 100, got 100"):
        compress(inputs["behaviors"][0], inputs["w_comp"], item_ids=torch.full((2, 5), 100))

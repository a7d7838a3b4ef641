"""LREA: every implementation against the reference, edges, compilation, and which implementation runs."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recattn
from recattn import reference
from recattn._extension import MISSING
from recattn.ops import lrea_attention as ops
from recattn.testing import assert_matches_reference
from tests.helpers.instruction_sets import CAPABILITIES, results_at
from tests.helpers.interpreted import assert_matches_reference_twice_of_three
from tests.helpers.lrea_inputs import (
    DTYPES,
    RESTORED_GRADS,
    assert_close_float64,
    assert_compiles,
    by_item_id,
    compiled_kernels,
    draw_absorbed,
    draw_compress,
    draw_restored,
    pack,
    strided,
)
from tests.helpers.memory import LargestTensor
from tests.helpers.strategies import ragged_lengths, seeds

absorbed_cpu = functools.partial(recattn.lrea_absorbed_attention, impl="cpu")
compress_cpu = functools.partial(recattn.lrea_compress, impl="cpu")


# --- Every implementation against the reference ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 100, 129, 700])
def test_restored(length, dtype):
    lengths = [length, 0, length // 2, 1, length]
    inputs = draw_restored(counts=(3, 5, 0, 129, 1), length=length, seq_lens=lengths, dtype=dtype)
    assert_matches_reference(recattn.lrea_attention, reference.lrea_attention, inputs, grads=RESTORED_GRADS)


@pytest.mark.parametrize("counts", [(63,), (100, 1), (9, 9, 9), (300, 7, 0, 40)])
def test_restored_full_histories(counts):
    inputs = draw_restored(counts=counts, rank=33, dim=5, value_dim=3, length=192)
    kernel, expected = (
        functools.partial(module.lrea_attention, negative_slope=0.3, scale=0.5) for module in (recattn, reference)
    )
    assert_matches_reference(kernel, expected, inputs, grads=RESTORED_GRADS)


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 100, 129])
def test_compress(length, dtype):
    inputs = draw_compress(users=4, length=length, longest=150, dtype=dtype, seq_lens=[length, 0, length // 2, 1])
    assert_matches_reference(
        compress_cpu,
        reference.lrea_compress,
        inputs,
        grads=["behaviors", "w_comp"],
    )


@compiled_kernels
@pytest.mark.parametrize("packed", [False, True])
def test_compress_of_many_users(packed):
    """More users than groups of dW, of which some are empty."""
    inputs = draw_compress(users=40, length=30, seq_lens=[30, 3, 0, 29, 0, 1, 30, 0] * 5)
    inputs = pack(inputs) if packed else inputs
    assert_matches_reference(recattn.lrea_compress, reference.lrea_compress, inputs, grads=["behaviors", "w_comp"])


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[129, 0, 63, 1], [100, 64, 200]])
def test_compress_packed_and_nested_is_that_of_padded(lengths, dtype):
    padded = draw_compress(len(lengths), 200, longest=210, seq_lens=lengths, dtype=dtype)
    packed = pack(padded)
    w_comp, offsets = padded["w_comp"].requires_grad_(), packed["cu_seqlens"]
    dout = torch.randn(len(lengths), 8, 17, dtype=dtype)

    def run(behaviors, gradients_of, **options):
        out = recattn.lrea_compress(behaviors, w_comp, **options)
        return out, *torch.autograd.grad(out, (gradients_of, w_comp), dout)

    leaf = packed["behaviors"].requires_grad_()
    values = leaf.detach().requires_grad_()
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    behaviors = padded["behaviors"].requires_grad_()
    expected, dbehaviors, dw_comp = run(behaviors, behaviors, seq_lens=padded["seq_lens"])
    dbehaviors = pack({"behaviors": dbehaviors, "seq_lens": padded["seq_lens"]})["behaviors"]
    for results in (
        run(leaf, leaf, cu_seqlens=offsets),
        run(leaf, leaf, cu_seqlens=offsets.int(), max_seqlen=200),
        run(nested, values),
    ):
        assert all(map(torch.equal, results, (expected, dbehaviors, dw_comp)))
    assert_matches_reference(compress_cpu, reference.lrea_compress, pack(padded), grads=["behaviors", "w_comp"])


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
def test_compress_packed_item_ids(impl):
    padded = by_item_id(draw_compress(seq_lens=[100, 0, 63]), "behaviors")
    packed = pack(padded)
    expected = recattn.lrea_compress(**padded, impl="reference")
    nested = torch.nested.nested_tensor_from_jagged(packed["item_ids"], packed["cu_seqlens"])
    given = recattn.lrea_compress(**packed, impl=impl)
    torch.testing.assert_close(given, expected)
    assert given.equal(recattn.lrea_compress(packed["behaviors"], packed["w_comp"], item_ids=nested, impl=impl))


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
def test_compress_ignores_padding(impl):
    inputs = draw_compress(seq_lens=[100, 40, 0])
    inputs["behaviors"][1, 40:] = inputs["behaviors"][2] = float("nan")
    leaves = [inputs["behaviors"].requires_grad_(), inputs["w_comp"].requires_grad_()]
    out = recattn.lrea_compress(**inputs, impl=impl)
    assert out.isfinite().all() and (out[2] == 0).all()
    dbehaviors, dw_comp = torch.autograd.grad(out.sum(), leaves)
    assert dw_comp.isfinite().all()
    assert (dbehaviors[1, 40:] == 0).all() and (dbehaviors[2] == 0).all()


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank, dim, value_dim", [(1, 1, 1), (32, 64, 64), (63, 129, 100), (8, 16, 33)])
def test_absorbed(rank, dim, value_dim, dtype):
    counts = (1, 0, 2, 100, 63, 129, 0)
    inputs = draw_absorbed(counts, rank=rank, dim=dim, value_dim=value_dim, dtype=dtype)
    assert_matches_reference(absorbed_cpu, reference.lrea_absorbed_attention, inputs)


@compiled_kernels
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank, dim, value_dim", [(1, 1, 1), (32, 64, 64), (8, 16, 33)])
def test_absorbed_float32_targets_of_half_precision_states(rank, dim, value_dim, state_dtype):
    inputs = draw_absorbed((1, 0, 2, 100, 63), rank=rank, dim=dim, value_dim=value_dim)
    inputs |= {name: inputs[name].to(state_dtype) for name in ("state_keys", "state_values")}
    assert_matches_reference(absorbed_cpu, reference.lrea_absorbed_attention, inputs)
    exact = {name: inputs[name].float() for name in ("state_keys", "state_values")}
    assert absorbed_cpu(**inputs).equal(absorbed_cpu(**{**inputs, **exact}))
    with pytest.raises(ValueError, match="state_keys must have the dtype of targets, float64, got"):
        absorbed_cpu(**{**inputs, "targets": inputs["targets"].double()})


@compiled_kernels
@pytest.mark.parametrize("operator", ["absorbed", "compress"])
def test_float64(operator):
    if operator == "absorbed":
        inputs = draw_absorbed(counts=(7, 0, 50), rank=9, dim=13, value_dim=11, dtype=torch.float64)
        actual, expected = recattn.lrea_absorbed_attention(**inputs), reference.lrea_absorbed_attention(**inputs)
    else:
        inputs = draw_compress(dtype=torch.float64, seq_lens=[100, 0, 63])
        actual, expected = recattn.lrea_compress(**inputs), reference.lrea_compress(**inputs)
    assert_close_float64(actual, expected)


@compiled_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous(dtype):
    inputs = draw_absorbed(dtype=dtype)
    views = {name: strided(x) for name, x in inputs.items() if x.is_floating_point()}
    wide_slots = inputs["slots"].repeat_interleave(2)[::2]
    expected = recattn.lrea_absorbed_attention(**inputs)
    assert recattn.lrea_absorbed_attention(**{**inputs, **views, "slots": wide_slots}).equal(expected)
    rows = {name: strided(x.mT.contiguous()).mT for name, x in views.items()}
    assert recattn.lrea_absorbed_attention(**{**inputs, **rows}).equal(expected)

    inputs = draw_compress(dtype=dtype, seq_lens=[100, 1, 50])
    views = {name: strided(inputs[name]) for name in ("behaviors", "w_comp")}
    assert recattn.lrea_compress(**{**inputs, **views}).equal(recattn.lrea_compress(**inputs))


def test_restored_non_contiguous():
    inputs = draw_restored(seq_lens=[100, 0, 7, 64])
    inputs |= {name: strided(inputs[name]) for name in RESTORED_GRADS}
    assert_matches_reference(recattn.lrea_attention, reference.lrea_attention, inputs, grads=RESTORED_GRADS)


@compiled_kernels
@given(
    counts=ragged_lengths(70, 8), heads=st.integers(1, 3), rank=st.integers(1, 40), dim=st.integers(1, 40), seed=seeds
)
def test_absorbed_ragged(counts, heads, rank, dim, seed):
    torch.manual_seed(seed)
    inputs = draw_absorbed(counts, heads=heads, rank=rank, dim=dim, value_dim=dim + 1)
    inputs["slots"], inputs["target_offsets"] = inputs["slots"].int(), inputs["target_offsets"].int()
    assert_matches_reference(absorbed_cpu, reference.lrea_absorbed_attention, inputs)


@given(
    counts=ragged_lengths(40),
    lengths=st.data(),
    rank=st.integers(1, 9),
    length=st.sampled_from((1, 63, 513)),
    seed=seeds,
)
def test_restored_ragged(counts, lengths, rank, length, seed):
    torch.manual_seed(seed)
    drawn = lengths.draw(st.lists(st.integers(0, length), min_size=len(counts), max_size=len(counts)))
    inputs = draw_restored(counts, rank=rank, dim=7, value_dim=5, length=length, seq_lens=drawn)
    inputs["target_offsets"], inputs["seq_lens"] = inputs["target_offsets"].int(), inputs["seq_lens"].int()
    # With one column and one rank an entry of dw_decomp is a single sum: its error is luck.
    assert_matches_reference_twice_of_three(
        recattn.lrea_attention, reference.lrea_attention, inputs, grads=RESTORED_GRADS
    )


# --- Edges ---


@pytest.mark.parametrize("impl", [None, "reference"])
def test_empty(impl):
    for counts in ((), (0, 0)):
        inputs = draw_restored(counts)
        leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
        out = recattn.lrea_attention(**inputs, impl=impl)
        assert out.shape == (0, 2, 12)
        gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        assert all(gradient is None or (gradient == 0).all() for gradient in gradients)
        with torch.no_grad():
            assert recattn.lrea_absorbed_attention(**draw_absorbed(counts), impl=impl).shape == (0, 2, 12)
    for inputs in (draw_compress(users=0), draw_compress(length=0, longest=3), draw_compress(seq_lens=[0, 0, 0])):
        out = recattn.lrea_compress(**inputs, impl=impl)
        assert out.shape == (len(inputs["behaviors"]), 8, 17) and (out == 0).all()
    no_users = draw_restored(())
    keys, values, w = (no_users[name] for name in RESTORED_GRADS[1:])
    for state, shape in zip(recattn.lrea_absorb(keys, values, w), (keys.shape, values.shape), strict=True):
        assert state.shape == shape
    recattn.lrea_absorb(keys, values, w, seq_lens=torch.zeros(0, dtype=torch.int64))


def test_users_without_history_or_targets():
    inputs = draw_restored(counts=(3, 0, 2), seq_lens=[0, 100, 100])
    leaves = {name: inputs[name].requires_grad_() for name in RESTORED_GRADS}
    out = recattn.lrea_attention(**inputs)
    assert (out[:3] == 0).all() and (out[3:] != 0).all()
    gradients = dict(zip(leaves, torch.autograd.grad(out.sum(), [*leaves.values()]), strict=True))
    assert (gradients["targets"][:3] == 0).all()
    assert (gradients["keys"][:2] == 0).all() and (gradients["values"][:2] == 0).all()


@compiled_kernels
def test_threads_share_one_user_and_agree():
    inputs = draw_absorbed(counts=(1000,), rank=32, dim=64, value_dim=64)
    compressed = draw_compress(users=64, length=129, seq_lens=list(range(64, 128)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = recattn.lrea_absorbed_attention(**inputs), recattn.lrea_compress(**compressed)
        torch.set_num_threads(4)
        together = recattn.lrea_absorbed_attention(**inputs), recattn.lrea_compress(**compressed)
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


@compiled_kernels
@pytest.mark.parametrize("lengths", [None, range(61, 101)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_threads_change_no_gradient(dtype, lengths):
    """So large that the threads share the work."""
    seq_lens = None if lengths is None else list(lengths)
    # The last user has more targets than a block of rows holds.
    restored = draw_restored((*range(39), 150), rank=17, dim=33, value_dim=30, seq_lens=seq_lens, dtype=dtype)
    histories = draw_compress(users=40, seq_lens=seq_lens, dtype=dtype)
    long_histories = draw_compress(users=2, length=1000, seq_lens=lengths and [1000, 70], dtype=dtype)
    calls = [(recattn.lrea_attention, restored), *((recattn.lrea_compress, x) for x in (histories, long_histories))]

    def run():
        results = []
        for function, inputs in calls:
            leaves = [x.requires_grad_() for x in inputs.values() if x is not None and x.is_floating_point()]
            out = function(**inputs, impl="cpu")
            results += [out, *torch.autograd.grad(out.square().sum(), leaves)]
        return results

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        together = run()
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))


def test_reruns_are_bitwise_equal():
    def run():
        torch.manual_seed(1)
        inputs = draw_restored(counts=(300, 1, 77), seq_lens=[100, 3, 64])
        leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
        out = recattn.lrea_attention(**inputs)
        compressed = draw_compress(seq_lens=[100, 1, 50])
        w_comp = compressed["w_comp"].requires_grad_()
        state = recattn.lrea_compress(**compressed)
        with torch.no_grad():
            absorbed = recattn.lrea_absorbed_attention(**draw_absorbed())
        return (
            out,
            absorbed,
            state,
            *torch.autograd.grad(out.square().sum(), leaves),
            *torch.autograd.grad(state.sum(), w_comp),
        )

    assert all(first.equal(second) for first, second in zip(run(), run(), strict=True))


def run_each(cases):
    results = []
    for name, inputs, grads, dout in cases:
        leaves = {grad: inputs[grad].detach().requires_grad_() for grad in grads}
        out = getattr(recattn, name)(**inputs | leaves, impl="cpu")
        results.append((out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)))
    return results


@compiled_kernels
@pytest.mark.parametrize("capability", CAPABILITIES[:3])
def test_every_instruction_set(capability, tmp_path):
    cases = []
    for dtype in DTYPES:
        restored = draw_restored((1, 5, 100), rank=19, length=150, seq_lens=[150, 1, 63], dtype=dtype)
        cases.append(("lrea_attention", restored, RESTORED_GRADS, torch.randn(106, 2, 12, dtype=dtype)))
        histories = draw_compress(users=3, length=200, seq_lens=[200, 0, 65], dtype=dtype)
        rank, dim = histories["w_comp"].shape[1], histories["behaviors"].shape[2]
        cases.append(("lrea_compress", histories, ["behaviors", "w_comp"], torch.randn(3, rank, dim, dtype=dtype)))
    outputs = results_at(capability, run_each, cases, tmp_path)
    for (function, inputs, grads, dout), results in zip(cases, outputs, strict=True):

        def with_gradients(function=function, grads=grads, dout=dout, **inputs):
            leaves = [inputs[name].detach().requires_grad_() for name in grads]
            expected = getattr(reference, function)(**{**inputs, **dict(zip(grads, leaves, strict=True))})
            return expected.detach(), *torch.autograd.grad(expected, leaves, dout.to(expected.dtype))

        assert_matches_reference(lambda results=results, **_: results, with_gradients, inputs)


@pytest.mark.parametrize("lengths", [None, [2000, 1000]])
def test_restored_never_holds_a_score_for_every_target_and_behavior(lengths):
    inputs = draw_restored(counts=(500, 500), heads=1, rank=4, dim=4, value_dim=4, length=2000, seq_lens=lengths)
    leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
    with LargestTensor() as largest:
        torch.autograd.grad(recattn.lrea_attention(**inputs).sum(), leaves)
    assert largest.elements <= max(x.numel() for x in leaves)


# --- Operators and compilation ---


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [100, 0, 7, 64]])
def test_opcheck_restored(lengths, dtype):
    inputs = draw_restored(seq_lens=lengths, dtype=dtype)
    tensors = [inputs[name] for name in (*RESTORED_GRADS, "target_offsets", "seq_lens")]
    forward, backward = torch.ops.recattn.lrea_restored_fwd.default, torch.ops.recattn.lrea_restored_bwd.default
    torch.library.opcheck(forward, [*tensors, 0.01, 0.25])
    views = [strided(x) if x is not None and x.is_floating_point() else x for x in tensors]
    torch.library.opcheck(forward, [*views, 0.01, 0.25])
    out, *saved = forward(*tensors, 0.01, 0.25)
    torch.library.opcheck(backward, [strided(out), *views, *saved, 0.01, 0.25])


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_compiled_kernels(dtype):
    absorbed = draw_absorbed(dtype=dtype)
    op = torch.ops.recattn.lrea_absorbed_attention.default
    torch.library.opcheck(op, [*absorbed.values(), 0.01, None, None, None])
    views = [strided(x) if x.is_floating_point() else x for x in absorbed.values()]
    torch.library.opcheck(op, [*views, 0.01, None, None, None])
    for seq_lens in (None, [100, 0, 7]):
        inputs = draw_compress(seq_lens=seq_lens, dtype=dtype)
        arguments = [*inputs.values(), None]
        torch.library.opcheck(torch.ops.recattn.lrea_compress.default, [*arguments, None])
        gradient = torch.randn(3, 8, 17, dtype=dtype)
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(torch.ops.recattn.lrea_compress_bwd.default, [gradient, *arguments, *wanted])
    inputs = pack(inputs)
    arguments = [inputs["behaviors"], inputs["w_comp"], None, inputs["cu_seqlens"]]
    torch.library.opcheck(torch.ops.recattn.lrea_compress.default, [*arguments, None])
    torch.library.opcheck(torch.ops.recattn.lrea_compress_bwd.default, [gradient, *arguments, True, True])


def test_restored_compiles():
    draws = [
        draw_restored((3, 9, 5), length=40, seq_lens=[40, 7, 0]),
        draw_restored((3, 0, 30, 6), length=70, rank=9, seq_lens=[0, 70, 5, 1]),
        draw_restored((100, 2, 5, 6), length=600, dim=8, seq_lens=[600, 513, 512, 1]),
    ]
    assert_compiles(recattn.lrea_attention, draws, RESTORED_GRADS)


def test_restored_compiles_with_one_tensor_for_keys_and_values():
    inputs = draw_restored((3, 9, 5), length=40)
    del inputs["values"]
    grads = [name for name in RESTORED_GRADS if name != "values"]
    assert_compiles(lambda keys, **rest: recattn.lrea_attention(keys=keys, values=keys, **rest), [inputs], grads)


@compiled_kernels
def test_compress_compiles():
    draws = [
        draw_compress(users, length, seq_lens=[length // 2] * users) for users, length in ((2, 20), (3, 63), (5, 30))
    ]
    assert_compiles(recattn.lrea_compress, draws, ["behaviors", "w_comp"])
    assert_compiles(recattn.lrea_compress, map(pack, draws), ["behaviors", "w_comp"])


def test_compress_compiles_with_nested_histories():
    draws = [pack(draw_compress(seq_lens=lengths)) for lengths in ([3, 0, 100], [50, 20, 7])]
    compiled = torch.compile(recattn.lrea_compress, fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in draws:
        w_comp = inputs["w_comp"].requires_grad_()
        nested = torch.nested.nested_tensor_from_jagged(inputs["behaviors"], inputs["cu_seqlens"])
        out, expected = compiled(nested, w_comp), recattn.lrea_compress(**inputs)
        gradients = (torch.autograd.grad(x.square().sum(), w_comp)[0] for x in (out, expected))
        assert out.equal(expected) and torch.equal(*gradients)


@compiled_kernels
def test_absorbed_compiles():
    draws = [draw_absorbed((3, 9, 5)), draw_absorbed((30, 4), rank=9, table=9), draw_absorbed((1, 2, 3, 4), dim=8)]
    assert_compiles(recattn.lrea_absorbed_attention, draws, [])


# --- Which implementation runs ---


@compiled_kernels
def test_absorbed_has_no_compiled_gradient():
    inputs = draw_absorbed()
    inputs["state_keys"].requires_grad_()
    assert recattn.lrea_absorbed_attention(**inputs).requires_grad
    with pytest.raises(NotImplementedError, match="cannot run impl='cpu' here: it has no gradient"):
        recattn.lrea_absorbed_attention(**inputs, impl="cpu")
    with torch.no_grad():
        recattn.lrea_absorbed_attention(**inputs, impl="cpu")


def test_explicit_implementations_say_why_not(monkeypatch):
    with pytest.raises(NotImplementedError, match="cannot run impl='cuda' here: the tensors are on cpu"):
        recattn.lrea_absorbed_attention(**draw_absorbed(), impl="cuda")
    with pytest.raises(NotImplementedError, match="lrea_absorbed_attention has no impl='triton'"):
        recattn.lrea_absorbed_attention(**draw_absorbed(), impl="triton")
    monkeypatch.setitem(MISSING, "cpu", "installed without them")
    for function, inputs in (
        (recattn.lrea_absorbed_attention, draw_absorbed()),
        (recattn.lrea_attention, draw_restored()),
        (recattn.lrea_compress, draw_compress()),
    ):
        with pytest.raises(NotImplementedError, match="installed without them"):
            function(**inputs, impl="cpu")
        assert function(**inputs).equal(getattr(reference, function.__name__)(**inputs))
    assert ops.unsupported_reasons("cpu")["cpu"] == "installed without them"

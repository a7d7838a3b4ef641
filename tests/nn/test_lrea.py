"""LREA: both forms beside formulas written by hand, the states, and what PyTorch does with modules."""

import copy
import math

import pytest
import torch

from recattn.nn import LREA
from recattn.testing import assert_matches_reference
from tests.helpers.lrea_module import (
    LENGTHS,
    LMAX,
    OFFSETS,
    T_DIM,
    USERS,
    E,
    R,
    by_hand,
    inputs,
    module,
    parts,
    positive,
)
from tests.helpers.modules import assert_twins, copied_both_ways

# --- The restored form ---


@pytest.mark.parametrize("heads", [1, 3])
def test_output_and_every_gradient(heads):
    lrea = module(heads)
    targets, behaviors = inputs()
    leaves = [targets.requires_grad_(), behaviors.requires_grad_(), *lrea.parameters()]
    actual = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    expected = by_hand(lrea, targets, behaviors)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    assert torch.equal(actual[3:5], torch.zeros(2, 5 * heads))  # of a user without behaviours
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-9)


def test_forms_of_the_targets():
    """One target per user, and n targets per user, equal the ragged form with equal counts."""
    lrea = module()
    _, behaviors = inputs()
    state = lrea.export_state(behaviors, LENGTHS)
    for shape in ((USERS, T_DIM), (USERS, 3, T_DIM), (USERS, 0, T_DIM)):
        targets = torch.randn(*shape, dtype=torch.float64)
        n = shape[1] if len(shape) == 3 else 1
        rows, offsets = targets.reshape(USERS * n, T_DIM), n * torch.arange(USERS + 1)
        expected = lrea(rows, behaviors, offsets, seq_lens=LENGTHS)
        actual = lrea(targets, behaviors, seq_lens=LENGTHS)
        assert actual.shape == (*shape[:-1], 10) and torch.equal(actual.reshape(expected.shape), expected)
        served = lrea.attend(targets, state)
        assert served.shape == (*shape[:-1], 10)
        assert torch.equal(served.reshape(expected.shape), lrea.attend(rows, state, target_offsets=offsets))


def test_compressed_in_the_place_of_the_behaviours():
    lrea = module()
    targets, behaviors = inputs()
    compressed = lrea.compress(behaviors, LENGTHS)
    for user in range(USERS):
        torch.testing.assert_close(compressed[user], parts(lrea, behaviors, user)[1], atol=1e-12, rtol=0)
    expected = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    for given in (None, behaviors):
        assert torch.equal(lrea(targets, given, OFFSETS, seq_lens=LENGTHS, compressed=compressed), expected)


def test_packed_and_nested_histories_are_padded_ones():
    lrea = module()
    targets, behaviors = inputs()
    leaves = list(lrea.parameters())
    packed = torch.cat([row[:n] for row, n in zip(behaviors, LENGTHS.tolist(), strict=True)])
    offsets = torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)])
    nested = torch.nested.nested_tensor_from_jagged(packed, offsets)
    compressed = lrea.compress(behaviors, LENGTHS)
    expected = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    gradients = torch.autograd.grad(expected.sum(), leaves)
    state = lrea.export_state(behaviors, LENGTHS)
    (fidelity,) = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    compiled = torch.compile(lrea, fullgraph=True, backend="aot_eager")
    for given, options in ((packed, {"cu_seqlens": offsets, "max_seqlen": LMAX}), (nested, {})):
        assert torch.equal(lrea.compress(given, **options), compressed)
        out = lrea(targets, given, OFFSETS, **options)
        assert torch.equal(out, expected) and torch.equal(compiled(targets, given, OFFSETS, **options), expected)
        assert all(map(torch.equal, torch.autograd.grad(out.sum(), leaves), gradients))
        again = lrea(targets, given, OFFSETS, compressed=compressed, **options)
        assert torch.equal(again, expected)
        for ours, other in zip(lrea.export_state(given, **options)[:6], state, strict=True):
            assert ours is other is None or torch.equal(ours, other)
        assert lrea.fidelity(targets, given, OFFSETS, **options)[0] == pytest.approx(fidelity, nan_ok=True)
    table, item_ids = torch.randn(7, E, dtype=torch.float64), torch.randint(7, (len(packed),))
    state = lrea.export_state(table[item_ids], cu_seqlens=offsets)
    items = torch.nested.nested_tensor_from_jagged(item_ids, offsets)
    assert lrea.export_state(table, item_ids=items).values.equal(state.values)
    with pytest.raises(ValueError, match="seq_lens must be None beside"):
        lrea(targets, packed, OFFSETS, seq_lens=LENGTHS, cu_seqlens=offsets)


def test_a_history_without_lengths_is_as_long_as_its_tensor():
    lrea = module()
    targets, _ = inputs()
    behaviors = torch.randn(USERS, 9, E, dtype=torch.float64)
    nine = torch.full((USERS,), 9)
    expected = lrea(targets, behaviors, OFFSETS, seq_lens=nine)
    torch.testing.assert_close(lrea(targets, behaviors, OFFSETS), expected)
    for ours, other in zip(lrea.export_state(behaviors), lrea.export_state(behaviors, nine), strict=True):
        assert ours is other is None or torch.equal(ours, other)


def test_loss():
    lrea = module(dtype=torch.float32)
    compressed = torch.randn(USERS, R, E, dtype=torch.bfloat16)
    of_w, of_users = (x[x < 0].double().square().sum() for x in (lrea.w_decomp, compressed))
    for reduction, expected in (("mean", of_w + of_users / USERS), ("sum", of_w + of_users)):
        torch.testing.assert_close(lrea.loss(compressed, reduction).double(), expected, rtol=1e-5, atol=0)
    with pytest.warns(FutureWarning, match="now the mean over users"):
        assert lrea.loss(compressed).equal(lrea.loss(compressed, reduction="mean"))
    lrea.loss(compressed, "mean").backward()
    assert torch.equal(lrea.w_decomp.grad != 0, lrea.w_decomp < 0)


# --- The absorbed form ---


def test_attend_builds_no_graph():
    lrea = module(dtype=torch.float32, impl="cpu")  # whose kernel has no gradient
    state = lrea.export_state(torch.randn(USERS, 9, E))
    assert not lrea.attend(torch.randn(USERS, T_DIM, requires_grad=True), state).requires_grad


@pytest.mark.parametrize("orientation", ["scores", "weights"])
@pytest.mark.parametrize("heads", [1, 3])
def test_absorbed_form_by_hand(heads, orientation):
    lrea = module(heads, orientation=orientation, negative_slope=0.2)
    targets, behaviors = inputs()
    state = lrea.export_state(behaviors, LENGTHS)
    actual = lrea.attend(targets, state, target_offsets=OFFSETS)
    torch.testing.assert_close(actual, by_hand(lrea, targets, behaviors, absorbed=True), atol=1e-10, rtol=0)
    assert (actual - lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)).abs().max() > 0.1


@pytest.mark.parametrize("orientation", ["scores", "weights"])
def test_with_slope_1_the_forms_are_equal(orientation):
    lrea = module(orientation=orientation, negative_slope=1.0)
    targets, behaviors = inputs()
    restored = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    absorbed = lrea.attend(targets, lrea.export_state(behaviors, LENGTHS), target_offsets=OFFSETS)
    torch.testing.assert_close(absorbed, restored, atol=1e-11, rtol=0)


def test_scores_of_one_sign_and_no_negative_decompression_are_exact():
    """Where the loss of W_decomp is 0 and every product under φ is positive; "weights" then is exact too."""
    for orientation in ("scores", "weights"):
        lrea = positive(orientation=orientation)
        with torch.no_grad():
            lrea.w_q.abs_()
            lrea.w_k.abs_()
        targets, behaviors = (x.abs() for x in inputs())
        restored = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
        absorbed = lrea.attend(targets, lrea.export_state(behaviors, LENGTHS), target_offsets=OFFSETS)
        torch.testing.assert_close(absorbed, restored)


def test_slots_and_shapes_of_a_state():
    lrea = module()
    targets, behaviors = inputs()
    state = lrea.export_state(behaviors, LENGTHS)
    assert state.keys.shape == (USERS, 2, R, T_DIM) and state.values.shape == (USERS, 2, R, 5)
    assert state.key_scales is None and state.value_scales is None
    assert torch.equal(state.lengths, LENGTHS) and not state.keys.requires_grad
    slots = torch.tensor([3, 0, 2, 3])
    counts = OFFSETS.diff()
    expected = lrea.attend(targets, type(state)(*(x if x is None else x[slots] for x in state)), None, OFFSETS)
    assert torch.equal(lrea.attend(targets, state, slots, OFFSETS), expected)
    own = lrea.attend(targets, state, None, OFFSETS)
    kept = (slots == torch.arange(USERS)).repeat_interleave(counts)
    assert torch.equal((own == expected).all(1), kept)


def test_behaviours_by_item_id():
    table = torch.randn(30, E)
    item_ids = torch.randint(30, (USERS, LMAX))
    lrea = module(dtype=torch.float32)
    behaviors = table[item_ids]
    item_ids[torch.arange(LMAX) >= LENGTHS[:, None]] = -7
    gathered, dense = (
        lrea.export_state(table, LENGTHS, item_ids=item_ids),
        lrea.export_state(behaviors, LENGTHS),
    )
    for ours, other in zip(gathered, dense, strict=True):
        assert ours is other is None or torch.allclose(ours, other, atol=1e-5)
    whole = lrea.export_state(table, item_ids=item_ids.clamp(min=0))
    assert whole.lengths.tolist() == [LMAX] * USERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_states_of_few_bits(dtype):
    """An entry of a state is off by at most half a step: of its own exponent, or of its row's scale."""
    lrea = positive(dtype=torch.float32)
    targets, behaviors = inputs(torch.float32)
    exact, rounded = (lrea.export_state(behaviors, LENGTHS, dtype=d) for d in (None, dtype))
    assert rounded.keys.dtype == rounded.values.dtype == dtype
    assert rounded.compressed.dtype == torch.float32 and torch.equal(rounded.compressed, exact.compressed)
    for name in ("key", "value"):
        scales = getattr(rounded, f"{name}_scales")
        held, full = getattr(rounded, f"{name}s").float(), getattr(exact, f"{name}s")
        if dtype == torch.int8:
            held, step = held * scales[..., None], scales[..., None]
        else:
            step = torch.finfo(dtype).eps * full.abs() + torch.finfo(dtype).smallest_normal
        assert ((held - full).abs() <= 0.501 * step).all() and not torch.equal(held, full)
    served = lrea.attend(targets, rounded, target_offsets=OFFSETS)
    assert served.dtype == torch.float32
    error = (served - lrea.attend(targets, exact, target_offsets=OFFSETS)).norm()
    assert 0 < error < 0.03 * served.norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("orientation", ["scores", "weights"])
def test_append_is_the_state_of_the_longer_history(orientation, dtype):
    lrea = module(orientation=orientation, negative_slope=0.3, dtype=torch.float32)
    behaviors = torch.randn(3, LMAX, E)
    lengths = torch.tensor([0, 4, 15])
    appended = lrea.export_state(behaviors, lengths, dtype=dtype)
    for _ in range(5):
        newest = behaviors[torch.arange(3), lengths]
        appended, lengths = lrea.append(appended, newest), lengths + 1
    exported = lrea.export_state(behaviors, lengths, dtype=dtype)
    torch.testing.assert_close(appended.compressed, exported.compressed, atol=2e-6, rtol=0)
    assert torch.equal(appended.lengths, exported.lengths)
    targets = torch.randn(3, 6, T_DIM)
    for one, other in zip(appended[:4], exported[:4], strict=True):
        assert one is other is None or one.dtype == other.dtype
    served, expected = (lrea.attend(targets, state) for state in (appended, exported))
    # Rounding may fall on the other side of a step for a few entries of a state.
    bound = {None: 1e-5, torch.bfloat16: 5e-3, torch.int8: 1e-2}[dtype]
    assert (served - expected).norm() < bound * expected.norm()


def test_a_full_history_takes_no_more():
    lrea = module()
    state = lrea.export_state(torch.randn(3, LMAX, E, dtype=torch.float64), torch.tensor([3, LMAX, LMAX]))
    with pytest.raises(ValueError, match=r"lengths must be below max_len, 20, got 20 of user 1: a full history"):
        lrea.append(state, torch.randn(3, E))
    with pytest.raises(ValueError, match=r"state.lengths must be between 0 and 20, got -1 at index \[1\]"):
        lrea.append(state._replace(lengths=torch.tensor([3, -1, 4])), torch.randn(3, E))


# --- What PyTorch does with modules ---


def test_initial_outputs_have_the_size_of_a_behaviour():
    for length, rank in ((50, 4), (50, 32), (5000, 4), (5000, 32)):
        lrea = LREA(32, length, rank)
        out = lrea(torch.randn(8, 30, 32), torch.randn(8, length, 32))
        assert 0.1 < out.std() < 1.5
        assert lrea.w_comp.min() >= 0 and lrea.w_decomp.min() >= 0
        gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(lrea.parameters()))
        assert all(gradient.norm() > 1e-2 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    lrea = module(dtype=dtype)
    targets, behaviors = inputs(dtype)
    behaviors = behaviors.nan_to_num()

    def call(impl):
        def forward(targets, behaviors, **parameters):
            own = copy.copy(lrea)
            own.impl = impl
            return torch.func.functional_call(own, parameters, (targets, behaviors, OFFSETS), {"seq_lens": LENGTHS})

        return forward

    tensors = {"targets": targets, "behaviors": behaviors}
    tensors |= {name: p.detach() for name, p in lrea.named_parameters()}
    assert_matches_reference(call(None), call("reference"), tensors)


def test_autocast():
    lrea = module(dtype=torch.float32)
    targets, behaviors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        compressed = lrea.compress(behaviors, LENGTHS)
        out = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS, compressed=compressed)
        loss = out.float().sum() + lrea.loss(compressed, "mean")
        state = lrea.export_state(behaviors, LENGTHS)
    assert out.dtype == compressed.dtype == torch.bfloat16
    exact = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    assert (out.float() - exact).norm() < 0.05 * exact.norm()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lrea.parameters())
    assert all(torch.equal(a, b) for a, b in zip(state[:2], lrea.export_state(behaviors, LENGTHS)[:2], strict=True))


def test_compile_is_one_graph_for_all_sizes():
    """aot_eager traces forward and backward as inductor does, and generates no code."""
    lrea = module(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lrea, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for users, n, length in ((4, 3, 11), (5, 2, 7), (3, 8, LMAX)):
            targets = torch.randn(users, n, T_DIM, requires_grad=True)
            behaviors = torch.randn(users, length, E, requires_grad=True)
            lengths = torch.arange(users) + 2
            leaves = [targets, behaviors, *lrea.parameters()]
            results = []
            for call in (lrea, compiled):
                out = call(targets, behaviors, seq_lens=lengths)
                results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager, atol=1e-4, rtol=1e-4)


@copied_both_ways
def test_copies(copied):
    lrea = module()
    targets, behaviors = inputs()
    assert_twins(copied(lrea), lrea, lambda x: x(targets, behaviors, OFFSETS, seq_lens=LENGTHS))


def test_state_dict_round_trip():
    lrea, other = module(), module()
    assert [*lrea.state_dict()] == ["w_comp", "w_decomp", "w_q", "w_k", "w_v"]
    other.load_state_dict(lrea.state_dict())
    targets, behaviors = inputs()
    assert torch.equal(*(x(targets, behaviors, OFFSETS, seq_lens=LENGTHS) for x in (lrea, other)))
    states = [x.export_state(behaviors, LENGTHS) for x in (lrea, other)]
    assert torch.equal(
        *(x.attend(targets, s, target_offsets=OFFSETS) for x, s in zip((lrea, other), states, strict=True))
    )


def test_repr_and_defaults():
    lrea = LREA(12, 5, 3, 4)
    assert (lrea.target_dim, lrea.head_dim, lrea.orientation, lrea.negative_slope) == (12, 3, "scores", 0.01)
    assert "max_len=5, rank=3, num_heads=4" in repr(lrea)


# --- What is refused ---


def test_wrong_options():
    for options, message in (
        ({"rank": 0}, "rank must be between 1 and max_len, 20, got 0"),
        ({"rank": 21}, "rank must be between 1 and max_len, 20, got 21"),
        ({"num_heads": 5}, "embed_dim must be a multiple of 5 heads where head_dim is not given, got 12"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"target_dim": 0}, "target_dim must be at least 1, got 0"),
        ({"max_len": 0}, "max_len must be at least 1, got 0"),
        ({"orientation": "score"}, "orientation must be 'scores' or 'weights', got 'score'"),
        ({"negative_slope": math.inf}, "negative_slope must be finite, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            LREA(**{"embed_dim": E, "max_len": LMAX, "rank": R} | options)


def test_wrong_arguments():
    lrea = module()
    targets, behaviors = inputs()
    state = lrea.export_state(behaviors, LENGTHS)
    for call, message in (
        (lambda: lrea(targets, None, OFFSETS), "behaviors must be given where compressed is not"),
        (lambda: lrea(targets, behaviors[..., 1:], OFFSETS), r"behaviors must be \[U, L, embed_dim\] = \[4, 20, 12\]"),
        (lambda: lrea(targets, behaviors), r"targets must be \[U, target_dim\] = \[4, 10\], got \[10, 10\]"),
        (lambda: lrea(targets[None], behaviors), r"targets must be \[U, n, target_dim\] = \[4, 10, 10\], got \[1, 10"),
        (lambda: lrea(targets.float(), behaviors, OFFSETS), "targets must have the dtype of the parameters, float64"),
        (lambda: lrea(targets, behaviors.float(), OFFSETS), "w_comp must have the dtype of behaviors, float32"),
        (lambda: lrea(targets, behaviors, OFFSETS + 1), "target_offsets must be offsets from 0 to 10"),
        (lambda: lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS + 1), "seq_lens must be between 0 and 20, got 21"),
        (lambda: lrea.compress(torch.randn(2, 21, E)), "Lmax of w_comp must be at least L = 21, got 20"),
        (lambda: lrea.export_state(behaviors, dtype=torch.int16), "dtype must be .* got torch.int16"),
        (lambda: lrea.attend(targets, state), r"targets must be \[U, target_dim\] = \[4, 10\]"),
        (lambda: lrea.attend(targets, state, torch.tensor([0, 1, 2, 4]), OFFSETS), "slots must be .* got 4"),
        (
            lambda: lrea.append(state, torch.randn(3, E)),
            r"behavior must be \[U, embed_dim\] = \[4, 12\], got \[3, 12\]",
        ),
        (lambda: lrea.append(state._replace(compressed=None), targets), "state.compressed must be a torch.Tensor, got"),
        (lambda: lrea.truncated(5), "rank must be between 1 and 4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    refused = {
        "rare": (torch.tensor([20, 0, 0, 0]), "rare must be .*, below 20 for user 0, got 20"),
        "probes": (torch.randn(3, T_DIM), r"probes must be \[U, target_dim\] = \[4, 10\], got \[3, 10\]"),
        "score": (lambda h, t: h, r"score\(outputs, targets\) must be \[T\] = \[10\], got \[10, 10\]"),
        "ranks": ([0], "rank must be between 1 and 4, got 0"),
    }
    for name, (given, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS, **{name: given})

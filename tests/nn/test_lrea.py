"""LREA: both forms beside formulas written by hand, the states, and the figures of the fidelity report."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity

from recattn.nn import LREA
from recattn.testing import assert_matches_reference

E, T_DIM, LMAX, R = 12, 10, 20, 4
LENGTHS = torch.tensor([20, 0, 7, 1])
COUNTS = [3, 2, 0, 5]
OFFSETS = torch.tensor([0, 3, 5, 5, 10])
USERS, TARGETS = len(COUNTS), sum(COUNTS)


def module(heads=2, **options):
    """With compression and decompression of either sign."""
    options = {"target_dim": T_DIM, "head_dim": 5, "dtype": torch.float64} | options
    lrea = LREA(E, LMAX, R, heads, **options)
    with torch.no_grad():
        lrea.w_comp.normal_(std=0.5)
        lrea.w_decomp.normal_(std=0.5)
    return lrea


def positive(**options):
    lrea = module(**options)
    with torch.no_grad():
        lrea.w_comp.abs_()
        lrea.w_decomp.abs_()
    return lrea


def inputs(dtype=torch.float64, target_dim=T_DIM, length=LMAX):
    """Targets and behaviours; NaN at padding."""
    behaviors = torch.randn(USERS, length, E, dtype=dtype)
    behaviors[torch.arange(length) >= LENGTHS[:, None]] = torch.nan
    return torch.randn(TARGETS, target_dim, dtype=dtype), behaviors


def leaky(x, slope):
    return x.clamp(min=0) + slope * x.clamp(max=0)


def parts(lrea, behaviors, user):
    """W [r, L], C [r, E] of one user; and the columns of each head of a matrix."""
    n = int(LENGTHS[user])
    return lrea.w_decomp[:, :n], lrea.w_comp[:n].T @ behaviors[user, :n]


def by_hand(lrea, targets, behaviors, absorbed=False):
    """User by user and head by head."""
    width, slope, rows = lrea.head_dim, lrea.negative_slope, []
    for user, (start, stop) in enumerate(pairwise(OFFSETS)):
        w, c = parts(lrea, behaviors, user)
        heads = []
        for h in range(lrea.num_heads):
            columns = slice(h * width, (h + 1) * width)
            q = targets[start:stop] @ lrea.w_q[:, columns] / math.sqrt(width)
            k, v = c @ lrea.w_k[:, columns], c @ lrea.w_v[:, columns]
            if not absorbed:
                heads.append(leaky(q @ (w.T @ k).T, slope) @ (w.T @ v))
            elif lrea.orientation == "scores":
                heads.append(leaky(q @ k.T, slope) @ (w @ w.T @ v))
            else:
                heads.append(q @ k.T @ (leaky(w, slope) @ w.T @ v))
        rows.append(torch.cat(heads, dim=1))
    return torch.cat(rows)


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
    """One a user and n a user are the ragged form of equal counts."""
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
    negative = [x[x < 0].double().square().sum() for x in (lrea.w_decomp, compressed)]
    torch.testing.assert_close(lrea.loss(compressed).double(), sum(negative), rtol=1e-5, atol=0)
    lrea.loss(compressed).backward()
    assert torch.equal(lrea.w_decomp.grad != 0, lrea.w_decomp < 0)


# --- The absorbed form ---


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
    """An entry of a state is off by half a step: of its own binade, or of its row's scale."""
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


# --- The fidelity report ---


def spearman(x, y):
    """Of values that differ: 1 − 6 Σ d² / (n (n² − 1))."""
    d = x.argsort().argsort() - y.argsort().argsort()
    n = len(x)
    return 1 - 6 * d.square().sum().item() / (n * (n * n - 1))


def test_figures_of_the_forms():
    lrea = module()
    targets, behaviors = inputs()
    (report,) = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    restored, absorbed = (by_hand(lrea, targets, behaviors, absorbed) for absorbed in (False, True))
    assert (report.rank, report.dtype, report.truncation_error) == (R, torch.float64, 0.0)
    assert report.relative_error == pytest.approx(((absorbed - restored).norm() / restored.norm()).item())
    scores = [(h * (targets @ lrea.w_q)).sum(1) for h in (absorbed, restored)]
    # User 1 has no behaviours: all scores are 0. User 2 has no targets.
    expected = [spearman(*(s[start:stop] for s in scores)) for start, stop in ((0, 3), (5, 10))]
    assert report.rank_correlation == pytest.approx(sum(expected) / 2)
    (other,) = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS, score=lambda h, t: h[:, 0] * t[:, 1])
    scores = [h[:, 0] * targets[:, 1] for h in (absorbed, restored)]
    expected = [spearman(*(s[start:stop] for s in scores)) for start, stop in ((0, 3), (5, 10))]
    assert other.rank_correlation == pytest.approx(sum(expected) / 2)


def test_rank_correlation_of_ties():
    """Restored scores 1 2 2 3, absorbed 1 3 3 1: ranks 1 2.5 2.5 4 and 1.5 3.5 3.5 1.5."""
    lrea = module()
    targets, behaviors = torch.randn(USERS, 4, T_DIM, dtype=torch.float64), inputs()[1]
    given = {"absorbed": [1.0, 3, 3, 1], "restored": [1.0, 2, 2, 3]}
    turn = iter(("absorbed", "restored"))
    constant = torch.ones(2 * 4)  # users 2 and 3: no ranking of the restored scores, so they do not count

    def score(outputs, rows):
        own = torch.tensor(given[next(turn)])
        flat = torch.ones(4) if own[1] == 3 else torch.tensor([4.0, 3, 2, 1])  # user 1: of the absorbed ones alone
        return torch.cat([own, flat, constant])

    (report,) = lrea.fidelity(targets, behaviors, seq_lens=LENGTHS, score=score)
    # Centred ranks −1.5 0 0 1.5 and −1 1 1 −1: uncorrelated; the second user counts 0.
    assert report.rank_correlation == pytest.approx(0.0, abs=1e-12)
    turn = iter(("restored", "restored"))
    (report,) = lrea.fidelity(targets, behaviors, seq_lens=LENGTHS, score=score)
    assert report.rank_correlation == pytest.approx(1.0)


def test_lost_share_of_a_rare_behaviour():
    lrea = LREA(E, LMAX, R, 2, dtype=torch.float64)
    _, behaviors = inputs()
    targets = torch.randn(TARGETS, E, dtype=torch.float64)
    rare = torch.tensor([13, 0, 6, 0])

    def losses(positions, probes=None):
        scores = []
        for user, i in enumerate(positions):
            w, c = parts(lrea, behaviors, user)
            history = behaviors[user, : LENGTHS[user]]
            if len(history):
                probe = history[i] if probes is None else probes[user]
                pair = [x @ lrea.w_k @ (probe @ lrea.w_q) for x in (history, w.T @ c)]
                scores.append([(s[i] / s.norm()).item() for s in pair])
        return 1 - sum(s * r for s, r in scores) / sum(s * s for s, _ in scores)

    options = {"seq_lens": LENGTHS, "rare": rare}
    (report,) = lrea.fidelity(targets, behaviors, OFFSETS, **options)
    assert report.rare_loss == pytest.approx(losses(rare.tolist()))
    probes = torch.randn(USERS, E, dtype=torch.float64)
    (report,) = lrea.fidelity(targets, behaviors, OFFSETS, **options, probes=probes)
    assert report.rare_loss == pytest.approx(losses(rare.tolist(), probes))
    likeness = []
    for user in range(USERS):
        history = behaviors[user, : LENGTHS[user]]
        likeness.append(cosine_similarity(history, history.mean(0, keepdim=True), dim=-1) if LENGTHS[user] else [0])
    (report,) = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    assert report.rare_loss == pytest.approx(losses([min(range(len(x)), key=x.__getitem__) for x in likeness]))
    assert report.common_loss == pytest.approx(losses([max(range(len(x)), key=x.__getitem__) for x in likeness]))


def test_a_rare_behaviour_is_lost_by_too_small_a_rank():
    """Two kinds of behaviours, 19 and 1. Rank 2 restores the common ones as common + rare/2, the rare one as itself."""
    lrea = LREA(E, LMAX, 2, dtype=torch.float64)
    common, rare = torch.eye(E, dtype=torch.float64)[:2]
    behaviors = common.repeat(1, LMAX, 1)
    behaviors[0, 11] = rare
    is_rare = torch.arange(LMAX) == 11
    with torch.no_grad():
        lrea.w_comp.copy_(torch.stack([~is_rare / 19, is_rare.double()], dim=1))
        lrea.w_decomp.copy_(torch.stack([~is_rare, is_rare + 0.5 * ~is_rare]))
        lrea.w_q.copy_(torch.eye(E))
        lrea.w_k.copy_(torch.eye(E))

    def losses(**options):
        (report,) = lrea.fidelity(rare[None], behaviors, **options)
        return report.rare_loss, report.common_loss

    # The probe's scores of 19 common and the rare one: 0 … 1, restored 1/2 … 1; of a common probe 1 … 0 both.
    expected = 1 - 1 / math.sqrt(1 + 19 / 4), 0
    assert losses() == pytest.approx(expected, abs=1e-12)
    lrea.w_comp.data *= 3  # the scale of the map is free
    assert losses() == pytest.approx(expected, abs=1e-12)
    with torch.no_grad():
        lrea.w_decomp.copy_(torch.stack([~is_rare, is_rare]))
        lrea.w_comp[:, 1] /= 6  # the common kind has the greater singular value
    assert losses() == pytest.approx((0, 0), abs=1e-12)
    assert losses(ranks=[1]) == pytest.approx((1, 0), abs=1e-12)


def test_truncated_is_the_nearest_of_its_rank():
    lrea = module()
    product = lrea.w_comp @ lrea.w_decomp
    sigma = torch.linalg.svdvals(product)
    for rank in range(1, R + 1):
        smaller = lrea.truncated(rank)
        assert smaller.rank == rank and smaller.w_comp.shape == (LMAX, rank)
        error = (smaller.w_comp @ smaller.w_decomp - product).norm()
        assert error.item() == pytest.approx(sigma[rank:R].norm().item(), abs=1e-12)
        assert (smaller.w_decomp.sum(1) >= 0).all()
        assert all(torch.equal(getattr(smaller, name), getattr(lrea, name)) for name in ("w_q", "w_k", "w_v"))


def test_ranks_and_dtypes():
    lrea = positive(dtype=torch.float32)
    targets, behaviors = inputs(torch.float32)
    reports = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS, ranks=[1, 2, 3, R], dtype=torch.bfloat16)
    assert [report.rank for report in reports] == [1, 2, 3, R]
    errors = [report.truncation_error for report in reports]
    own = lrea(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    smaller = lrea.truncated(2)(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    assert errors[1] == pytest.approx(((smaller - own).norm() / own.norm()).item(), rel=1e-4) and errors[3] == 0
    assert all(report.dtype == torch.bfloat16 for report in reports)
    linear = positive(negative_slope=1.0, dtype=torch.float32)
    by_dtype = [
        linear.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS, dtype=dtype)[0].relative_error
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    ]
    assert by_dtype[0] < 1e-5 < by_dtype[1] < 0.02 and 1e-5 < by_dtype[2] < 0.02


def test_figures_that_nothing_counts_for_are_nan():
    lrea = module()
    _, behaviors = inputs()
    (report,) = lrea.fidelity(torch.randn(USERS, T_DIM, dtype=torch.float64), behaviors, seq_lens=LENGTHS)
    assert math.isnan(report.rank_correlation)  # one candidate each
    assert math.isnan(report.rare_loss) and math.isnan(report.common_loss)  # target_dim is not embed_dim
    empty = torch.zeros(USERS, 3, T_DIM, dtype=torch.float64)
    (report,) = lrea.fidelity(empty, behaviors, seq_lens=torch.zeros(USERS, dtype=torch.int64))
    assert report.relative_error == 0 and math.isnan(report.rank_correlation)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["w_comp", "w_decomp", "w_q", "w_k", "w_v"])
def test_a_module_that_diverged_has_no_figures(name, value):
    lrea = LREA(E, LMAX, R, 2, dtype=torch.float64)
    with torch.no_grad():
        getattr(lrea, name)[0, 0] = value
    (report,) = lrea.fidelity(*inputs(target_dim=E), OFFSETS, seq_lens=LENGTHS)
    figures = [report.relative_error, report.rank_correlation, report.truncation_error]
    if name != "w_v":  # the losses are of the scores
        figures += [report.rare_loss, report.common_loss]
    assert all(map(math.isnan, figures))
    if name in ("w_comp", "w_decomp"):
        with pytest.raises(ValueError, match="w_comp and w_decomp must be finite to be truncated"):
            lrea.truncated(R - 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("user", [0, 3])
def test_one_user_without_numbers_is_not_averaged_away(user, value):
    lrea = LREA(E, LMAX, R, 2, dtype=torch.float64)
    targets, behaviors = inputs(target_dim=E)
    behaviors[user, 0, 0] = value
    (report,) = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    assert all(math.isnan(figure) for figure in report[2:])


def test_scores_that_overflow_are_no_ties():
    """All restored scores of a user inf: neither a user without a ranking, nor one whose candidates are equal."""
    targets, behaviors = torch.randn(USERS, 4, T_DIM, dtype=torch.float64), inputs()[1]

    def score(outputs, rows):
        return torch.arange(16.0).index_fill(0, torch.arange(4, 8), math.inf)

    (report,) = module().fidelity(targets, behaviors, seq_lens=LENGTHS, score=score)
    assert math.isnan(report.rank_correlation)


def test_scores_that_overflow_lose_everything():
    """One score of inf leaves 0 of the others beside it, were all scaled to length 1: the user would not count."""
    lrea = LREA(E, LMAX, R, dtype=torch.float32)
    targets, behaviors = inputs(torch.float32, target_dim=E)
    behaviors[0, 3, 0] = 3e38
    with torch.no_grad():
        lrea.w_comp[3] = 0  # nothing of it in what is restored
    probes = torch.full((USERS, E), 1e3)
    rare = torch.zeros(USERS, dtype=torch.int64)
    (report,) = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS, rare=rare, probes=probes)
    assert math.isnan(report.rare_loss)


def test_states_that_overflow_have_an_infinite_error():
    lrea = LREA(E, LMAX, R, 2)
    with torch.no_grad():  # of one sign, so that inf meets no −inf
        for weight in (lrea.w_q, lrea.w_k, lrea.w_v):
            weight.abs_()
        lrea.w_v.mul_(1e6)
    targets, behaviors = (x.abs() for x in inputs(torch.float32, target_dim=E))
    (report,) = lrea.fidelity(targets, behaviors, OFFSETS, seq_lens=LENGTHS, dtype=torch.float16)
    assert report.relative_error == math.inf and report.truncation_error == 0 and math.isnan(report.rank_correlation)


@pytest.mark.parametrize("count", range(2, 12))
def test_a_rank_correlation_never_passes_1_by_rounding(count):
    lrea = positive()
    behaviors = torch.rand(USERS, LMAX, E, dtype=torch.float64)
    scores = torch.randn(USERS, count).cumsum(1).flatten()
    for sign in (1, -1):
        given = iter((sign * scores, scores))
        targets = torch.randn(USERS, count, T_DIM, dtype=torch.float64)
        (report,) = lrea.fidelity(targets, behaviors, score=lambda h, t, given=given: next(given))
        assert -1 <= report.rank_correlation <= 1 and report.rank_correlation == pytest.approx(sign)


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
        loss = out.float().sum() + lrea.loss(compressed)
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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    lrea = module()
    targets, behaviors = inputs()
    twin = copied(lrea)
    assert torch.equal(*(x(targets, behaviors, OFFSETS, seq_lens=LENGTHS) for x in (lrea, twin)))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), lrea.parameters(), strict=True))


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

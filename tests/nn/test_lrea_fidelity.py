"""LREA's fidelity report: every figure by hand, and what has none."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from recattn.nn import LREA
from tests.helpers.lrea_module import (
    LENGTHS,
    LMAX,
    OFFSETS,
    T_DIM,
    TARGETS,
    USERS,
    E,
    R,
    by_hand,
    inputs,
    module,
    parts,
    positive,
)

# --- The fidelity report ---


def spearman(x, y):
    """For distinct values: 1 − 6 Σ d² / (n (n² − 1))."""
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


@pytest.mark.parametrize("candidates", [2, 7, 44])
def test_no_rank_correlation_exceeds_one(candidates):
    """With these numbers of candidates, rounding takes the correlation of equal ranks above 1."""
    lrea = module()
    targets, behaviors = torch.randn(USERS, candidates, T_DIM, dtype=torch.float64), inputs()[1]
    (report,) = lrea.fidelity(targets, behaviors, seq_lens=LENGTHS, score=lambda outputs, rows: rows[:, 0])
    assert report.rank_correlation == 1


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
    """All restored scores of a user are inf: the user still has a ranking, and its candidates are not equal."""
    targets, behaviors = torch.randn(USERS, 4, T_DIM, dtype=torch.float64), inputs()[1]

    def score(outputs, rows):
        return torch.arange(16.0).index_fill(0, torch.arange(4, 8), math.inf)

    (report,) = module().fidelity(targets, behaviors, seq_lens=LENGTHS, score=score)
    assert math.isnan(report.rank_correlation)


def test_scores_that_overflow_lose_everything():
    """Scaled to length 1, a score of inf would leave 0 of the others, and the user would not count."""
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

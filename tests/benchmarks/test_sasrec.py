"""SASRec's data, ranking and training, on a few synthetic histories."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks.data import movielens
from benchmarks.quality import sasrec
from benchmarks.quality.sasrec import PLAIN, Split, pad_left, ranking_quality, train
from recattn.nn import RefinedSelfAttention
from tests.helpers.suite_runs import SMALL_SASREC, histories_by_steps

CPU = torch.device("cpu")
HYPER = replace(SMALL_SASREC, epochs=2)


@pytest.fixture(scope="module")
def histories():
    return histories_by_steps()


# --- Data ---


def test_sequences_are_padded_on_the_left_and_keep_the_newest_items():
    sequences = [torch.tensor([5]), torch.arange(1, 7), torch.tensor([])]
    assert pad_left(sequences, 4).tolist() == [[0, 0, 0, 5], [3, 4, 5, 6], [0, 0, 0, 0]]


def test_items_of_one_second_stay_in_the_order_of_the_file(tmp_path, monkeypatch):
    """Sorted by id instead, the newest item, which is the test item, would be the least popular."""
    path = tmp_path / "ml-100k.inter"
    path.write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t9\t5\t20\n1\t4\t1\t20\n1\t7\t3\t10\n"
    )
    monkeypatch.setattr(movielens, "CACHED", path)
    monkeypatch.setattr(movielens, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert [items.tolist() for items in movielens.load(offline=True).items] == [[7, 9, 4]]


def test_the_last_two_items_are_left_out():
    split = Split([torch.tensor([3, 1, 4, 2, 5]), torch.tensor([1, 2])], 4, CPU)
    assert split.items == 5
    assert split.inputs.tolist() == [[0, 0, 3, 1]]  # too short a history has no training
    assert split.targets.tolist() == [[0, 0, 1, 4]]
    (queries, answers), (test_queries, test_answers) = split.validation, split.test
    assert queries.tolist() == [[0, 3, 1, 4]] and answers.tolist() == [2]
    assert test_queries.tolist() == [[3, 1, 4, 2]] and test_answers.tolist() == [5]
    assert split.trained_on.nonzero()[:, 1].tolist() == [1, 3, 4]


def test_negatives_are_uniform_over_what_the_training_lacks():
    split = Split([torch.tensor([3, 1, 4, 2, 6, 5]), torch.tensor([1, 2, 3, 4, 5, 6])], 4, CPU)
    users = torch.tensor([0, 1]).repeat(500)
    negatives = split.draw_negatives(users, torch.Generator().manual_seed(0))
    for user, lacking in ((0, {5, 6}), (1, {5, 6})):
        drawn = negatives[users == user]
        assert set(drawn.unique().tolist()) == lacking
        assert abs((drawn == 5).double().mean().item() - 0.5) < 5 * 0.5 / drawn.numel() ** 0.5


# --- Ranking ---


def test_ranking_by_hand():
    """Ranks 0, 2 and 10; rank 10 is beyond the cutoff of 10."""
    scores = torch.zeros(3, 13)
    answers = torch.tensor([1, 2, 3])
    scores[0, 1] = 9.0
    scores[1, [2, 5, 7, 9]] = torch.tensor([4.0, 5.0, 6.0, 7.0])
    scores[2] = torch.arange(13, 0, -1)
    candidates = torch.ones(3, 13, dtype=torch.bool)
    candidates[:, 0] = False
    candidates[1, 9] = False  # in the history
    scores[2, 3] = 1.5  # below items 1, 2 and 4 to 11
    hr, ndcg = ranking_quality(scores, answers, candidates)
    assert hr == pytest.approx(2 / 3)
    assert ndcg == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert ranking_quality(scores, answers, candidates, cutoff=2)[0] == pytest.approx(1 / 3)
    assert ranking_quality(scores, answers, candidates, cutoff=11)[1] == pytest.approx((1.5 + 1 / math.log2(12)) / 3)


def test_ties_and_nan_do_not_score():
    candidates = torch.ones(1, 20, dtype=torch.bool)
    for scores in (torch.zeros(1, 20), torch.full((1, 20), math.nan)):
        assert ranking_quality(scores, torch.tensor([4]), candidates) == (0.0, 0.0)


# --- Training ---


@pytest.mark.parametrize("attention", sasrec.ATTENTIONS)
def test_training(attention, histories):
    row = train(attention, None, 0, torch.float32, histories, HYPER, CPU)
    assert row.losses[1] < row.losses[0] < 1.5
    assert len(row.losses) == 2 and row.best_epoch == 2
    assert 0 <= row.ndcg10 <= row.hr10 <= 1 and 0 <= row.validation_ndcg10 <= 1
    assert row.epoch_seconds > 0
    again = train(attention, None, 0, torch.float32, histories, HYPER, CPU)
    assert replace(again, epoch_seconds=row.epoch_seconds) == row
    if attention != PLAIN:
        reference = train(attention, "reference", 0, torch.float32, histories, HYPER, CPU)
        assert sasrec.curve_difference(row.losses, reference.losses) < 1e-5


def test_it_learns_the_steps(histories):
    row = train("simple", None, 0, torch.float32, histories, replace(HYPER, epochs=30), CPU)
    assert row.hr10 > 0.9 and row.losses[-1] < 0.5


@pytest.mark.parametrize("attention", sasrec.ATTENTIONS)
def test_no_state_depends_on_the_future_or_on_padding(attention):
    torch.manual_seed(0)
    model = sasrec.SASRec(30, HYPER, sasrec.attention_factory(attention, HYPER, None)).eval()
    for block in model.blocks:
        if isinstance(block.attention, RefinedSelfAttention):
            torch.nn.init.normal_(block.attention.w_q)
    items = torch.tensor([[0, 0, 0, 7, 3, 9, 1, 2]])
    changed = items.clone()
    changed[0, 6:] = torch.tensor([20, 21])
    states, other = model(items), model(changed)
    torch.testing.assert_close(states[:, :6], other[:, :6])
    assert not torch.allclose(states[:, 6:], other[:, 6:])
    torch.nn.init.normal_(model.items.weight[0].detach())
    torch.testing.assert_close(model(items)[:, 3:], states[:, 3:])


def test_curve_difference():
    assert sasrec.curve_difference([1.0, 2.0], [1.0, 1.9]) == pytest.approx(0.05)
    assert math.isnan(sasrec.curve_difference([1.0, math.nan], [1.0, 1.0]))


# --- The command ---


def test_command(histories, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(movielens, "load", lambda offline: histories)
    options = ["--attention", "plain", "simple", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--device", "cpu"]
    assert sasrec.main([*options, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    quality = [row for row in rows if row["workload"] == sasrec.QUALITY]
    assert {(row["attention"], row["seed"]) for row in quality} == set(product(("plain", "simple"), (0, 1)))
    assert len(quality) == 4 and all(row["impl"] is None and row["curve_difference"] is None for row in quality)
    parity = {(row["dtype"], row["impl"]): row for row in rows if row["workload"] == sasrec.PARITY}
    assert len(parity) == 4 and all(row["attention"] == "simple" for row in parity.values())
    for dtype, bound in (("float32", 1e-5), ("float64", 1e-13)):
        assert parity[dtype, None]["curve_difference"] is None
        assert parity[dtype, "reference"]["curve_difference"] < bound
    assert all(row["data"] == "steps" and row["torch"] == torch.__version__ for row in rows)
    printed = capsys.readouterr().out
    assert "plain" in printed and "simple" in printed and str(path) in printed


def test_requests_that_cannot_be_met(capsys):
    with pytest.raises(SystemExit, match="2"):
        sasrec.main(["--seeds", "0"])
    assert "--seeds, --epochs and --jobs must be at least 1" in capsys.readouterr().err

"""SASRec's data, ranking and training, on a few synthetic histories."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks.data import movielens
from benchmarks.quality import experiment, paired, sasrec
from benchmarks.quality.sasrec import PLAIN, Split, pad_left, ranks, train
from recattn.nn import RefinedSelfAttention
from tests.helpers.suite_runs import SMALL_SASREC, histories_by_steps

CPU = torch.device("cpu")
HYPER = replace(SMALL_SASREC, blocks=2, dropout=0.2, epochs=2)


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


def test_the_last_items_are_held_out(monkeypatch):
    monkeypatch.setattr(sasrec, "TESTED", 2)
    monkeypatch.setattr(sasrec, "VALIDATED", 1)
    split = Split([torch.tensor([3, 1, 4, 2, 5, 6]), torch.tensor([1, 2, 3, 4])], 4, CPU)
    assert split.items == 6
    assert split.inputs.tolist() == [[0, 0, 3, 1]]  # too short a history has no training
    assert split.targets.tolist() == [[0, 0, 1, 4]]
    assert split.validation.queries.tolist() == [[0, 3, 1, 4]] and split.validation.answers.tolist() == [2]
    assert split.test.queries.tolist() == [[3, 1, 4, 2], [1, 4, 2, 5]] and split.test.answers.tolist() == [5, 6]
    assert split.trained_on.nonzero()[:, 1].tolist() == [1, 3, 4]
    seen = [[x.nonzero()[:, 0].tolist() for x in part.seen] for part in (split.validation, split.test)]
    assert seen == [[[1, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4, 5]]]


def test_negatives_are_uniform_over_what_the_training_lacks(monkeypatch):
    monkeypatch.setattr(sasrec, "TESTED", 1)
    monkeypatch.setattr(sasrec, "VALIDATED", 1)
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
    own = ranks(scores, answers, candidates)
    assert own.tolist() == [0, 2, 10]
    assert sasrec.gains(own).tolist() == pytest.approx([1, 1 / math.log2(4), 0])
    metrics = sasrec.ranking_metrics({"ranks": torch.stack([own, own[[0, 0, 2]]])})  # two users with three each
    assert paired.value(metrics["HR@10"]) == pytest.approx(4 / 6)
    assert paired.value(metrics["NDCG@10"]) == pytest.approx((3 + 1 / math.log2(4)) / 6)


def test_ties_and_nan_do_not_score():
    candidates = torch.ones(1, 20, dtype=torch.bool)
    candidates[0, 0] = False
    for scores in (torch.zeros(1, 20), torch.full((1, 20), math.nan)):
        assert ranks(scores, torch.tensor([4]), candidates).tolist() == [18]


# --- Training ---


@pytest.mark.parametrize("attention", sasrec.EXPERIMENT.arms)
def test_training(attention, histories):
    row, tested = train(attention, 0, HYPER, histories, CPU)
    assert row.losses[1] < row.losses[0] < 1.5
    assert len(row.losses) == 2 and row.best_epoch == 2 and 0 <= row.validation <= 1
    assert row.epoch_seconds > 0 and tested["ranks"].shape == (len(histories.items), 5)
    again, tested_again = train(attention, 0, HYPER, histories, CPU)
    assert replace(again, epoch_seconds=row.epoch_seconds) == row
    assert torch.equal(tested_again["ranks"], tested["ranks"])
    if attention in sasrec.REFINED:
        reference, _ = train(attention, 0, HYPER, histories, CPU, impl="reference")
        assert reference.losses == pytest.approx(row.losses, rel=1e-5)


def test_it_learns_the_steps(histories):
    row, tested = train("simple", 0, replace(HYPER, epochs=30), histories, CPU)
    assert (tested["ranks"] < 10).double().mean() > 0.9 and row.losses[-1] < 0.5


def test_the_test_is_that_of_the_best_epoch(histories, monkeypatch):
    """Validation ranks only after the first of two evaluations; what is tested is the model as it then was."""
    monkeypatch.setattr(sasrec, "EVALUATE_EVERY", 1)
    one, ranked = train(PLAIN, 0, replace(HYPER, epochs=1), histories, CPU)
    original = sasrec.gains
    validations = iter([0.9, 0.1])
    monkeypatch.setattr(sasrec, "gains", lambda own: torch.full_like(original(own), next(validations)))
    row, tested = train(PLAIN, 0, HYPER, histories, CPU)
    assert row.best_epoch == 1 and row.losses[0] == one.losses[0]
    assert torch.equal(tested["ranks"], ranked["ranks"])


def test_weights_by_lag_by_hand(histories):
    """Before the refinement, and after it: what plain attention and the module itself give the last token."""
    torch.manual_seed(0)
    model = sasrec.SASRec(30, HYPER, sasrec.attention_factory("value", HYPER, None)).eval()
    items = 1 + torch.arange(16).view(2, 8)
    curves = sasrec.weights_by_lag(model, items)
    assert set(curves) == {f"block {b}, {kind}" for b in range(2) for kind in ("raw", "used")}
    x = model.items(items) * 4 + model.positions.weight
    attention = model.blocks[0].attention
    queries = model.blocks[0].attention_norm(x)
    plain = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    plain.load_state_dict({name: p for name, p in attention.state_dict().items() if not name.startswith("w_")})
    _, weights = plain(queries, x, x)  # the last token sees all
    assert curves["block 0, raw"] == pytest.approx(weights[:, -1].mean(0).flip(0).tolist(), abs=1e-5)
    _, refined = attention(queries, x, x, is_causal=True, need_weights=True)
    assert curves["block 0, used"] == pytest.approx(refined[:, -1].mean(0).flip(0).tolist(), abs=1e-5)
    assert curves["block 0, raw"] != curves["block 0, used"]


@pytest.mark.parametrize("attention", sasrec.EXPERIMENT.arms)
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


def test_a_relative_bias_by_hand():
    """Each head adds its number for the distance; with zeros it is plain attention."""
    torch.manual_seed(0)
    model = sasrec.SASRec(30, HYPER, sasrec.attention_factory(sasrec.RELATIVE, HYPER, None)).eval()
    plain = sasrec.SASRec(30, HYPER, sasrec.attention_factory(PLAIN, HYPER, None)).eval()
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if "by_distance" not in name})
    items = 1 + torch.arange(16).view(2, 8)
    torch.testing.assert_close(model(items), plain(items))
    attention = model.blocks[0].attention
    torch.nn.init.normal_(attention.by_distance)
    bias = sasrec.bias_by_distance(attention.by_distance)
    assert bias[1, 5, 2] == attention.by_distance[1, 3]
    x = torch.randn(1, 8, 16)
    causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
    actual = model.blocks[0]._attend(x, x, torch.zeros(1, 8, dtype=torch.bool))
    q, k, v = (
        y.unflatten(-1, (2, 8)).transpose(1, 2) for y in attention.in_proj_weight.mul(1).matmul(x.mT).mT.chunk(3, -1)
    )
    scores = (q @ k.mT / 8**0.5 + bias).masked_fill(causal, -math.inf)
    torch.testing.assert_close(actual, attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)))
    curves = sasrec.weights_by_lag(model, items)
    assert curves["block 0, used"] != curves["block 0, raw"] and sum(curves["block 0, used"]) == pytest.approx(
        1, abs=1e-3
    )


# --- The experiment ---


def test_what_is_searched():
    """Refinement's own hyperparameter is tried within the same budget; what both have, both try in the same draws."""
    plain, refined = (experiment.draws(sasrec.EXPERIMENT, attention) for attention in (PLAIN, "value"))
    assert len(plain) == len(refined) == 8 == len(set(plain)) == len(set(refined))
    assert plain[0] == refined[0] == sasrec.Hyperparameters()
    assert [replace(hyper, source="logits") for hyper in refined] == plain
    assert {hyper.source for hyper in refined} == {"logits", "weights"}


def test_command(histories, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(movielens, "load", lambda offline: histories)
    small = replace(sasrec.EXPERIMENT, hyper=HYPER, load=movielens.load, budget=2)
    options = ["--arms", "plain", "simple", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--device", "cpu"]
    assert experiment.main(small, [*options, "--results", str(tmp_path)], sasrec.__doc__) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [row for row in rows if row["workload"] == "sasrec" and "arm" in row]
    assert {(row["arm"], row["seed"]) for row in trained} == set(product(("plain", "simple"), (0, 1)))
    assert sum(row["workload"] == "sasrec tuning" for row in rows) == 4
    compared = {row["metric"]: row for row in rows if "effect_of" in row}
    assert set(compared) == {"NDCG@10", "HR@10"}
    mean = {arm: sum(row["test"]["NDCG@10"] for row in trained if row["arm"] == arm) / 2 for arm in ("plain", "simple")}
    assert compared["NDCG@10"]["effect"] == pytest.approx(mean["simple"] - mean["plain"])
    assert all(row["data"] == "steps" and row["torch"] == torch.__version__ for row in rows)
    printed = capsys.readouterr().out
    assert "plain" in printed and "simple" in printed and str(path) in printed

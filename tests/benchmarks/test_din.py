"""The click-through benchmark's samples, attentions, training and serving, on a few synthetic ratings."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import movielens
from benchmarks.data.movielens import Item
from benchmarks.quality import din, din_serving, experiment, paired
from benchmarks.quality.din import LREA_RANKS, MODELS, Hyperparameters, Ratings
from recattn.nn import Fidelity, TargetAttention

HYPER = Hyperparameters(length=32, dim=8, batch=64, epochs=25, patience=10, learning_rate=1e-2)


@pytest.fixture(scope="module")
def ratings():
    """Each user likes either items up to 20 or items above 20, so only the history predicts a click."""
    generator = torch.Generator().manual_seed(0)
    items = [1 + torch.randint(40, (n,), generator=generator) for n in range(10, 50)]
    liked = [(x <= 20).long() if user % 2 else (x > 20).long() for user, x in enumerate(items)]
    return Ratings(items, liked, "two tastes")


# --- Data ---


def test_samples_and_their_histories():
    ratings = Ratings([torch.arange(1, 11), torch.tensor([7, 8])], [torch.arange(10) % 2, torch.tensor([1, 0])], "")
    training, validation, test = ratings.split()
    assert training.tolist() == [[0, p] for p in range(1, 8)]  # user 1's first rating has no history
    assert validation.tolist() == [[0, 8]] and test.tolist() == [[0, 9], [1, 1]]
    batch = ratings.batch(torch.tensor([[0, 6], [1, 1], [0, 2]]), 4)
    assert batch.items.tolist() == [[7], [8], [3]] and batch.labels.tolist() == [[0.0], [0.0], [0.0]]
    assert batch.history.tolist() == [[3, 4, 5, 6], [7, 0, 0, 0], [1, 2, 0, 0]]
    assert batch.liked.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert batch.lengths.tolist() == [4, 1, 2]
    assert ratings.before_the_test().tolist() == [[0, 9], [1, 1]]
    one = ratings.first(1)
    assert one.items.tolist() == [list(range(1, 11))] and one.counts.tolist() == [10]


def test_ratings_of_the_file(tmp_path, monkeypatch):
    """Sorted by time; equal times keep the order of the file. A rating of 4 or more is a like."""
    path = tmp_path / "ml-100k.inter"
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    path.write_text(header + "1\t9\t4\t20\n1\t4\t3\t20\n2\t5\t5\t1\n1\t7\t5\t10\n")
    monkeypatch.setattr(movielens, "CACHED", path)
    monkeypatch.setattr(movielens, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    ratings = din.load(offline=True)
    assert ratings.items.tolist() == [[7, 9, 4], [5, 0, 0]] and ratings.liked.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert ratings.counts.tolist() == [3, 1] and ratings.source == "MovieLens-100k"


def test_items_of_the_file(tmp_path, monkeypatch):
    """A quotation mark is part of a title. A year that is not a number becomes None."""
    path = tmp_path / "ml-100k.item"
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    path.write_text(header + '12\tUsual Suspects, The\t1995\tCrime Thriller\n3\t"Quoted" Vérité\tV\tunknown\n')
    monkeypatch.setattr(movielens, "CACHED_ITEMS", path)
    with pytest.raises(ValueError, match=r"ml-100k\.item must have sha256 51d7cdf7.*, got"):
        movielens.items()
    monkeypatch.setattr(movielens, "SHA256_ITEMS", hashlib.sha256(path.read_bytes()).hexdigest())
    assert movielens.items(offline=True) == {
        12: Item("Usual Suspects, The", 1995, ("Crime", "Thriller")),
        3: Item('"Quoted" Vérité', None, ("unknown",)),
    }
    monkeypatch.setattr(movielens, "CACHED_ITEMS", tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"nothing, the titles and genres of MovieLens-100k, is not there \(off"
    ):
        movielens.items(offline=True)


@pytest.mark.skipif(not movielens.CACHED_ITEMS.exists(), reason="the items were never downloaded here")
def test_every_item_of_movielens_has_a_title_and_genres():
    items = movielens.items(offline=True)
    assert sorted(items) == list(range(1, movielens.ITEMS + 1))
    assert items[1] == Item("Toy Story", 1995, ("Animation", "Children's", "Comedy"))
    assert len({genre for item in items.values() for genre in item.genres}) == 19
    assert all(item.title and item.genres for item in items.values())


def test_without_the_data_ratings_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "CACHED", tmp_path / "nothing")
    ratings = din.load(offline=True)
    assert ratings.source.endswith("drawn ratings") and len(ratings.counts) == 943
    assert 0.3 < ratings.liked.sum() / ratings.counts.sum() < 0.7


def test_auc_of_scores_that_are_not_finite(ratings):
    samples = ratings.split()[2]
    for value in (math.nan, math.inf):
        assert math.isnan(din.auc(ratings, samples, HYPER, lambda batch, v=value: torch.full_like(batch.labels, v)))
    assert din.auc(ratings, samples, HYPER, lambda batch: batch.labels) == 1


def test_a_training_that_diverges_says_so(ratings):
    ranker = din.Ranker("LREA 4", HYPER)
    with torch.no_grad():
        ranker.attention.w_v.fill_(math.nan)
    with pytest.raises(ValueError, match="training diverged: the AUC of the validation was never above 0, at last nan"):
        din.fit(ranker, 0, ratings, replace(HYPER, epochs=2))


def test_figures_that_are_not_finite_are_null():
    figures = din.as_json(Fidelity(4, torch.float32, 0.5, 1.0, 0.0, math.inf, math.nan))
    assert figures["relative_error"] == 0.5 and figures["rare_loss"] is figures["common_loss"] is None


# --- Models ---


def test_din_has_the_parameters_whose_figures_are_recorded():
    """One layer with 4 d inputs and 36 units, PReLU, and one output: a seed draws the same numbers as before."""
    torch.manual_seed(0)
    attention = din.new_attention(din.DIN, HYPER)
    torch.manual_seed(0)
    first, second = nn.Linear(4 * 8, 36), nn.Linear(36, 1)
    assert isinstance(attention, TargetAttention) and attention.pooling == "mean"
    drawn = [first.weight, first.bias, second.weight, second.bias, torch.full((36,), 0.25)]
    assert all(torch.equal(a, b) for a, b in zip(attention.parameters(), drawn, strict=True))


def test_attentions_by_hand():
    dot, softmax, mean = din.DotProductAttention(8), din.SoftmaxAttention(8), din.MeanPooling()
    targets, behaviors = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    lengths = torch.tensor([6, 2])
    for user, length in enumerate(lengths):
        history = behaviors[user, :length]
        scores = F.leaky_relu(dot.query(targets[user]) @ dot.key(history).T / 8**0.5)
        expected = scores @ dot.value(history) / length
        torch.testing.assert_close(dot(targets, behaviors, seq_lens=lengths)[user], expected)
        scores = (softmax.query(targets[user]) @ softmax.key(history).T / 8**0.5).softmax(-1)
        expected = scores @ softmax.value(history)
        torch.testing.assert_close(softmax(targets, behaviors, seq_lens=lengths)[user], expected)
        torch.testing.assert_close(mean(targets, behaviors, seq_lens=lengths)[user], history.mean(0).expand(3, 8))


@pytest.mark.parametrize("model", MODELS)
def test_a_score_depends_on_its_candidate_and_its_history_alone(model, ratings):
    ranker = din.Ranker(model, HYPER)
    batch = ratings.batch(torch.tensor([[30, 5], [31, 20], [32, 1]]), HYPER.length)
    several = batch._replace(items=torch.tensor([[3, 9, 1], [30, 2, 5], [4, 4, 8]]))
    scores, _ = ranker(several)
    for i in range(3):
        one = several._replace(items=several.items[:, i : i + 1])
        torch.testing.assert_close(ranker(one)[0], scores[:, i : i + 1])
    padding = torch.arange(batch.history.shape[1]) >= batch.lengths[:, None]
    other = several._replace(history=several.history.masked_fill(padding, 17))
    assert padding.any() and torch.equal(ranker(other)[0], scores)


def test_the_penalty_is_that_of_lrea_alone(ratings):
    batch = ratings.batch(torch.tensor([[30, 5], [31, 20]]), HYPER.length)
    ranker = din.Ranker("LREA 4", HYPER)
    _, behaviors = ranker.embed(batch)
    loss = ranker.attention.loss(ranker.attention.compress(behaviors, batch.lengths), "sum")
    torch.testing.assert_close(ranker(batch, 0.5)[1], 0.5 * loss / 2)
    assert din.Ranker(din.DIN, HYPER)(batch, 0.5)[1] == 0


# --- Training ---


@pytest.mark.parametrize("model", [din.MEAN, din.DOT, din.SOFTMAX, din.DIN, "LREA 4"])
def test_it_learns_the_tastes(model, ratings):
    row, tested = din.train(model, 0, HYPER, ratings)
    auc = paired.value(din.click_metrics(tested)["AUC"])
    assert auc > 0.9 and row.validation > 0.9 and 1 <= row.best_epoch <= 25 and row.epoch_seconds > 0
    if model in LREA_RANKS:
        assert set(row.served_auc) == set(row.fidelity) == set(din.SERVED)
        assert all(0.5 < auc <= 1 for auc in row.served_auc.values())
        assert abs(row.served_auc["float32"] - row.served_auc["int8"]) < 0.01
        assert [figures["rank"] for figures in row.fidelity["int8"]] == [4]
        assert row.fidelity["float32"][0]["relative_error"] != row.fidelity["int8"][0]["relative_error"]


@pytest.mark.parametrize("model", [din.DIN, "LREA 4"])
def test_a_training_repeats(model, ratings):
    trained = [din.train(model, seed, replace(HYPER, epochs=1), ratings) for seed in (0, 0, 1)]
    first, again, other = (replace(row, epoch_seconds=0.0) for row, _ in trained)
    assert again == first and other.validation != first.validation
    assert torch.equal(trained[0].tested["scores"], trained[1].tested["scores"])


def test_reconstruction(ratings):
    """Matrices that project on the first four positions restore these and lose the others; none of that rank is better
    than the best."""
    full = ratings.first(40)
    hyper = replace(HYPER, length=8)
    ranker = din.Ranker("LREA 4", hyper)
    with torch.no_grad():
        ranker.attention.w_comp.copy_(torch.eye(8, 4))
        ranker.attention.w_decomp.copy_(torch.eye(4, 8))
    curves = din.reconstruction(ranker, full, hyper)
    assert curves["error by position"] == [0] * 4 + [1] * 4
    (best,) = curves["error, best"]
    assert 0 < best < 0.5**0.5 + 0.02


def test_hidden_layers_are_every_models():
    """Models differ in the attention only."""
    torch.manual_seed(0)
    rankers = [din.Ranker(model, HYPER) for model in MODELS]
    shapes = [{name: p.shape for name, p in r.named_parameters() if not name.startswith("attention")} for r in rankers]
    assert all(shape == shapes[0] for shape in shapes) and all(isinstance(r.norm, nn.LayerNorm) for r in rankers)


def test_served_attention_is_timed():
    calls = din_serving.serving_calls(700, 64, HYPER)
    assert set(calls) == {(din.DOT, "float32"), (din.DIN, "float32")} | {
        (model, dtype) for model in LREA_RANKS for dtype in ("float32", "bfloat16", "int8")
    }
    assert calls[din.DOT, "float32"][0] == 2 * 700 * 8 * 4 and calls[din.DIN, "float32"][0] == 700 * 8 * 4
    assert calls["LREA 8", "bfloat16"][0] == 2 * 8 * 8 * 2 and calls["LREA 8", "int8"][0] == 2 * 8 * (8 + 4)
    torch.manual_seed(0)
    targets, behaviors, lengths = torch.randn(1, 64, 8), torch.randn(1, 700, 8), torch.tensor([700])
    for model in (din.DOT, din.DIN):
        attention = din.new_attention(model, HYPER)
        torch.testing.assert_close(calls[model, "float32"][1](), attention(targets, behaviors, seq_lens=lengths))
    exact = calls["LREA 16", "float32"][1]()
    for dtype, bound in (("bfloat16", 0.03), ("int8", 0.03)):
        assert 0 < (calls["LREA 16", dtype][1]().float() - exact).norm() < bound * exact.norm()


def test_command(ratings, tmp_path, capsys):
    small = replace(din.EXPERIMENT, hyper=HYPER, load=lambda offline: ratings)
    options = ["--arms", "mean", "LREA 4", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--budget", "1"]
    assert experiment.main(small, [*options, "--results", str(tmp_path)], din.__doc__) == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [(row["arm"], row["seed"]) for row in rows if "arm" in row]
    assert sorted(trained) == [("LREA 4", 0), ("LREA 4", 1), ("mean", 0), ("mean", 1)]
    assert {(row["effect_of"], row["over"], row["metric"]) for row in rows if "effect_of" in row} == {
        ("LREA 4", "mean", "AUC"),
        ("LREA 4", "mean", "log loss"),
    }
    assert "two tastes" in capsys.readouterr().out


def test_serving_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(din_serving, "SERVED_LENGTHS", (50,))
    assert din_serving.main(["--seconds", "0.05", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 14 and all(row["p50_ms"] > 0 and row["length"] == 50 for row in rows)
    assert {row["workload"] for row in rows} == {din_serving.SERVING} and str(path) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        din_serving.main(["--seconds", "nan"])
    assert "--seconds must be finite and above 0" in capsys.readouterr().err

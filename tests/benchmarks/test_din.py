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
from benchmarks.quality import din
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


def test_batches_of_similar_lengths_hold_every_sample_once():
    samples = torch.stack([torch.arange(1000), torch.arange(1000) % 97], dim=1)
    batches = din.batches_of_similar_lengths(samples, 32, torch.Generator().manual_seed(0))
    assert torch.cat(batches)[:, 0].sort().values.tolist() == list(range(1000))
    spreads = [float(batch[:, 1].max() - batch[:, 1].min()) for batch in batches]
    assert sum(spreads) / len(spreads) < 12 and [len(batch) for batch in batches].count(32) >= 30
    lengths = [int(batch[0, 1]) for batch in batches]
    assert lengths != sorted(lengths)


def test_area_under_curve():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.9]), torch.tensor([0.0, 1, 0, 0, 1])
    # Pairs won: 0.4 over 0.1, half of 0.4 against 0.4; 0.9 over all three.
    assert din.area_under_curve(scores, labels) == pytest.approx(4.5 / 6)
    assert din.area_under_curve(torch.zeros(5), labels) == pytest.approx(0.5)
    for value in (math.nan, math.inf):
        assert math.isnan(din.area_under_curve(scores.index_fill(0, torch.tensor([2]), value), labels))


def test_a_training_that_diverges_says_so(ratings):
    ranker = din.Ranker("LREA 4", HYPER)
    with torch.no_grad():
        ranker.attention.w_v.fill_(math.nan)
    with pytest.raises(ValueError, match="training diverged: the AUC of the validation was never above 0, at last nan"):
        din.fit(ranker, 0, ratings, replace(HYPER, epochs=2))


def test_figures_that_are_not_finite_stay_out_of_medians():
    """A diverged seed still counts as a seed."""
    report = Fidelity(4, torch.float32, 0.5, 1.0, 0.0, math.inf, math.nan)
    figures = din.as_json(report)
    assert figures["relative_error"] == 0.5 and figures["rare_loss"] is figures["common_loss"] is None
    training = {"model": "LREA 4", "shape": {}, "data": "", "parameters": 0, "auc": 0.5, "validation_auc": 0.5}
    training |= {"best_epoch": 1, "epoch_seconds": 1.0}
    seeds = figures, figures | {"rare_loss": 0.25}
    rows = [din.Row(**training, seed=i, fidelity={way: [x] for way in din.SERVED}) for i, x in enumerate(seeds)]
    columns = {column.header: list(column.cells) for column in din.fidelity_table(rows).columns}
    assert set(columns["rare loss"]) == {""} and set(columns["relative error"]) == {"0.5000"}


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


def test_dot_product_and_mean_by_hand():
    dot, mean = din.DotProductAttention(8), din.MeanPooling()
    targets, behaviors = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    lengths = torch.tensor([6, 2])
    for user, length in enumerate(lengths):
        history = behaviors[user, :length]
        scores = F.leaky_relu(dot.query(targets[user]) @ dot.key(history).T / 8**0.5)
        expected = scores @ dot.value(history) / length
        torch.testing.assert_close(dot(targets, behaviors, seq_lens=lengths)[user], expected)
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


@pytest.mark.parametrize("model", [din.MEAN, din.DOT, din.DIN, "LREA 4"])
def test_it_learns_the_tastes(model, ratings):
    row = din.train(model, 0, ratings, HYPER)
    assert row.auc > 0.9 and row.validation_auc > 0.9 and 1 <= row.best_epoch <= 25 and row.epoch_seconds > 0
    if model in LREA_RANKS:
        assert set(row.served_auc) == set(row.fidelity) == set(din.SERVED)
        assert all(0.5 < auc <= 1 for auc in row.served_auc.values())
        assert abs(row.served_auc["float32"] - row.served_auc["int8"]) < 0.01
        assert [figures["rank"] for figures in row.fidelity["int8"]] == [4]
        assert row.fidelity["float32"][0]["relative_error"] != row.fidelity["int8"][0]["relative_error"]


@pytest.mark.parametrize("model", [din.DIN, "LREA 4"])
def test_a_training_repeats(model, ratings):
    rows = [din.train(model, seed, ratings, replace(HYPER, epochs=1)) for seed in (0, 0, 1)]
    first, again, other = (replace(row, epoch_seconds=0.0, seed=0) for row in rows)
    assert again == first and other.auc != first.auc


# --- Serving ---


def test_what_is_timed_is_the_attention():
    calls = din.serving_calls(700, 64, HYPER)
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


# --- The command ---


def test_command(ratings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(din, "load", lambda offline: ratings)
    measure = din.measure_serving
    monkeypatch.setattr(din, "measure_serving", lambda seconds, hyper: measure(seconds, hyper, (50,)))
    options = ["--models", "mean", "LREA 4", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--seconds", "0.05"]
    assert din.main([*options, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [row for row in rows if row["workload"] == din.QUALITY]
    assert sorted((row["model"], row["seed"]) for row in trained) == [
        ("LREA 4", 0),
        ("LREA 4", 1),
        ("mean", 0),
        ("mean", 1),
    ]
    served = [row for row in rows if row["workload"] == din.SERVING]
    assert len(served) == 14 and all(row["p50_ms"] > 0 and row["length"] == 50 for row in served)
    assert all(row["torch"] == torch.__version__ and row["threads"] == 1 for row in rows)
    printed = capsys.readouterr().out
    assert "two tastes" in printed and "truncation error" in printed and str(path) in printed
    assert din.main(["--serving-only", "--seconds", "0.05", "--results", str(tmp_path / "serving")]) == 0
    (path,) = (tmp_path / "serving").iterdir()
    assert {json.loads(line)["workload"] for line in path.read_text().splitlines()} == {din.SERVING}


def test_requests_that_cannot_be_met(capsys):
    for options, message in (
        (["--seeds", "0"], "--seeds, --epochs and --jobs must be at least 1"),
        (["--nonnegativity", "nan"], "--nonnegativity must be finite and at least 0"),
        (["--serving-only", "--training-only"], "not allowed with"),
    ):
        with pytest.raises(SystemExit, match="2"):
            din.main(options)
        assert message in capsys.readouterr().err


def test_hidden_layers_are_every_models():
    """Models differ in the attention only."""
    torch.manual_seed(0)
    rankers = [din.Ranker(model, HYPER) for model in MODELS]
    shapes = [{name: p.shape for name, p in r.named_parameters() if not name.startswith("attention")} for r in rankers]
    assert all(shape == shapes[0] for shape in shapes) and all(isinstance(r.norm, nn.LayerNorm) for r in rankers)

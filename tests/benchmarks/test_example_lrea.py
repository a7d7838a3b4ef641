"""The examples of target attention on a few synthetic ratings: what is trained is served, and genres generalise."""

import pytest
import torch

from benchmarks.data import movielens
from benchmarks.data.movielens import Item
from benchmarks.examples import embedding_bag, lrea
from benchmarks.examples.embedding_bag import BOTH, GENRES, IDS, GenreEmbedding
from benchmarks.quality import din, din_serving
from benchmarks.quality.din import DIN, Hyperparameters, Ranker, Ratings

HYPER = Hyperparameters(length=32, dim=8, batch=64, epochs=4, patience=4, learning_rate=1e-2)
ITEMS = {i: Item(f"Movie {i}", 1990, ("Drama",) if i <= 20 else ("Comedy", "War")) for i in range(1, 41)}


@pytest.fixture(scope="module")
def ratings():
    """Each user likes one genre. The last fifth of a user's ratings is of items that are not in the training set."""
    generator = torch.Generator().manual_seed(0)
    users = []
    for n in range(10, 50):
        items = 1 + 20 * torch.randint(2, (n,), generator=generator) + torch.randint(8, (n,), generator=generator)
        items[int(0.8 * n) :] += 8
        users.append(items)
    liked = [((x <= 20) == bool(user % 2)).long() for user, x in enumerate(users)]
    return Ratings(users, liked, "two tastes")


# --- LREA, served from a table ---


@pytest.mark.parametrize("dtype", lrea.DTYPES)
def test_the_table_serves_the_states_before_the_test(dtype, ratings):
    torch.manual_seed(0)
    ranker = Ranker(lrea.LREA, HYPER)
    table = lrea.state_table(ranker, ratings, HYPER, dtype)
    assert len(table) == len(ratings.counts) and table.dtype == dtype
    candidates = torch.tensor([3, 30, 3, 7])
    for user in (0, 17, 39):
        start = int(ratings.counts[user] * 0.9)
        history = slice(max(0, start - HYPER.length), start)
        items, liked = ratings.items[user, history], ratings.liked[user, history]
        behaviors = ranker.items(items) * ranker.factors[liked] + ranker.opinions(liked)
        state = ranker.attention.export_state(behaviors[None], dtype=dtype)
        expected = ranker.attention.attend(ranker.items(candidates)[None], state)[0]
        torch.testing.assert_close(lrea.from_table(ranker, table, user, candidates), expected)


def test_the_full_attention_in_blocks_is_the_full_attention(monkeypatch):
    monkeypatch.setattr(din_serving, "CACHED_ELEMENTS", 36 * 32 * 7)  # seven candidates a block
    ranker, behaviors, candidates = Ranker(DIN, HYPER), torch.randn(32, 8), 1 + torch.randperm(50)
    expected = ranker.attention(ranker.items(candidates)[None], behaviors[None])[0]
    torch.testing.assert_close(lrea.from_history(ranker, behaviors, candidates), expected)


def test_what_is_timed(ratings):
    rankers = [Ranker(model, HYPER) for model in (DIN, lrea.LREA)]
    rows = lrea.serve(*rankers, ratings, HYPER, 0.02)
    assert [(row.model, row.dtype) for row in rows] == [(DIN, "float32"), (lrea.LREA, "float32"), (lrea.LREA, "int8")]
    # Behaviours; keys and values; the same with a scale a row.
    assert [row.bytes_per_user for row in rows] == [32 * 8 * 4, 2 * 16 * 8 * 4, 2 * 16 * (8 + 4)]
    assert all(row.p50_ms > 0 and row.length == 32 and row.candidates == 1000 for row in rows)


def test_the_command(ratings, monkeypatch, capsys):
    monkeypatch.setattr(din, "load", lambda offline: ratings)
    assert lrea.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "two tastes" in printed and "rare loss" in printed and "bytes per user" in printed
    assert printed.count(lrea.LREA) >= 6 and printed.count(f" {DIN} ") == 2


# --- Genres in bags ---


def test_an_item_is_the_mean_of_its_genres():
    embedding = GenreEmbedding({1: ITEMS[1], 3: ITEMS[30], 4: Item("both", None, ("War", "Drama"))}, 8)
    assert embedding.names == ["Comedy", "Drama", "War"]
    comedy, drama, war = embedding.bag.weight
    actual = embedding(torch.tensor([[0, 1, 2], [3, 4, 3]]))
    nothing = torch.zeros(8)
    expected = [[nothing, drama, nothing], [(comedy + war) / 2, (drama + war) / 2, (comedy + war) / 2]]
    torch.testing.assert_close(actual, torch.stack([torch.stack(row) for row in expected]))
    actual.sum().backward()
    torch.testing.assert_close(embedding.bag.weight.grad[:, 0], torch.tensor([1.0, 1.5, 1.5]))


def test_ids_and_genres_add_up():
    genres, both = (embedding_bag.new_ranker(x, "LREA 4", ITEMS, HYPER).items for x in (GENRES, BOTH))
    ids = embedding_bag.new_ranker(IDS, "LREA 4", ITEMS, HYPER).items
    items = torch.tensor([[0, 1], [40, 21]])
    torch.testing.assert_close(both(items), ids(items) + genres(items))


def test_rare_items(monkeypatch):
    """Of ten ratings the first has no history, and the next seven are for training."""
    monkeypatch.setattr(embedding_bag, "RARE", 1)
    items = torch.tensor([9, 1, 1, 1, 2, 2, 3, 1, 2, 3]), torch.tensor([9, 4, 1, 1, 1, 2, 2, 2, 9, 4])
    ratings = Ratings(items, [torch.ones(10).long()] * 2, "")
    samples = torch.tensor([[0, 8], [0, 9], [1, 8], [1, 9]])  # items 2, 3, 9, 4
    assert embedding_bag.rare(ratings, samples).tolist() == [[0, 9], [1, 8], [1, 9]]


@pytest.mark.parametrize("attention", ["LREA 4", DIN])
def test_genres_tell_about_items_that_nobody_has_rated(attention, ratings):
    *_, test = ratings.split()
    assert len(embedding_bag.rare(ratings, test)) == len(test)
    aucs = {}
    for features in (IDS, GENRES, BOTH):
        ranker = embedding_bag.new_ranker(features, attention, ITEMS, HYPER)
        din.fit(ranker, 0, ratings, HYPER)
        aucs[features] = din.auc(ratings, test, HYPER, lambda batch, ranker=ranker: ranker(batch)[0])
    assert aucs[GENRES] > 0.95 and aucs[BOTH] > 0.9 and aucs[IDS] < 0.75


def test_the_command_of_genres(ratings, monkeypatch, capsys):
    monkeypatch.setattr(din, "load", lambda: ratings)
    monkeypatch.setattr(movielens, "items", lambda: ITEMS)
    assert embedding_bag.main(["--quick", "--attention", "LREA 4"]) == 0
    printed = capsys.readouterr().out
    assert "LREA 4 on two tastes" in printed and all(f" {x} " in printed for x in (IDS, GENRES, BOTH))

    def missing():
        raise FileNotFoundError("ml-100k.item is not there")

    monkeypatch.setattr(movielens, "items", missing)
    with pytest.raises(SystemExit, match=r"ml-100k\.item is not there"):
        embedding_bag.main([])

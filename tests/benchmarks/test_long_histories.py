"""Long histories with planted signals: what is drawn, and that the arms find what they can."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality import long_histories, paired
from benchmarks.quality.din import MEAN, SOFTMAX
from benchmarks.quality.long_histories import EDGE, FEW, ITEMS_PER_TOPIC, KINDS, RARE_COUNTS, TOPICS, Parts, draw

CPU = torch.device("cpu")
LENGTH = 96
HYPER = replace(long_histories.HYPER, length=LENGTH, epochs=12, learning_rate=1e-2)


def topics(items):
    return (items - 1) // ITEMS_PER_TOPIC


def test_what_is_planted():
    drawn = draw(200, LENGTH, 0)
    history, asked = topics(drawn.items), topics(drawn.candidates)
    of_kind = {kind: asked[:, drawn.kinds == number] for number, kind in enumerate(KINDS)}
    counts = {kind: (history[:, None, :] == own[:, :, None]).sum(-1) for kind, own in of_kind.items()}
    assert (counts["absent"] == 0).all()
    assert (counts["rare"] == drawn.rare_counts[:, None]).all()
    assert set(drawn.rare_counts.tolist()) == set(RARE_COUNTS)
    for kind, place in (("recent", slice(-EDGE, None)), ("expired", slice(None, EDGE))):
        assert (counts[kind] == FEW).all()
        assert ((history[:, None, place] == of_kind[kind][:, :, None]).sum(-1) == FEW).all()
    assert counts["main"].float().mean() / LENGTH == pytest.approx(0.3 * (1 - (2 * FEW + 7) / LENGTH), rel=0.1)
    assert (asked < TOPICS).all() and drawn.items.min() >= 1
    clicked = torch.tensor([kind in ("main", "rare", "recent") for kind in KINDS])[drawn.kinds]
    assert torch.equal(drawn.labels, clicked.float().expand(200, -1))
    again = draw(200, LENGTH, 0)
    assert torch.equal(again.items, drawn.items) and not torch.equal(draw(200, LENGTH, 1).items, drawn.items)


def test_metrics_by_hand():
    """Scores that know the kind find it; scores that do not are at chance. Rare interests are those of their users."""
    drawn = draw(60, LENGTH, 0)
    n = drawn.candidates.shape[1]
    knows = (drawn.kinds == KINDS.index("main")).float() + 2 * (drawn.kinds == KINDS.index("recent")).float()
    own = knows.expand(60, -1).clone()
    own[:, drawn.kinds == KINDS.index("rare")] = (drawn.rare_counts[:, None] == 4).float().expand(-1, 2)
    tested = {"scores": own, "kinds": drawn.kinds, "rare_counts": drawn.rare_counts}
    found = {name: paired.value(m) for name, m in long_histories.metrics(tested).items()}
    assert found == pytest.approx({"main": 1, "rare, 1": 0.5, "rare, 4": 1, "rare, 16": 0.5, "recent": 1})
    assert n == sum(long_histories.CANDIDATES)


@pytest.fixture(scope="module")
def parts():
    return Parts(*(draw(users, LENGTH, seed) for seed, users in enumerate((512, 64, 64))), "synthetic")


def test_training_repeats_and_finds_what_is_planted(parts):
    """In a short history, a mean finds the main interests."""
    _, tested = long_histories.train(MEAN, 0, HYPER, parts, CPU)
    assert paired.value(long_histories.metrics(tested)["main"]) > 0.8
    hyper = replace(HYPER, epochs=1)
    first, again = (long_histories.train("LREA 4", 0, hyper, parts, CPU) for _ in range(2))
    assert torch.equal(first.tested["scores"], again.tested["scores"])
    assert replace(first.row, epoch_seconds=0.0) == replace(again.row, epoch_seconds=0.0)


def test_no_arm_but_lrea_knows_positions(parts):
    torch.manual_seed(0)
    batch = parts.test.batch(torch.arange(4))
    shuffled = batch._replace(history=batch.history[:, torch.randperm(LENGTH)])
    for model in (MEAN, SOFTMAX, "LREA 4"):
        ranker = long_histories.Ranker(model, HYPER)
        same = torch.allclose(ranker(batch)[0], ranker(shuffled)[0], atol=1e-5)
        assert same == (model != "LREA 4")

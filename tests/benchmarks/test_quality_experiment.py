"""The statistics of paired trainings against brute force, and a run that is interrupted."""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from benchmarks.quality import experiment, paired
from benchmarks.quality.experiment import Experiment, Trained
from benchmarks.quality.training import TrainingRow, batches_of_similar_lengths, train_all

# --- Metrics ---


def brute_force_auc(scores, labels):
    pairs = [(p, n) for p, a in zip(scores, labels, strict=True) for n, b in zip(scores, labels, strict=True) if a > b]
    return statistics.mean(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs)


def test_area_under_curve_by_hand():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.9]), torch.tensor([0.0, 1, 0, 0, 1])
    users = torch.tensor([0, 1, 0, 1, 1])
    # Pairs won: 0.4 over 0.1, half of 0.4 against 0.4; 0.9 over all three.
    assert paired.value(paired.area_under_curve(scores, labels, users)) == pytest.approx(4.5 / 6)
    with pytest.raises(ValueError, match="scores must be finite, got 1 of 5 that are not"):
        paired.area_under_curve(scores.index_fill(0, torch.tensor([2]), math.nan), labels, users)


def test_metrics_of_drawn_users_are_those_of_their_samples():
    """A user who is drawn twice counts as two users with the same samples."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(6, (80,), generator=generator)
    scores = torch.randint(10, (80,), generator=generator).float()  # with ties
    labels = torch.randint(2, (80,), generator=generator).float()
    weights = torch.tensor([[2.0, 0, 1, 3, 0, 1]])
    drawn = torch.cat([(users == u).nonzero().flatten() for u in (0, 0, 2, 3, 3, 3, 5)])
    auc = paired.area_under_curve(scores, labels, users).of(weights.double()).item()
    assert auc == pytest.approx(brute_force_auc(scores[drawn].tolist(), labels[drawn].tolist()))
    loss = paired.log_loss(scores, labels, users).of(weights.double()).item()
    assert loss == pytest.approx(
        torch.nn.functional.binary_cross_entropy_with_logits(scores[drawn], labels[drawn]).item()
    )
    mean = paired.mean_of_users(torch.arange(6)).of(weights.double()).item()
    assert mean == pytest.approx(statistics.mean((0, 0, 2, 3, 3, 3, 5)))


# --- Effects ---


def drawn(seed, seeds, users, effect, by_seed, by_user):
    """A baseline and a method per seed: the effect, and how it differs between seeds and between users."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(seeds, users, generator=generator, dtype=torch.float64)
    differences = effect + by_seed * torch.randn(seeds, 1, generator=generator, dtype=torch.float64)
    differences = differences + by_user * torch.randn(1, users, generator=generator, dtype=torch.float64)
    return [paired.mean_of_users(x) for x in base + differences], [paired.mean_of_users(x) for x in base]


@pytest.mark.parametrize(("by_seed", "by_user"), [(0.0, 1.0), (0.1, 0.0), (0.1, 1.0)])
def test_the_interval_is_as_wide_as_its_two_sources(by_seed, by_user):
    """The standard error of a mean over users and seeds, whichever of them varies; with few seeds too."""
    seeds, users = 5, 400
    estimates = [paired.estimate(*drawn(i, seeds, users, 0.3, by_seed, by_user)) for i in range(30)]
    error = (by_seed**2 / seeds + by_user**2 / users) ** 0.5
    squares = statistics.mean((e.detectable / paired.DETECTED) ** 2 for e in estimates)
    assert squares == pytest.approx(error**2, rel=0.35)
    covered = sum(e.low <= 0.3 <= e.high for e in estimates)
    assert covered >= 22
    assert statistics.mean(e.effect for e in estimates) == pytest.approx(0.3, abs=4 * error / 30**0.5)


def test_pairing_removes_what_arms_share():
    """Users and seeds that differ a lot, alike in both arms, leave no trace in the interval."""
    method, baseline = drawn(0, 4, 100, 0.25, 0.0, 0.0)
    estimate = paired.estimate(method, baseline)
    assert estimate.effect == pytest.approx(0.25) and estimate.high - estimate.low < 1e-12
    assert paired.estimate(method[::-1], baseline).high - paired.estimate(method[::-1], baseline).low > 0.01


# --- Runs ---


@dataclass(frozen=True)
class Hyper:
    rate: float = 1.0
    own: int = 0
    epochs: int = 1


@dataclass(frozen=True)
class Data:
    source: str


def search(arm):
    return {"rate": (1.0, 2.0, 3.0, 4.0, 5.0)} | ({"own": (0, 1, 2)} if arm == "new" else {})


def train(arm, seed, hyper, data, device):
    """A rate of 2 is best for the old arm; for the new one also an `own` of 1."""
    validation = -abs(hyper.rate - 2) - (abs(hyper.own - 1) if arm == "new" else 0)
    row = TrainingRow(parameters=1, validation=validation, best_epoch=1, epoch_seconds=0.0)
    gain = 1.0 if arm == "new" else 0.0
    return Trained(row, {"values": torch.arange(5.0) + 10 * seed + gain * hyper.rate})


def metrics(tested):
    return {"mean": paired.mean_of_users(tested["values"])}


EXPERIMENT = Experiment(
    name="small", op="op", arms=("old", "new"), hyper=Hyper(), search=search, comparisons=(("new", "old"),),
    load=lambda offline: Data("numbers"), train=train, metrics=metrics, budget=4, seeds=3,
)  # fmt: skip


def records_of(folder):
    (path,) = folder.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return [{name: x for name, x in row.items() if name not in ("started", "dirty", "commit")} for row in rows]


def run(folder, monkeypatch, *options):
    """In this process, as a test's functions cannot be pickled by name. Returns the tasks that were trained."""
    calls = []

    def train_all(function, tasks, jobs, *arguments):
        for task in tasks:
            calls.append(task[0])
            yield function(*task, *arguments)

    monkeypatch.setattr(experiment, "train_all", train_all)
    small = replace(EXPERIMENT, load=lambda offline: Data("numbers"))
    assert experiment.main(small, ["--results", str(folder), "--device", "cpu", *options], "small") == 0
    return calls


def test_each_arm_is_tuned_with_the_same_budget(tmp_path, monkeypatch):
    old, new = (experiment.draws(EXPERIMENT, arm) for arm in ("old", "new"))
    assert len(old) == len(new) == 4 and old[0] == new[0] == Hyper()
    assert [hyper.rate for hyper in old] == [hyper.rate for hyper in new]  # all arms try the same, and none twice
    assert len({hyper.rate for hyper in old}) == 4 and len({hyper.own for hyper in new}) > 1
    assert all(hyper.own == 0 for hyper in old)

    calls = run(tmp_path, monkeypatch)
    tuning = [call for call in calls if call[1] == experiment.TUNING_SEED]
    assert [call[2] for call in tuning] == [*old, *new]
    best_old = min(old, key=lambda hyper: abs(hyper.rate - 2))
    best_new = min(new, key=lambda hyper: abs(hyper.rate - 2) + abs(hyper.own - 1))
    assert {call[2] for call in calls if call[0] == "old" and call not in tuning} == {best_old}
    assert {call[2] for call in calls if call[0] == "new" and call not in tuning} == {best_new}
    rows = records_of(tmp_path)
    same = {"op": "op", "workload": "small", "arm": "new", "seed": 2, "shape": asdict(best_new), "data": "numbers"}
    (row,) = (row for row in rows if row.get("arm") == "new" and row["seed"] == 2)
    assert row.items() >= {**same, "parameters": 1, "test": {"mean": 22 + best_new.rate}}.items()
    (effect,) = (row for row in rows if "effect_of" in row)
    assert effect["effect"] == best_new.rate
    assert (effect["seeds"], effect["users"], effect["baseline"]) == (3, 5, 12.0)


def test_batches_of_similar_lengths_hold_every_sample_once_in_an_order_of_the_seed():
    lengths = torch.arange(1000) % 97
    batches, again, other = (
        batches_of_similar_lengths(lengths, 32, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
    assert torch.equal(torch.cat(batches), torch.cat(again)) and not torch.equal(torch.cat(batches), torch.cat(other))
    spreads = [float(lengths[batch].max() - lengths[batch].min()) for batch in batches]
    assert sum(spreads) / len(spreads) < 12 and [len(batch) for batch in batches].count(32) >= 30
    firsts = [int(lengths[batch[0]]) for batch in batches]
    assert firsts != sorted(firsts)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", monkeypatch)
    expected = records_of(tmp_path / "whole")
    run(tmp_path / "part", monkeypatch, "--seeds", "1")
    records_of(tmp_path / "part")
    rest = run(tmp_path / "part", monkeypatch)
    assert len(rest) == 4 and set(rest) < set(whole)  # two arms of two seeds
    assert records_of(tmp_path / "part") == expected
    assert run(tmp_path / "part", monkeypatch) == []  # all is there
    (tmp_path / "part" / "small" / "old-0-0.part").write_bytes(b"cut off")
    assert run(tmp_path / "part", monkeypatch) == []


def fail_the_first(number, folder):
    (folder / str(number)).touch()
    if number == 0:
        raise ValueError("training 0 failed")
    time.sleep(0.5)  # not done before the failure is known


def test_a_failed_training_starts_no_other(tmp_path):
    with pytest.raises(ValueError, match="training 0 failed"):
        list(train_all(fail_the_first, [(number,) for number in range(20)], 1, tmp_path))
    assert len(list(tmp_path.iterdir())) < 10


def test_other_hyperparameters_are_trained_again(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "--budget", "1")
    assert len(run(tmp_path, monkeypatch, "--budget", "1", "--epochs", "2")) == 6


def test_arms_alone_are_not_compared(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "--arms", "new", "--budget", "1")
    assert not any("effect_of" in row for row in records_of(tmp_path))


def test_requests_that_cannot_be_met(capsys):
    for options, message in (
        (["--seeds", "0"], "--seeds, --budget, --epochs and --jobs must be at least 1"),
        (["--budget", "0"], "--seeds, --budget, --epochs and --jobs must be at least 1"),
        (["--arms", "none"], "invalid choice"),
    ):
        with pytest.raises(SystemExit, match="2"):
            experiment.main(EXPERIMENT, options, "small")
        assert message in capsys.readouterr().err

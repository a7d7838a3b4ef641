"""Two records against each other: a planted slowdown is caught, noise is not."""

import io
import random
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import plot, run
from benchmarks.harness import records
from benchmarks.harness.contest import Contest
from benchmarks.harness.records import Record, Row
from benchmarks.harness.registry import FORWARD, TRAINING
from benchmarks.report import compare
from recattn import _environment

RUN = {"device": "a processor", "threads": 2, "started": "2026-01-01T00:00:00+00:00"}


class SimulatedClock:
    """Returns the time that each implementation declares for its work, with one percent of noise."""

    def __init__(self, seed: int) -> None:
        self.worked = 0.0
        self.noise = random.Random(seed)

    def __call__(self, call) -> float:
        before = self.worked
        call()
        return (self.worked - before) * self.noise.gauss(1.0, 0.01)


def record(product, suite_settings, path: Path, *, work: float, seed: int) -> Path:
    """Write the record of a run in which `recattn` takes `work` ms per call and eager takes 2 ms."""
    clock = SimulatedClock(seed)
    product = replace(product, implementations={})

    def takes(milliseconds: float):
        def implementation(x, w):
            clock.worked += milliseconds
            return x @ w

        return implementation

    product.implementation("eager")(takes(2.0))
    product.implementation("recattn", ours=True)(takes(work))
    contest = Contest(
        product, product.workloads[0], [*product.implementations.values()], replace(suite_settings, clock=clock)
    )
    records.append(contest.run(), RUN, path)
    return path


@pytest.mark.parametrize("slowdown, caught", [(1.2, True), (1.02, False), (0.8, False)])
def test_a_planted_slowdown_is_caught(product, suite_settings, tmp_path, monkeypatch, capsys, slowdown, caught):
    old = record(product, suite_settings, tmp_path / "old.jsonl", work=1.0, seed=0)
    new = record(product, suite_settings, tmp_path / "new.jsonl", work=slowdown, seed=1)
    product.implementation("recattn", ours=True)(None)
    monkeypatch.setattr(plot, "load_operators", lambda: {"product": product})
    assert plot.main(["--compare", str(old), str(new)]) == caught
    printed = capsys.readouterr().out
    assert ("slower" in printed) == caught
    assert f"{2 * caught} of recattn regressed" in printed
    assert plot.main(["--compare", str(old), str(new), "--threshold", "0.3"]) == 0


def row(milliseconds: float | None = 1.0, spread: float | None = 0.01, **options) -> Record:
    own = {"op": "product", "workload": "small", "shape": {"batch": 4}, "dtype": "float32", "impl": "recattn"}
    own |= {"direction": FORWARD, "data": "drawn", "p50_ms": milliseconds, "spread": spread, "peak_bytes": 2**24}
    return Record(Row(**{**own, **options}), RUN)


def only_change(product, old: Record, new: Record) -> compare.Change:
    (change,) = compare.compare([old], [new], {"product": product})
    return change


@pytest.fixture
def ours(product):
    product.implementation("recattn", ours=True)(None)
    return product


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (row(1.0), row(1.09), compare.SAME),
        (row(1.0), row(1.13), compare.SLOWER),
        (row(1.0, spread=0.04), row(1.13), compare.SAME),
        (row(1.0), row(1.13, spread=0.04), compare.SAME),
        (row(1.0, spread=None), row(2.0), compare.SAME),
        (row(1.13), row(1.0), compare.FASTER),
        (row(), row(peak_bytes=2 * 2**24), compare.LARGER),
        (row(peak_bytes=100), row(peak_bytes=2000), compare.SAME),
        (row(), row(None, status=records.REFUSED), compare.LOST),
        (row(None, status=records.REFUSED), row(), compare.SAME),
    ],
)
def test_verdicts(ours, old, new, verdict):
    change = only_change(ours, old, new)
    assert change.verdict == verdict
    assert bool(compare.regressions([change])) == (verdict in compare.REGRESSIONS)


def test_the_spreads_of_both_count(ours):
    change = only_change(ours, row(1.0, spread=0.03), row(1.3, spread=0.04))
    assert change.spread == pytest.approx(0.05) and change.time_ratio == pytest.approx(1.3)


def test_a_slower_peer_is_no_regression(ours):
    change = only_change(ours, row(impl="eager"), row(2.0, impl="eager"))
    assert change.verdict == compare.SLOWER and not compare.regressions([change])
    console = Console(width=120, record=True, file=io.StringIO())
    compare.report(console, [change], 0.1)
    text = console.export_text()
    assert "0 of recattn regressed" in text and "peers take 2.00× the old time" in text


def test_what_differs_is_not_compared(ours):
    other_shape, other_machine = row(shape={"batch": 5}), Record(row().row, RUN | {"device": "another"})
    for new in (other_shape, other_machine, row(direction=TRAINING), row(dtype="bfloat16")):
        with pytest.raises(ValueError, match=r"no row in common.*a processor, 2 threads"):
            compare.compare([row()], [new], {"product": ours})


def test_of_rows_measured_again_the_last_counts(ours):
    (change,) = compare.compare([row(9.0), row(1.0)], [row(9.0), row(1.01)], {"product": ours})
    assert change.verdict == compare.SAME and change.time_ratio == pytest.approx(1.01)


def test_a_shape_may_get_new_options(ours):
    assert only_change(ours, row(), row(shape={"batch": 4, "window": None, "causal": False})).verdict == compare.SAME


def test_records_are_read_as_they_were_written(product, suite_settings, tmp_path):
    path = record(product, suite_settings, tmp_path / "a.jsonl", work=1.0, seed=0)
    with path.open("a") as file:
        file.write('{"op": "product", "workload": "quality", "auc": 0.8}\n')  # of another benchmark
    rows = records.read([tmp_path])
    assert [(row.impl, row.direction) for row, _ in rows] == [
        (name, direction) for name in ("eager", "recattn") for direction in (FORWARD, TRAINING)
    ]
    assert all(run == RUN for _, run in rows)
    assert rows[3].row.p50_ms == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("content, message", [(None, "No such file"), ("no JSON", "JSON lines"), ("", "found none")])
def test_what_is_no_record_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "old.jsonl"
    if content is not None:
        path.write_text(content)
    for command in ((plot.main, ["--compare", str(path), str(path)]), (run.main, ["--baseline-file", str(path)])):
        with pytest.raises(SystemExit) as stopped:
            command[0](command[1])
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_is_held_against_a_baseline_file(only_product, suite_settings, tmp_path, monkeypatch, capsys):
    clock, milliseconds = SimulatedClock(0), 1.0

    @only_product.implementation("recattn", ours=True)
    def works(x, w):
        clock.worked += milliseconds
        return x @ w

    def eager(x, w):
        clock.worked += 2.0
        return x @ w

    only_product.implementation("eager")(eager)
    monkeypatch.setattr(run, "clock_for", lambda device: clock)
    monkeypatch.setattr(run, "measure_ceilings", lambda *arguments, **options: suite_settings.ceilings())
    folders = (str(tmp_path / str(number)) for number in count())
    common = ["--workload", "small", "--seconds", "0.01", "--device", "cpu", "--results"]
    baseline = next(folders)
    assert run.main([*common, baseline]) == 0
    against = [*common, next(folders), "--baseline-file", baseline]
    assert run.main(against) == 0
    milliseconds = 1.2
    assert run.main(against) == 1
    assert run.main([*against, "--threshold", "0.5"]) == 0
    monkeypatch.setattr(_environment, "device_name", lambda device: "another machine")
    assert run.main(against) == 2
    assert "no row in common" in capsys.readouterr().out

"""`python -m benchmarks.serving.load` and `.build`: small, with the faults of LMDB and of a single Redis."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import ROOT
from benchmarks.harness import records
from benchmarks.report import serving as report
from benchmarks.serving.outcomes import Fault, StoreLoad

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")
pytest.importorskip("redis")

ERRORS = {
    ("lmdb", "max_bytes reached"): {"StoreFullError"},
    ("lmdb", "disk full"): {"StoreFullError"},
    ("lmdb", "a byte of a record flipped"): {"StateRefusedError"},
    ("redis", "server killed and restarted"): {"StoreUnavailableError"},
    ("redis", "maxmemory reached"): {"StoreFullError"},
    ("redis", "disk full"): {"StoreUnavailableError"},
    ("redis", "a byte of a record flipped"): {"StateRefusedError"},
}


def test_load_and_faults_give_no_wrong_answer_lose_no_write_and_raise_what_is_documented(tmp_path):
    from benchmarks.serving.servers import REASON

    stores = ["lmdb"] if REASON else ["lmdb", "redis"]
    sizes = ("--users", "2048", "--seconds", "0.6", "--fault-users", "1024")
    command = (sys.executable, "-m", "benchmarks.serving.load", *sizes, "--faults", "--folder", str(tmp_path))
    out = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [*command, "--store", *stores, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [out]  # what the engines wrote is gone
    loads, run = records.read_newest(StoreLoad, [tmp_path])
    assert [load.load_of for load in loads] == stores
    for load in loads:
        assert (load.wrong_answers, load.lost_writes) == (0, 0)
        assert load.requests > 0 and load.rewritten_per_s > 0 and 0 < load.hit_rate < 1
    faults, _ = records.read_newest(Fault, [tmp_path])
    assert len(faults) == (7 if REASON else 14)
    for fault in faults:
        assert fault.as_expected and (fault.wrong_answers, fault.lost_writes) == (0, 0), fault
        assert fault.answers > 0
        if fault.setting != "missing":
            assert fault.errors.keys() == ERRORS.get((fault.fault_of, fault.fault.partition(" (")[0]), set())
        assert bool(fault.missing) == (fault.setting == "missing")
    page = report.section(([], {}), (loads, run), (faults, run))
    assert all(f"| {fault.fault} |" in page for fault in faults) and page.count("\n| lmdb |") == 10


def test_a_build_is_measured_and_compared_with_the_direct_computation(tmp_path):
    pytest.importorskip("pyarrow")
    from benchmarks.serving import build

    built = build.measure("parquet", 5000, tmp_path)
    assert built.equal and (built.built_by, built.users) == ("parquet", 5000)
    run = {"device": "a CPU", "cores": 2, "torch": "2", "python": "3", "commit": "0" * 40}
    assert "| parquet | 5,000 |" in report.section(([built], run), ([], {}), ([], {}))


@pytest.fixture
def answered():
    """A question, users' write numbers, and the right answer."""
    from benchmarks.serving import traffic

    rng = np.random.default_rng(0)
    question = traffic.draw_question(rng, rng.integers(100, size=20))
    numbers = np.full(20, 3)
    return question, numbers, traffic._expected(question, numbers)


def test_an_answer_of_any_allowed_write_is_right_and_of_another_wrong(answered):
    from benchmarks.serving import traffic

    question, _, answer = answered
    found = torch.ones(20, dtype=torch.bool)
    for low, high, right in ((3, 3, True), (1, 3, True), (2, 5, True), (4, 6, False), (1, 2, False)):
        judged = traffic.judge(question, answer, found, np.full(20, low), np.full(20, high))
        assert judged.wrong.tolist() == [not right] * 20 and not judged.missing.any()


def test_one_wrong_bit_or_a_mix_of_two_writes_is_wrong(answered):
    from benchmarks.serving import traffic

    question, numbers, answer = answered
    found = torch.ones(20, dtype=torch.bool)
    first, last = int(question.offsets[7]), int(question.offsets[8]) - 1
    changed = answer.clone()
    changed.view(torch.int32)[first, 0, 0] ^= 1
    assert traffic.judge(question, changed, found, numbers, numbers).wrong.nonzero()[0].tolist() == [7]
    mixed = answer.clone()
    mixed[last] = traffic._expected(question, numbers + 1)[last]
    assert first < last
    assert traffic.judge(question, mixed, found, numbers, numbers + 1).wrong.nonzero()[0].tolist() == [7]


def test_a_missing_user_must_have_zeros(answered):
    from benchmarks.serving import traffic

    question, numbers, answer = answered
    found = torch.ones(20, dtype=torch.bool)
    found[7] = False
    judged = traffic.judge(question, answer, found, numbers, numbers)
    assert judged.wrong.nonzero()[0].tolist() == judged.missing.nonzero()[0].tolist() == [7]
    zeros = answer.clone()
    zeros[question.offsets[7] : question.offsets[8]] = 0
    assert not traffic.judge(question, zeros, found, numbers, numbers).wrong.any()


def test_a_lost_or_older_write_is_counted_as_lost(tmp_path):
    from benchmarks.serving import traffic
    from recattn.serving import MemoryStore

    store, truth = MemoryStore(traffic.SCHEMA), traffic.Truth(tmp_path, 50)
    truth.fill(store)
    old = store.get_many(torch.tensor([7]))
    truth.write(store.put_many, np.array([7, 8]))
    assert truth.lost(store) == 0
    store.put_many(torch.tensor([7]), old.state, event_ids=old.info.event_ids)
    store.delete_many(torch.tensor([9]))
    assert truth.lost(store) == 2

"""`make clients`: every library has an extra, a script and results, and the page shows the newest of them."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.clients import run

ROOT = Path(__file__).parents[2]
RESULT = {
    "library": "Library 1.0",
    "model": "Model",
    "attention": "ours",
    "epochs": 2,
    "metric": "AUC",
    "stock": {"seconds_per_epoch": 3.14, "metric": 0.71234},
    "ours": {"seconds_per_epoch": 2.72, "metric": 0.72345},
    "python": "3.11.7",
    "numpy": "1.26.4",
    "torch": "2.13.0+cpu",
    "cpu": "CPU",
    "kernels": "avx2",
    "threads": 1,
    "date": "2026-11-29",
}


@pytest.mark.parametrize("client", run.CLIENTS)
def test_a_client_has_an_extra_a_script_and_results(client):
    assert f"\n{run.EXTRAS.get(client, client)} = [" in (ROOT / "pyproject.toml").read_text()
    assert Path(run.__file__).with_name(f"{client}.py").exists()
    results = [json.loads(line) for line in (run.RESULTS / f"{client}.jsonl").read_text().splitlines()]
    assert results
    for result in results:
        assert result.keys() == RESULT.keys()
        assert result["kernels"] is not None, "trained without our C++ kernels"
        # Each trained: of MovieLens' 1,682 movies a random ten have an NDCG of 0.003, and a random score an AUC of 0.5.
        floor = {"test AUC": 0.7, "test NDCG@10": 0.01}[result["metric"]]
        assert all(result[which]["metric"] > floor for which in ("stock", "ours")), result


def test_the_page_is_as_new_as_the_results():
    page = run.PAGE.read_text()
    assert page == run.with_table(page, run.results_table())


def test_a_row():
    environment = "Python 3.11.7, numpy 1.26.4, torch 2.13.0"
    cells = ("Library 1.0", "Model", "ours", 2, "3.1, 2.7", "AUC", "0.7123", "0.7235", environment)
    assert run.row_of(RESULT) == run.table_row(cells)
    assert run.table_row((1, "two")) == "| 1 | two |"


def test_the_table_takes_the_place_of_the_last():
    page = f"# Page\n\n{run.MARKS[0]}\n\nold\n\n{run.MARKS[1]}\n\nEnd.\n"
    assert run.with_table(page, "new\n") == page.replace("old", "new")


def test_torch_is_that_of_development():
    torch, triton = run.pins("torch", "triton")
    assert re.fullmatch(r"torch==[\d.]+", torch) and triton.startswith("triton==")


def test_a_script_that_prints_no_comparison_fails(monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: type("Done", (), {"stdout": "epoch 1\n"}))
    with pytest.raises(SystemExit, match=r"recbole.py printed no comparison:\nepoch 1"):
        run.run_script(Path("python"), "recbole")

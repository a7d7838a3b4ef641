"""The example of CTR-Sink in a language model, shortened: MiniLM on MovieLens-100k."""

import pytest
from rich.console import Console

pytest.importorskip("transformers", reason="needs transformers")

from benchmarks.data import minilm, movielens
from benchmarks.examples import ctr_sink


@pytest.fixture(scope="module")
def model_and_data():
    try:
        minilm.folder()
        movielens.items()
    except FileNotFoundError as error:
        pytest.skip(f"needs MiniLM and MovieLens-100k: {error}")
    if movielens.load().source != "MovieLens-100k":
        pytest.skip("needs MovieLens-100k")


def test_samples_are_in_order_and_apart(model_and_data):
    train, test = ctr_sink.samples(5)
    assert all(1 < len(s.history) <= 5 for s in (*train[:500], *test[:500]))
    for sample in (*train[:500], *test[:500]):
        times = [rating.time for rating in (*sample.history, sample.target)]
        assert times == sorted(times)
    assert not {(s.target, tuple(s.history)) for s in train} & {(s.target, tuple(s.history)) for s in test}
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.15


def test_runs(model_and_data):
    settings = ctr_sink.Settings(behaviors=4, batch=4, steps=2, tests=24)
    console = Console(record=True, width=200)
    results = ctr_sink.run(settings, console)
    biased, plain = results["sinks with the bias"], results["sinks without"]
    for result in (biased, plain):
        assert 0 <= result["auc"] <= 1 and len(result["losses"]) == 4
        assert all(0 < float(mass.mean()) < 1 for mass in result["mass"])
    # The same batches from the same weights, but for the bias, which begins small.
    assert 0 < abs(biased["losses"][0] - plain["losses"][0]) < 0.05
    assert all(f"{result['auc']:.3f}" in console.export_text(clear=False) for result in (biased, plain))

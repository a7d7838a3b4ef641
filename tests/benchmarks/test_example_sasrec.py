"""The example's comparison on a few synthetic histories, and its command."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.data import movielens
from benchmarks.examples import sasrec as example
from benchmarks.quality import paired, sasrec
from benchmarks.quality.sasrec import Split
from recattn.nn import RefinedSelfAttention
from tests.helpers.suite_runs import SMALL_SASREC, histories_by_steps

CPU = torch.device("cpu")
HYPER = replace(SMALL_SASREC, dropout=0.2, epochs=3)


@pytest.fixture(scope="module")
def histories():
    return histories_by_steps()


def test_the_plain_row_is_benchmarks_sasrecs(histories):
    """The same model and batches, and without dropout the same losses."""
    hyper = replace(HYPER, dropout=0.0)
    rows = example.compare("value", Split(histories.items, hyper.length, CPU), hyper, CPU, Console(quiet=True))
    expected, tested = sasrec.train(sasrec.PLAIN, 0, hyper, histories, CPU)
    plain = rows["nn.MultiheadAttention"]
    assert (plain.losses, plain.parameters) == (expected.losses, expected.parameters)
    metrics = sasrec.ranking_metrics(tested)  # its last epoch is its only evaluation
    assert (plain.hr10, plain.ndcg10) == tuple(
        pytest.approx(paired.value(metrics[name])) for name in ("HR@10", "NDCG@10")
    )
    refined = rows["patched, value"]
    assert refined.losses[-1] < refined.losses[0] and refined.losses != plain.losses
    assert refined.parameters == plain.parameters + HYPER.blocks * 3 * HYPER.length**2


@pytest.mark.parametrize("mechanism", ["simple", "additive"])
def test_both_start_from_the_same_weights_and_see_the_same_batches(mechanism, histories, monkeypatch):
    started, drawn = [], []
    monkeypatch.setattr(example, "train", lambda model, *rest: started.append(model))
    example.compare(mechanism, Split(histories.items, HYPER.length, CPU), HYPER, CPU, Console(quiet=True))
    plain, refined = started
    own = dict(refined.named_parameters())
    assert all(torch.equal(parameter, own.pop(name)) for name, parameter in plain.named_parameters())
    assert own and all(name.split(".")[-1].startswith("w_") for name in own)
    assert [type(block.attention) for block in plain.blocks] == [nn.MultiheadAttention] * HYPER.blocks
    assert all(
        type(block.attention) is RefinedSelfAttention and block.attention.mechanism == mechanism
        for block in refined.blocks
    )
    monkeypatch.undo()
    monkeypatch.setattr(
        sasrec,
        "train_epoch",
        lambda model, optimizer, split, batch, generator: drawn.append(generator.get_state()) or 0.0,
    )
    split = Split(histories.items, HYPER.length, CPU)
    for model in started:
        example.train(model, split, replace(HYPER, epochs=1), Console(quiet=True), "")
    assert torch.equal(*drawn)


def test_it_learns_the_steps(histories):
    hyper = replace(HYPER, epochs=30)
    rows = example.compare("simple", Split(histories.items, hyper.length, CPU), hyper, CPU, Console(quiet=True))
    assert all(row.hr10 > 0.9 and row.losses[-1] < 0.5 and row.epoch_seconds > 0 for row in rows.values())


def test_command(histories, monkeypatch, capsys):
    monkeypatch.setattr(movielens, "load", lambda offline: histories)
    assert example.main(["--quick", "--mechanism", "value", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "patched: blocks.0.attention" in printed
    assert "nn.MultiheadAttention" in printed and "patched, value" in printed and "HR@10" in printed
    assert f"steps, {example.QUICK_EPOCHS} epochs, cpu" in printed

"""benchmarks.quality.faults in seconds: trainings under faults, processes with uneven shares, and leaks."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality import faults
from benchmarks.quality.faults import KERNELS, MODELS, REFERENCE, Curve, Growth, Settings, Training

SHORT = Settings(steps=8, dropout=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_short_training_follows_the_reference_and_is_resumed_bit_for_bit(name, dtype):
    settings = replace(SHORT, dtype=dtype)
    curve = faults.train(f"{name}/{KERNELS}", 0, settings)
    expected = faults.train(f"{name}/{REFERENCE}", 0, settings)
    assert curve.resumed
    assert curve.losses == pytest.approx(expected.losses, rel=2e-2)


@pytest.mark.parametrize("name", MODELS)
def test_steps_whose_gradients_overflow_are_skipped(name):
    training = Training(name, 0, KERNELS, replace(SHORT, dtype=torch.float16))
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    losses = [training.train_step() for _ in range(8)]
    assert training.skipped > 0
    assert all(p.isfinite().all() for p in training.model.parameters())
    assert torch.tensor(losses).isfinite().all()


def test_a_curve_that_leaves_the_spread_of_the_seeds_is_found():
    curves = [
        Curve("LREA", impl, seed, [1.0 - 0.1 * seed] * 40, 0, True) for impl in (KERNELS, REFERENCE) for seed in (0, 1)
    ]
    assert faults.compare(curves).holds
    assert not faults.compare([curves[0]._replace(losses=[1.0] * 38 + [1.5] * 2), *curves[1:]]).holds


def test_uneven_and_empty_shares_train_as_one_process():
    errors = faults.two_processes(rounds=1)
    assert len(errors) == 2 * len(MODELS)
    assert max(errors.values()) < 1e-6, errors


def test_no_operator_leaves_objects_or_memory_behind():
    assert faults.main(["--only", "leaks", "--calls", "1000", "--device", "cpu"]) == 0


@pytest.mark.parametrize("leaked", [list, lambda: bytes(1 << 17)])
def test_a_leak_is_found(leaked):
    kept = []
    grown = faults.growth(lambda: kept.append(leaked()), calls=1000, warm_up=10)
    assert not faults.leaks_nothing(grown, 1000)
    assert faults.leaks_nothing(Growth(0, 0, 0, 0), 1000)

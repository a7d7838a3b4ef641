"""`python -m recattn lrea-size`, against numbers worked out by hand."""

import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from recattn import __main__ as command
from recattn.serving import SlotMap, StateTable, sizing

COMPILED = pytest.mark.skipif(find_spec("recattn._slot_map") is None, reason="recattn has no compiled SlotMap here")


def lrea_size(monkeypatch, capsys, arguments: str) -> dict[str, str]:
    """The printed values, by the name of their line."""
    monkeypatch.setattr(sys, "argv", ["recattn", "lrea-size", *arguments.split()])
    command.main()
    return dict(re.split(r" {2,}", line) for line in capsys.readouterr().out.strip().splitlines())


def test_the_example(monkeypatch, capsys):
    """400 million users: 2·32·64 B + 2·32·4 B = 4352 B a user; a request of 200 bf16 targets and outputs of 64 moves
    4352 B + 200·128·2 B = 55,552 B; 141e9 / 4352 = 32,398,897.06 rows, one of which is nobody's."""
    lines = lrea_size(
        monkeypatch, capsys, "--users 400000000 --rank 32 --dim 64 --dtype int8 --requests-per-second 100000"
    )
    assert lines == {
        "states of a user": "4,096 B",
        "scales of a user": "256 B",
        "slot map of a user": "40 B, on the host",
        "table of 400,000,000 users": "1,740.800 GB",
        "slot map of all users": "16.000 GB, on the host",
        "read from the table, a request": "4,352 B",
        "read from the table, 1000 requests": "4.352 MB",
        "moved in all, 1000 requests of 200 candidates": "55.552 MB, targets and outputs in bfloat16",
        "bandwidth at 100,000 requests/s": "5.555 GB/s",
        "users in 141 GB of one GPU": "32,398,896",
        "GPUs for all users": "13",
    }


def test_every_option(monkeypatch, capsys):
    """4 heads of rank 8, 16 + 24 wide, in 2 bytes: 4·8·40·2 B = 2560 B; 10 candidates of 4·40·4 B = 6400 B in all;
    10e9 / 2560 = 3,906,250 rows."""
    lines = lrea_size(
        monkeypatch,
        capsys,
        "--users 7812498 --rank 8 --dim 16 --value-dim 24 --heads 4 --dtype bfloat16 --target-dtype float32 "
        "--candidates 10 --gpu-memory 10",
    )
    assert lines["states of a user"] == "2,560 B" and lines["scales of a user"] == "0 B"
    moved = lines["moved in all, 1000 requests of 10 candidates"]
    assert moved == "8.960 MB, targets and outputs in float32"
    assert lines["users in 10 GB of one GPU"] == "3,906,249" and lines["GPUs for all users"] == "2"
    assert not any(name.startswith("bandwidth") for name in lines)


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("float16", 2)])
def test_targets_take_the_dtype_of_the_states(monkeypatch, capsys, dtype, itemsize):
    lines = lrea_size(monkeypatch, capsys, f"--users 1 --rank 1 --dim 5 --dtype {dtype} --candidates 1")
    moved = f"{1000 * 20 * itemsize / 1e6:.3f} MB, targets and outputs in {dtype}"
    assert lines["moved in all, 1000 requests of 1 candidates"] == moved


def test_a_gpu_too_small_for_one_user(monkeypatch, capsys):
    lines = lrea_size(monkeypatch, capsys, "--users 9 --rank 64 --dim 256 --dtype float32 --gpu-memory 0.0001")
    assert lines["users in 0.0001 GB of one GPU"] == "0" and lines["GPUs for all users"].startswith("none")


@COMPILED
@pytest.mark.parametrize("dtype", sizing.DTYPES)
def test_is_what_a_table_takes(dtype):
    users = 1000
    table = StateTable(users, heads=3, rank=4, dim=8, value_dim=12, dtype=sizing.DTYPES[dtype])
    size = sizing.LreaSize(users, 4, 8, 12, 3, dtype, "bfloat16", 200)
    assert table.nbytes == (users + 1) * size.row_bytes
    assert size.users_in(table.nbytes) == users and size.users_in(table.nbytes - 1) == users - 1


@COMPILED
def test_is_what_a_slot_map_takes():
    users = 1_000_000
    slot_map = SlotMap(users)
    assert users * sizing.SLOT_MAP_BYTES <= slot_map.nbytes <= users * sizing.SLOT_MAP_BYTES + 64
    slot_map.publish(slot_map.reserve(np.arange(users)))
    assert len(slot_map) == users and slot_map.stats()["evictions"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--rank 0", "argument --rank: must be a positive integer, got '0'"),
        ("--users -3", "argument --users: must be a positive integer, got '-3'"),
        ("--dim 6.5", "argument --dim: must be a positive integer, got '6.5'"),
        ("--candidates many", "argument --candidates: must be a positive integer, got 'many'"),
        ("--gpu-memory nan", "argument --gpu-memory: must be a positive number, got 'nan'"),
        ("--gpu-memory inf", "argument --gpu-memory: must be a positive number, got 'inf'"),
        ("--dtype int4", "argument --dtype: invalid choice: 'int4'"),
        ("--target-dtype int8", "argument --target-dtype: invalid choice: 'int8'"),
    ],
)
def test_refuses_nonsense_by_name(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        lrea_size(monkeypatch, capsys, f"--users 1 --rank 4 --dim 8 --dtype int8 {arguments}")
    assert message in capsys.readouterr().err

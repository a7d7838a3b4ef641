"""A saved StateTable is loaded as it was saved or refused, whatever happened to the file; and pickling is refused."""

import copy
import io
import pickle
from importlib.util import find_spec
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recattn.serving import StateTable

pytestmark = pytest.mark.skipif(find_spec("recattn._slot_map") is None, reason="recattn has no compiled SlotMap here")

SIZES = {"heads": 2, "rank": 3, "dim": 4, "value_dim": 5}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def filled_table(dtype: torch.dtype, capacity: int = 3) -> StateTable:
    table = StateTable(capacity, **SIZES, dtype=dtype)
    random = torch.Generator().manual_seed(0)
    states = (torch.randn(3, 2, 3, width, generator=random) for width in (4, 5))
    table.put(torch.tensor([-7, 2**50, 3]), *states)
    return table


def saved_bytes(state: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name


def through_torch(state):
    return torch.load(io.BytesIO(saved_bytes(state)), weights_only=True)


def through_safetensors(state):
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load(safetensors.save(state))


def through_numpy(state):
    file = io.BytesIO()
    np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    file.seek(0)
    return {name: torch.from_numpy(array) for name, array in np.load(file).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store", [dict, through_torch, through_safetensors, through_numpy])
def test_any_store_of_tensors_keeps_a_table(store, dtype):
    if store is through_numpy and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    state = filled_table(dtype).state_dict()
    table = StateTable(5, **SIZES, dtype=dtype)
    table.load_state_dict(store(state))
    assert_same(table.state_dict(), state)


def test_an_empty_table_is_kept_too():
    state = StateTable(1, **SIZES).state_dict()
    table = StateTable(1, **SIZES)
    table.load_state_dict(through_torch(state))
    assert len(table) == 0 and len(state["user_ids"]) == 0


def test_users_who_are_not_in_the_saved_table_stay():
    table = StateTable(5, **SIZES)
    table.put(torch.tensor([3, 100]), torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 5))
    saved = filled_table(torch.float32).state_dict()
    table.load_state_dict(saved)
    assert table.contains(torch.tensor([-7, 2**50, 3, 100])).all()
    loaded = table.state_dict()
    at, there = loaded["user_ids"].tolist().index(3), saved["user_ids"].tolist().index(3)
    assert torch.equal(loaded["keys"][at], saved["keys"][there])


@settings(max_examples=150)
@given(st.data())
def test_a_flipped_bit_of_any_tensor_is_refused(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    state = filled_table(dtype).state_dict()
    name = data.draw(st.sampled_from(sorted(state)))
    entries = state[name].reshape(-1).view(torch.uint8)
    entries[data.draw(st.integers(0, len(entries) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    table = StateTable(3, **SIZES, dtype=dtype)
    with pytest.raises(ValueError, match=r"^(format_version|checksum) of state must be \d+"):
        table.load_state_dict(state)
    assert len(table) == 0


def refused_or_intact(file: bytes, expected: dict[str, torch.Tensor]) -> None:
    try:
        state = torch.load(io.BytesIO(file), weights_only=True)
    except Exception:
        return
    table = StateTable(3, **SIZES)
    try:
        table.load_state_dict(state)
    except ValueError:
        assert len(table) == 0
    else:
        assert_same(table.state_dict(), expected)


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_byte_of_a_file_is_refused_or_does_no_harm(data):
    state = filled_table(torch.float32).state_dict()
    file = bytearray(saved_bytes(state))
    file[data.draw(st.integers(0, len(file) - 1))] ^= data.draw(st.integers(1, 255))
    refused_or_intact(bytes(file), state)


def test_a_flipped_byte_of_a_state_is_refused_by_its_checksum():
    state = filled_table(torch.float32).state_dict()
    file = bytearray(saved_bytes(state))
    file[file.index(state["keys"].numpy().tobytes()) + 17] ^= 4
    with pytest.raises(
        ValueError, match=r"checksum of state must be \d+, that of its tensors \(the state is damaged: "
    ):
        StateTable(3, **SIZES).load_state_dict(torch.load(io.BytesIO(file), weights_only=True))


@given(st.data())
def test_a_truncated_file_is_refused_or_does_no_harm(data):
    state = filled_table(torch.float32).state_dict()
    file = saved_bytes(state)
    refused_or_intact(file[: data.draw(st.integers(0, len(file) - 1))], state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": torch.tensor(2)}, r"format_version of state must be 1 \(save it anew .*\), got 2"),
        ({"format_version": None}, r"format_version of state must be 1 \(.*\), got None"),
        ({"format_version": "1"}, r"format_version of state must be 1 \(.*\), got 1"),
        ({"checksum": torch.tensor([1, 2])}, r"checksum of state must be \d+, .*, got \[1, 2\]"),
        ({"keys": None}, r"keys must be a torch.Tensor, got NoneType"),
        ({"keys": torch.zeros(3, 2, 3, 4)}, r"checksum of state must be \d+, .* \(the state is damaged"),
        (
            {"more": torch.zeros(1)},
            r"state must be a dict of format_version, user_ids, keys, values, checksum \(.*more$",
        ),
    ],
)
def test_refuses_other_dicts(change, message):
    table = StateTable(3, **SIZES)
    with pytest.raises(ValueError, match=message):
        table.load_state_dict({**filled_table(torch.float32).state_dict(), **change})
    assert len(table) == 0


@pytest.mark.parametrize("name", ["format_version", "user_ids", "keys", "values", "checksum"])
def test_refuses_a_dict_without(name):
    state = filled_table(torch.float32).state_dict()
    del state[name]
    expected = "format_version of state must be 1" if name == "format_version" else f"state must be a dict of .*{name}"
    with pytest.raises(ValueError, match=expected):
        StateTable(3, **SIZES).load_state_dict(state)


def test_refuses_what_is_no_dict():
    with pytest.raises(ValueError, match=r"state must be a dict of StateTable\.state_dict, got list"):
        StateTable(3, **SIZES).load_state_dict([])


@pytest.mark.parametrize(
    "other, message",
    [
        (
            {"dtype": torch.float16},
            r"keys of state must be torch.float16 \[3, 2, 3, 4\] \(.*\), got torch.float32 \[3, ",
        ),
        (
            {"dtype": torch.int8},
            r"state must be a dict of .*key_scales.* \(load it into a table of the dtype .*\), got",
        ),
        (
            {"heads": 1},
            r"keys of state must be torch.float32 \[3, 1, 3, 4\] \(load it into a table like .*\[3, 2, 3, 4\]",
        ),
        ({"rank": 4}, r"keys of state must be torch.float32 \[3, 2, 4, 4\]"),
        ({"dim": 3}, r"keys of state must be torch.float32 \[3, 2, 3, 3\]"),
        ({"value_dim": 4}, r"values of state must be torch.float32 \[3, 2, 3, 4\]"),
        ({"capacity": 2}, r"capacity must be at least 3, the users of state \(grow the table\), got 2"),
    ],
)
def test_refuses_a_table_of_other_sizes(other, message):
    state = filled_table(torch.float32).state_dict()
    table = StateTable(**{"capacity": 3, **SIZES, **other})
    with pytest.raises(ValueError, match=message):
        table.load_state_dict(state)
    assert len(table) == 0


def pickled_for_spawn(table):
    """What multiprocessing does to the arguments of a process that it spawns."""
    return ForkingPickler.dumps(table)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy, pickled_for_spawn])
def test_cannot_be_pickled_and_says_what_to_do(duplicate):
    table = filled_table(torch.float32)
    with pytest.raises(TypeError, match=r"a StateTable cannot be pickled.*state_dict\(\) and load_state_dict\(\)"):
        duplicate(table)
    assert len(table) == 3

"""States as rows of an embedding table: `StateSchema.to_rows` and `from_rows` keep every bit."""

import pytest
import torch

import recattn
from recattn.nn.lrea import LREAState
from recattn.serving import MemoryStore, StateSchema
from tests.helpers.state_tables import DTYPES, DV, D, H, R, ids, random_states

NAN_LANE = (-1, -1, -1, 127)  # as float32 a NaN, 0x7FFFFFFF


def schema_of(dtype: torch.dtype) -> StateSchema:
    return StateSchema(H, R, D, DV, dtype, "m")


def state_of(dtype: torch.dtype, users: int = 5) -> LREAState:
    if dtype != torch.int8:
        return LREAState(*random_states(users, dtype), None, None)
    keys, values = (torch.randint(-128, 128, (users, H, R, width), dtype=dtype) for width in (D, DV))
    keys[0, 0, 0, :4] = torch.tensor(NAN_LANE)
    return LREAState(keys, values, torch.rand(users, H, R), torch.rand(users, H, R))


@pytest.mark.parametrize("lane", [torch.float32, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_come_back_from_their_rows(dtype, lane):
    schema, state = schema_of(dtype), state_of(dtype)
    rows = schema.to_rows(state)
    assert rows.shape == (5, schema.row_width) and rows.dtype == torch.float32 and schema.row_width % 4 == 0
    assert bool(rows.isnan().any()) == (dtype == torch.int8)
    back = schema.from_rows(rows.view(lane))
    for mine, expected in zip(back, state, strict=True):
        assert mine is expected is None or (mine.dtype == expected.dtype and torch.equal(mine, expected))
    assert back.keys.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_is_a_user_without_a_state(dtype):
    schema = schema_of(dtype)
    state = schema.from_rows(torch.zeros(1, schema.row_width))
    stored = MemoryStore(schema).get_many(ids(7))
    assert all(torch.equal(*pair) for pair in zip(state, stored.state, strict=True) if pair[0] is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reads_rows_in_place(dtype):
    schema, state = schema_of(dtype), state_of(dtype)
    targets, offsets, slots = torch.randn(9, H, D), torch.tensor([0, 4, 4, 6, 8, 9]), torch.arange(5)

    def scores(state):
        scales = {"key_scales": state.key_scales, "value_scales": state.value_scales}
        return recattn.lrea_absorbed_attention(targets, state.keys, state.values, slots, offsets, **scales)

    assert torch.equal(scores(schema.from_rows(schema.to_rows(state))), scores(state))


def test_states_are_cast_to_the_dtype_of_the_schema():
    schema, state = schema_of(torch.int8), state_of(torch.float32)
    store = MemoryStore(schema)
    store.put_many(torch.arange(5), state)
    cast, stored = schema.to_rows(state), schema.to_rows(store.get_many(torch.arange(5)).state)
    assert torch.equal(cast.view(torch.int32), stored.view(torch.int32))


def test_what_does_not_fit_is_refused():
    schema, state = schema_of(torch.float16), state_of(torch.float32)
    width = schema.row_width
    with pytest.raises(ValueError, match=rf"rows must be \[U, W\] = \[3, {width}\], got \[3, {width - 4}\]"):
        schema.from_rows(torch.zeros(3, width - 4))
    with pytest.raises(ValueError, match="rows must be float32 or int32, got float16"):
        schema.from_rows(torch.zeros(3, width, dtype=torch.float16))
    state.values[3, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"finite in torch\.float16, got entries that are not, of the users at \[3\]"):
        schema.to_rows(state)
    with pytest.raises(ValueError, match="state must be an LREAState, got Tensor"):
        schema.to_rows(state.keys)

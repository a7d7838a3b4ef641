"""StateTable serves lrea_absorbed_attention, and refuses states that it cannot hold."""

import re
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import recattn.reference
from recattn.nn import LREA
from recattn.serving import StateTable
from recattn.testing import assert_matches_reference
from tests.helpers.state_tables import (
    DTYPES,
    DV,
    INF,
    INVALID,
    NAN,
    D,
    H,
    R,
    ids,
    make_table,
    random_states,
    stamped,
    stamps_of,
)

pytestmark = pytest.mark.skipif(find_spec("recattn._slot_map") is None, reason="recattn has no compiled SlotMap here")


# Serving


@pytest.mark.parametrize("dtype", DTYPES)
def test_serves_the_absorbed_attention(dtype):
    keys, values = random_states(5)
    table = make_table(8, dtype)
    table.put(ids(50, 51, 52, 53, 54), keys, values)
    target_dtype = torch.float32 if dtype == torch.int8 else dtype
    targets, offsets = torch.randn(9, H, D).to(target_dtype), torch.tensor([0, 2, 2, 5, 9])
    out = table.attend(targets, ids(53, 50, 50, 51), offsets, negative_slope=0.2)

    if dtype == torch.int8:
        states, scales = zip(recattn.lrea_quantize(keys), recattn.lrea_quantize(values), strict=True)
        scales = dict(zip(("key_scales", "value_scales"), scales, strict=True))
    else:
        states, scales = (keys.to(dtype), values.to(dtype)), {}
    expected = recattn.lrea_absorbed_attention(
        targets, *states, torch.tensor([3, 0, 0, 1]), offsets, negative_slope=0.2, **scales
    )
    assert out.dtype == target_dtype and torch.equal(out, expected)


def test_gathers_targets_and_meets_the_reference():
    keys, values = random_states(3)
    table = make_table()
    table.put(ids(7, 8, 9), keys, values)
    offsets, item_ids = torch.tensor([0, 3, 5, 6]), torch.tensor([4, 0, 4, 1, 2, 3])

    def serve(targets, keys, values):
        return table.attend(targets, ids(9, 7, 8), offsets, item_ids=item_ids)

    def reference(targets, keys, values):
        slots = torch.tensor([2, 0, 1])
        return recattn.reference.lrea_absorbed_attention(targets, keys, values, slots, offsets, item_ids=item_ids)

    inputs = {"targets": torch.randn(5, H, D), "keys": keys, "values": values}
    assert_matches_reference(serve, reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_item", [False, True])
def test_serves_float32_targets_from_a_table_of_any_dtype(dtype, by_item):
    table = make_table(4, dtype)
    table.put(ids(7, 8, 9), *random_states(3))
    targets, offsets = torch.randn(6, H, D), torch.tensor([0, 3, 5, 6])
    items = {"item_ids": torch.tensor([4, 0, 4, 1, 2, 3])} if by_item else {}
    with table.request(ids(9, 7, 8)) as request:
        out = request.attend(targets, offsets, **items)
        keys, values, *scales = request.tables
        scales = dict(zip(("key_scales", "value_scales"), scales, strict=True))
        if dtype != torch.int8:
            keys, values = keys.float(), values.float()
        expected = recattn.lrea_absorbed_attention(targets, keys, values, request.slots, offsets, **items, **scales)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_puts_a_state(dtype):
    lrea = LREA(D, max_len=9, rank=R, num_heads=H, head_dim=DV)
    state = lrea.export_state(torch.randn(3, 9, D), dtype=dtype)
    by_state, by_tensors = make_table(4, dtype), make_table(4, dtype)
    by_state.put(ids(1, 2, 3), state)
    by_tensors.put(ids(1, 2, 3), *state[:4])
    for actual, expected in zip(by_state.state_dict().values(), by_tensors.state_dict().values(), strict=True):
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="values must be None beside a state, which has it, got both"):
        by_state.put(ids(1, 2, 3), state, state.values)
    with pytest.raises(ValueError, match=r"keys must be \[U, H, r, d\] = \[2, 2, 4, 8\], got \[3, 2, 4, 8\]"):
        by_state.put(ids(1, 2), state)


def test_attend_builds_no_graph():
    """So the compiled kernel runs, which has no gradient."""
    table = make_table()
    table.put(ids(7, 8), *random_states(2))
    targets, offsets = torch.randn(6, H, D, requires_grad=True), torch.tensor([0, 3, 6])
    assert not table.attend(targets, ids(7, 8), offsets, impl="cpu").requires_grad
    with table.request(ids(7, 8)) as request:
        assert not request.attend(targets, offsets, impl="cpu").requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", DTYPES)
def test_users_who_are_not_there_get_zeros(dtype):
    keys, values = random_states(2)
    table = make_table(2, dtype)
    targets = torch.randn(6, H, D)
    if dtype != torch.int8:
        targets = targets.to(dtype)
    offsets = torch.tensor([0, 2, 3, 6])
    assert not table.attend(targets, ids(1, 2, 3), offsets).any()  # nobody's row in a table that nobody wrote to
    table.put(ids(1, 3), keys, values)
    with table.request(ids(1, 2, 3)) as request:
        assert request.found.tolist() == [True, False, True]
        out = request.attend(targets, offsets)
    assert torch.equal(out[2:3], torch.zeros_like(out[2:3])) and out[:2].all() and out[3:].all()
    alone = table.attend(targets[3:], ids(3), torch.tensor([0, 3]))
    assert torch.equal(out[3:], alone)


def test_counts_what_is_out_of_range():
    table = make_table()
    table.put(ids(7, 8), *random_states(2))
    items, offsets, item_ids = torch.randn(20, H, D), torch.tensor([0, 3, 6]), torch.tensor([0, 5, 19, 4, 4, 0])
    expected = table.attend(items, ids(7, 8), offsets, item_ids=item_ids)
    item_ids[1], item_ids[4], invalid = 20, -1, torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="item_ids must be rows of a table of 20, got 20"):
        table.attend(items, ids(7, 8), offsets, item_ids=item_ids)
    out = table.attend(items, ids(7, 8), offsets, item_ids=item_ids, invalid=invalid)
    assert invalid == 2 and not out[[1, 4]].any()
    assert out[[0, 2, 3, 5]].equal(expected[[0, 2, 3, 5]])


def test_quantized_states_are_taken_as_they_are():
    (keys, key_scales), (values, value_scales) = map(recattn.lrea_quantize, random_states(3))
    table = make_table(4, torch.int8)
    table.put(ids(1, 2, 3), keys, values, key_scales, value_scales)
    saved = table.state_dict()
    order = (saved["user_ids"] - 1).tolist()
    expected = {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}
    for name, state in expected.items():
        assert saved[name].dtype == state.dtype and torch.equal(saved[name], state[order]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_table_is_loaded(dtype):
    table, again = make_table(4, dtype), make_table(3, dtype)
    table.put(ids(-5, 2**40, 3), *random_states(3))
    table.erase(ids(3))
    saved = table.state_dict()
    assert set(saved["user_ids"].tolist()) == {-5, 2**40}
    again.load_state_dict(saved)
    targets, offsets = torch.randn(4, H, D), torch.tensor([0, 2, 4])
    if dtype != torch.int8:
        targets = targets.to(dtype)
    served = [one.attend(targets, ids(2**40, -5), offsets) for one in (table, again)]
    assert served[0].all() and torch.equal(*served)


@pytest.mark.parametrize("dtype", DTYPES)
def test_puts_states_of_any_layout_and_of_a_graph(dtype):
    """float64 with a gradient, broadcast, transposed and overlapping states are stored as their copies are."""
    base = torch.randn(R * D + 2, dtype=torch.float64, requires_grad=True)
    keys = [
        base[: R * D].view(R, D).expand(3, H, R, D),
        base[: R * D].view(D, R).mT.expand(3, H, R, D),
        base.as_strided((3, H, R, D), (1, 0, D, 1)),
    ]
    for given in keys:
        values = torch.randn(DV, R, H, 3).permute(3, 2, 1, 0)
        table, expected = make_table(4, dtype), make_table(4, dtype)
        table.put(ids(1, 2, 3).int(), given, values)
        expected.put(ids(1, 2, 3), given.detach().clone(memory_format=torch.contiguous_format), values.contiguous())
        for name, state in table.state_dict().items():
            assert torch.equal(state, expected.state_dict()[name]) and not state.requires_grad, name


@pytest.mark.parametrize("offset", [0, 1, 16])
@pytest.mark.parametrize("dim", [16, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_puts_many_states_as_they_are(dtype, dim, offset):
    """Rows written in larger units than their dtype, and rows that cannot be."""
    users = 40
    table = StateTable(users + 3, heads=2, rank=3, dim=dim, dtype=dtype)
    flat = torch.randint(-100, 100, (offset + users * 2 * 3 * dim,)).to(dtype)
    states = flat[offset:].view(users, 2, 3, dim)
    scales = (torch.rand(users, 2, 3), torch.rand(users, 2, 3)) if dtype == torch.int8 else ()
    order = torch.randperm(users)
    table.put(order, states, -states, *scales)
    saved = table.state_dict()
    assert torch.equal(saved["keys"], states[order.argsort()[saved["user_ids"]]])
    assert torch.equal(saved["values"], -saved["keys"])


def test_a_user_given_twice_evicts_no_more_than_given_once():
    table = make_table(4)
    table.put(ids(1, 2, 3, 4), *stamped([1, 2, 3, 4]))
    table.put(ids(7, 7, 7, 7), *stamped([5, 6, 7, 8]))
    assert len(table) == 4 and table.stats()["evictions"] == 1
    table = make_table(2)
    table.put(ids(1, 1, 2, 1), *stamped([5, 6, 7, 8]))
    with table.request(ids(1, 2)) as request:
        assert stamps_of(request) == [8, 7]


# Invalid states


def with_entry(x: torch.Tensor, user: int, entry: float) -> torch.Tensor:
    """A copy of x [U, ...] in float64 or, of integers and scales, in its dtype; one entry of a user is another."""
    x = x.double() if x.dim() == 4 and x.is_floating_point() else x.clone()
    x[user].view(-1)[-1] = entry
    return x


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("dtype, entry", [(dtype, entry) for dtype, entries in INVALID.items() for entry in entries])
def test_refuses_states_that_the_table_cannot_hold(dtype, entry, name):
    table = make_table(3, dtype)
    table.put(ids(5, 6, 7), *stamped([1, 2, 3]))
    states = dict(zip(("keys", "values"), random_states(2), strict=True))
    states[name] = with_entry(states[name], 1, entry)
    limit = torch.finfo(torch.float32 if dtype == torch.int8 else dtype).max
    message = f"{name} of user 9 must be finite in the table's {dtype}, so at most {limit:g}, got {entry:g} "
    advice = '(invalid states: 1); mend them, or store such users as missing by put(..., on_invalid="missing")'
    with pytest.raises(ValueError, match=re.escape(message + advice)):
        table.put(ids(5, 9), **states)
    with table.request(ids(5, 6, 7, 9)) as request:
        assert stamps_of(request) == [1, 2, 3, 0]
    assert table.stats()["evictions"] == 0


@pytest.mark.parametrize("name", ["key_scales", "value_scales"])
@pytest.mark.parametrize("entry", [NAN, INF, -INF, -1.0, 2.0**122])
def test_refuses_scales_that_give_no_finite_state(entry, name):
    (keys, key_scales), (values, value_scales) = map(recattn.lrea_quantize, random_states(2))
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    scales[name] = with_entry(scales[name], 0, entry)
    table = make_table(3, torch.int8)
    message = f"{name} of user 5 must be between 0 and 2.67939e+36, got {entry:g} (invalid states: 1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        table.put(ids(5, 9), keys, values, **scales)
    assert len(table) == 0
    assert table.put(ids(5, 9), keys, values, **scales, on_invalid="missing").tolist() == [5]
    assert table.contains(ids(5, 9)).tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_state_of_a_dtype_is_stored(dtype):
    """Sums over a user and over all users overflow, which must not count as invalid."""
    largest = torch.finfo(torch.float32 if dtype == torch.int8 else dtype).max * (1 - 1e-6 * (dtype == torch.int8))
    keys = torch.full((3, H, R, D), largest, dtype=torch.float64)
    table = make_table(3, dtype)
    table.put(ids(1, 2, 3), keys, -keys.new_full((3, H, R, DV), largest))
    saved = table.state_dict()
    stored = saved["keys"].double() * saved["key_scales"].double()[..., None] if dtype == torch.int8 else saved["keys"]
    torch.testing.assert_close(stored.double(), keys, rtol=1e-6, atol=0)


def test_users_of_invalid_states_can_be_stored_as_missing():
    table = make_table(6)
    table.put(ids(1, 2, 3), *stamped([1, 2, 3]))
    keys, values = stamped([11, 12, 13, 14, 15, 16])
    users = ids(1, 2, 2, 9, 9, 8)
    keys = with_entry(with_entry(keys, 1, NAN), 4, INF)  # the first state of 2, which does not count; the last of 9
    values = with_entry(values, 0, -INF)
    with table.request(ids(1)) as before:
        missing = table.put(users, keys, values, on_invalid="missing")
        assert stamps_of(before) == [1]
    assert missing.dtype == torch.int64 and sorted(missing.tolist()) == [1, 9]
    with table.request(ids(1, 2, 3, 8, 9)) as request:
        assert stamps_of(request) == [0, 13, 3, 16, 0]
    assert table.put(ids(4), *stamped([4]), on_invalid="missing").tolist() == []


def test_a_request_keeps_its_tables_while_the_table_grows():
    table = make_table(2)
    table.put(ids(1, 2), *stamped([1, 2]))
    with table.request(ids(1)) as request:
        before = request.tables.keys.data_ptr()
        table.grow(5)
        table.put(ids(1, 3, 4), *stamped([11, 3, 4]))
        assert request.tables.keys.data_ptr() == before and stamps_of(request) == [1]
        with table.request(ids(1, 2, 3, 4, 5)) as later:
            assert later.tables.keys.data_ptr() != before and stamps_of(later) == [11, 2, 3, 4, 0]


def test_a_request_lets_go_after_an_error():
    table = make_table(1)
    table.put(ids(1), *stamped([1]))
    with pytest.raises(KeyError), table.request(ids(1)):
        with pytest.raises(RuntimeError, match="no room for 1 users"):
            table.put(ids(2), *stamped([2]))
        raise KeyError
    table.put(ids(2), *stamped([2]))
    assert table.contains(ids(1, 2)).tolist() == [False, True]


def test_a_request_that_is_over_serves_no_more():
    table = make_table()
    with table.request(ids(1)) as request:
        pass
    with pytest.raises(RuntimeError, match="this request is over"):
        request.attend(torch.randn(1, H, D), torch.tensor([0, 1]))


def test_a_put_that_fails_gives_its_rows_back(monkeypatch):
    table = make_table(1)
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table.put(ids(1), *stamped([1]))
    monkeypatch.undo()
    assert not table.contains(ids(1)).any()
    table.put(ids(2), *stamped([2]))
    assert len(table) == 1


def test_empty_batches():
    table = make_table()
    table.put(ids(), *random_states(0))
    assert table.erase(ids()) == 0 and table.contains(ids()).shape == (0,)
    assert table.attend(torch.empty(0, H, D), ids(), torch.tensor([0])).shape == (0, H, DV)


@pytest.mark.parametrize("dtype, per_row", [(torch.float32, 4 * (D + DV)), (torch.int8, D + DV + 2 * 4)])
def test_nbytes(dtype, per_row):
    assert make_table(10, dtype).nbytes == 11 * H * R * per_row


@pytest.mark.parametrize(
    "change, message",
    [
        ({"user_ids": torch.tensor([1.0, 2.0])}, "user_ids must be int64 or int32, got float32"),
        ({"user_ids": torch.tensor([[1, 2]])}, r"user_ids must be \[U\], got \[1, 2\]"),
        ({"keys": {}}, "keys must be a torch.Tensor or an LREAState, got dict"),
        ({"values": None}, "values must be a torch.Tensor, got NoneType"),
        ({"user_ids": [1, 2]}, "user_ids must be a torch.Tensor, got list"),
        ({"user_ids": torch.empty(2, dtype=torch.int64, device="meta")}, "user_ids must be on the CPU, got meta"),
        ({"user_ids": ids(1)}, r"keys must be \[U, H, r, d\] = \[1, 2, 4, 8\], got \[2, 2, 4, 8\]"),
        ({"keys": torch.zeros(2, H, R, D + 1)}, r"keys must be \[U, H, r, d\] = \[2, 2, 4, 8\], got \[2, 2, 4, 9\]"),
        ({"values": torch.zeros(2, H, R, D)}, r"values must be \[U, H, r, dv\] = \[2, 2, 4, 12\], got \[2, 2, 4, 8\]"),
        ({"keys": torch.zeros(2, H, R, D, dtype=torch.int8)}, "keys must be float64 or float32 .* got int8"),
        ({"values": torch.zeros(2, H, R, DV).int()}, "values must be float64 or float32 .* got int32"),
        ({"key_scales": torch.zeros(2, H, R)}, "key_scales must be None"),
        ({"on_invalid": "skip"}, "on_invalid must be 'raise' or 'missing', got 'skip'"),
    ],
)
def test_refuses_to_put(change, message):
    table = make_table()
    keys, values = random_states(2)
    with pytest.raises(ValueError, match=message):
        table.put(**{"user_ids": ids(1, 2), "keys": keys, "values": values, **change})
    assert len(table) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key_scales": None}, "key_scales must be a torch.Tensor, got NoneType"),
        ({"value_scales": torch.zeros(2, H)}, r"value_scales must be \[U, H, r\] = \[2, 2, 4\], got \[2, 2\]"),
        ({"key_scales": torch.zeros(2, H, R).half()}, "key_scales must be float32, got float16"),
        ({"values": torch.zeros(2, H, R, DV)}, "values must be int8, got float32"),
        ({"keys": torch.zeros(2, H, R, D)}, "values must be float64 .* got int8"),
    ],
)
def test_refuses_to_put_quantized(change, message):
    (keys, key_scales), (values, value_scales) = map(recattn.lrea_quantize, random_states(2))
    states = {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}
    with pytest.raises(ValueError, match=message):
        make_table(4, torch.int8).put(ids(1, 2), **{**states, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"capacity": 0}, "capacity must be a positive integer, got 0"),
        ({"rank": -4}, "rank must be a positive integer, got -4"),
        ({"dim": 8.0}, "dim must be a positive integer, got 8.0"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, .* got torch.float64"),
    ],
)
def test_refuses_other_tables(change, message):
    with pytest.raises(ValueError, match=message):
        StateTable(**{"capacity": 4, "heads": H, "rank": R, "dim": D, **change})


def test_does_not_shrink():
    table = make_table(4)
    with pytest.raises(ValueError, match="capacity must be at least 4, got 3"):
        table.grow(3)


# Without waiting for a device


class Copies(TorchDispatchMode):
    """Tensors that are copied, and whether the host waits."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            is_copy = func is torch.ops.aten.copy_.default
            non_blocking = args[2] if is_copy and len(args) > 2 else kwargs.get("non_blocking", False)
            self.made.append((args[is_copy].data_ptr(), non_blocking))
        return func(*args, **kwargs)


@pytest.mark.parametrize("given", [False, True])
def test_slots_go_to_a_device_from_pinned_memory_without_waiting(given, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    table = make_table(device="meta")
    out = torch.empty(2, dtype=torch.int64, device="meta") if given else None
    with Copies() as copies, table.request(ids(1, 2), out=out) as request:
        assert request.slots.device.type == "meta" and (request.slots is out or not given)
    assert len(pinned) == 1 and pinned[0].tolist() == [4, 4]
    assert copies.made == [(pinned[0].data_ptr(), True)]


def test_slots_can_be_written_to_a_given_tensor():
    table = make_table()
    table.put(ids(1, 2), *stamped([1, 2]))
    out = torch.full((3,), -1)
    with table.request(ids(2, 9, 1), out=out) as request:
        assert request.slots is out and stamps_of(request) == [2, 0, 1]
    targets, offsets = torch.randn(3, H, D), torch.tensor([0, 1, 2, 3])
    with table.request(ids(1, 1, 2), out=out) as request:
        assert request.attend(targets, offsets).equal(table.attend(targets, ids(1, 1, 2), offsets))


@pytest.mark.parametrize(
    "out, message",
    [
        ([0, 0], "out must be a torch.Tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), r"out must be \[U\] = \[2\], got \[3\]"),
        (torch.zeros(2, dtype=torch.int32), "out must be int64, got int32"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "out must be on cpu, got meta"),
    ],
)
def test_refuses_to_write_slots(out, message):
    table = make_table(1)
    table.put(ids(1), *stamped([1]))
    with pytest.raises(ValueError, match=message), table.request(ids(1, 1), out=out):
        pass
    table.put(ids(2), *stamped([2]))  # no row is pinned


@pytest.mark.gpu
def test_a_request_does_not_wait_for_a_gpu_and_a_graph_reads_its_slots():
    keys, values = random_states(3)
    table = make_table(3, device="cuda")
    table.put(ids(1, 2, 3), keys, values)
    targets, offsets = torch.randn(3, H, D, device="cuda"), torch.tensor([0, 1, 2, 3], device="cuda")
    slots = torch.empty(3, dtype=torch.int64, device="cuda")
    expected = table.attend(targets, ids(3, 9, 1), offsets)
    graph = torch.cuda.CUDAGraph()
    with table.request(ids(1, 2, 3), out=slots) as request, torch.cuda.graph(graph):
        out = request.attend(targets, offsets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert table.attend(targets, ids(3, 9, 1), offsets).shape == expected.shape
        with table.request(ids(3, 9, 1), out=slots):
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_serves_from_a_gpu(dtype):
    """As from the CPU: after growth, with duplicates, an invalid state and an unknown user."""
    keys, values = random_states(3)
    target_dtype = torch.float32 if dtype == torch.int8 else dtype
    targets, offsets = torch.randn(7, H, D).to(target_dtype), torch.tensor([0, 3, 4, 7])
    outputs = []
    for device in ("cpu", "cuda"):
        table = make_table(3, dtype, device)
        table.put(ids(1, 2, 3), keys, values)
        table.grow(5)
        missing = table.put(ids(2, 3, 3), with_entry(keys, 0, NAN), values, on_invalid="missing")
        assert missing.tolist() == [2]
        with pytest.raises(ValueError, match=r"keys of user 2 must be finite .*, got nan"):
            table.put(ids(2), with_entry(keys, 0, NAN)[:1], values[:1])
        outputs.append(table.attend(targets.to(device), ids(3, 9, 1), offsets.to(device)).cpu())
        assert table.state_dict()["keys"].device.type == "cpu"
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not outputs[1][3].any()

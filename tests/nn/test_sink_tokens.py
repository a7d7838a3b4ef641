"""Sink tokens: their embeddings, the ids that they show, and where they are inserted."""

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import nn

from recattn.nn.sink_tokens import (
    SinkTokenEmbedding,
    at_sinks,
    insert_sink_embeddings,
    insert_sinks,
    replace_sink_embeddings,
)
from recattn.nn.sink_training import SinkPooling
from recattn.testing import assert_matches_reference

SINK, PAD = 99, 0
HIDDEN = 6


# --- SinkTokenEmbedding ---


def embedding(signal="temporal", **options):
    return SinkTokenEmbedding(HIDDEN, signal, dtype=torch.float64, **options)


def test_default_is_the_official_code():
    module = SinkTokenEmbedding(HIDDEN)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "tables.temporal.weight": (100, 256),
        "mlp.0.weight": (HIDDEN, 256),
        "mlp.0.bias": (HIDDEN,),
    }
    ids = torch.tensor([[0, 7, 99], [250, 3, 0]])
    rows = module.tables["temporal"].weight[torch.tensor([[0, 7, 99], [99, 3, 0]])]
    torch.testing.assert_close(module(ids), rows @ module.mlp[0].weight.T + module.mlp[0].bias)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("signal", ["temporal", "similarity", "both", "none"])
def test_embedding_by_hand(signal, depth):
    module = embedding(signal, depth=depth, num_ids=5, embedding_dim=4)
    names = {"both": ["temporal", "similarity"]}.get(signal, [signal])
    assert list(module.tables) == names
    ids = [torch.tensor([[0, 4, -1], [2, 1, 3]]), torch.tensor([[3, 9, -1], [0, 0, 1]])][: len(names)]
    actual = module(*ids)
    linears = [layer for layer in module.mlp if isinstance(layer, nn.Linear)]
    assert len(linears) == depth
    for b, m in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        x = sum(
            module.tables[s].weight[0 if signal == "none" else min(int(i[b, m]), 4)]
            for s, i in zip(names, ids, strict=True)
        )
        for n, linear in enumerate(linears):
            x = linear.weight @ (nn.functional.gelu(x) if n else x) + linear.bias
        torch.testing.assert_close(actual[b, m], x, atol=1e-12, rtol=0)
    assert torch.equal(actual[0, 2], torch.zeros(HIDDEN, dtype=torch.float64))
    gradients = torch.autograd.grad(actual[0, 2].sum(), list(module.parameters()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_sinks_without_a_signal_are_all_alike():
    module = embedding("none")
    assert module.tables["none"].weight.shape == (1, 256)
    out = module(torch.tensor([[3, 50, 7]]))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_reset_parameters_draws_anew():
    module = embedding("both", depth=2)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    module.reset_parameters()
    assert all(not torch.equal(p, before[name]) for name, p in module.state_dict().items())
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    fresh = embedding("both", depth=2)
    assert all(torch.equal(p, fresh.state_dict()[name]) for name, p in module.state_dict().items())


def test_embedding_options_show_and_are_checked():
    assert "signal='both', num_ids=100, embedding_dim=256, depth=2" in repr(SinkTokenEmbedding(8, "both", depth=2))
    assert SinkTokenEmbedding(8, dtype=torch.bfloat16)(torch.tensor([[1]])).dtype == torch.bfloat16
    assert next(SinkTokenEmbedding(8, device="meta").parameters()).device.type == "meta"
    for options, message in (
        ({"signal": "time"}, "signal must be 'temporal' or 'similarity' or 'both' or 'none', got 'time'"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_ids": 0}, "num_ids must be at least 1, got 0"),
        ({"max_age": 0}, "max_age must be above 0 and finite, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SinkTokenEmbedding(8, **options)
    with pytest.raises(ValueError, match="ids must be one tensor for each signal, temporal and similarity, got 1"):
        embedding("both")(torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"similarity ids must be \[B, M\] = \[1, 2\], got \[1, 3\]"):
        embedding("both")(torch.ones(1, 2).long(), torch.ones(1, 3).long())
    with pytest.raises(ValueError, match="temporal ids must be int64 or int32, got float32"):
        embedding()(torch.ones(1, 2))


def test_low_precision_embedding():
    module = SinkTokenEmbedding(HIDDEN, depth=2, dtype=torch.bfloat16)
    ids = torch.randint(-1, 100, (4, 7))

    def call(**parameters):
        return torch.func.functional_call(module, parameters, (ids,))

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    assert_matches_reference(call, call, parameters, grads=[*parameters])


# --- Ids ---


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
@pytest.mark.parametrize("given", [True, False])
def test_time_ids_by_hand(dtype, given):
    module = embedding(num_ids=20, max_age=1000)
    timestamps = torch.tensor([[0, 500, 998, 999, 1000], [7, 7, 3, -5, 9], [4, 4, 4, 4, 4]], dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    now = torch.tensor([2000, 10, 5], dtype=dtype) if given else None
    actual = module.time_ids(timestamps, mask, now=now)
    for b, latest in enumerate([2000, 10, 5] if given else [1000, 7, None]):
        for j in range(5):
            expected = -1
            if mask[b, j]:
                age = min(latest - int(timestamps[b, j]), 1000)
                expected = math.floor(19 * math.log(1 + age) / math.log(1001))
            assert actual[b, j] == expected
    assert actual[0].tolist() == sorted(actual[0].tolist(), reverse=True) and actual.dtype == torch.int64
    assert actual[0, 0] == 19


def test_buckets_of_time_grow_geometrically():
    module = embedding()
    ages = torch.arange(1, 2_000_000)
    ids = module.time_ids(2_000_000 - ages[None], now=torch.tensor([2_000_000]))[0]
    first = [int(ages[ids == i][0]) for i in range(40, 70)]
    ratios = [b / a for a, b in pairwise(first)]
    assert max(abs(r - (1 + module.max_age) ** (1 / 99)) for r in ratios) < 0.01
    assert ids[0] == 3 and ids.diff().min() == 0


def test_similarity_ids_by_hand():
    module = embedding("similarity")
    s = torch.randn(3, 6, dtype=torch.float64)
    s[1, 4:] = torch.nan
    s[2] = 0.3
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    actual = module.similarity_ids(s, mask)
    for b in range(3):
        valid = s[b][mask[b]].tolist()
        low, high = min(valid), max(valid)
        ids = [0 if low == high else math.floor((x - low) / (high - low) * 99) for x in valid]
        assert actual[b].tolist() == ids + [-1] * (6 - len(valid))
    assert actual[0].min() == 0 and actual[0].max() == 99 and actual[2].tolist() == [0] * 6
    assert module.similarity_ids(s[:, :0]).shape == module.time_ids(s[:, :0]).shape == (3, 0)
    nobody = module.similarity_ids(s, torch.zeros(3, 6, dtype=torch.int64))
    assert torch.equal(nobody, torch.full((3, 6), -1))


INT64 = torch.iinfo(torch.int64)
INT32 = torch.iinfo(torch.int32)


@pytest.mark.parametrize(
    "dtype, earliest, latest",
    [
        (torch.int64, INT64.min, INT64.max),
        (torch.int64, INT64.min, 0),
        (torch.int64, -1, INT64.max),
        (torch.int64, INT64.max - 3, INT64.max),
        (torch.int64, 2**53, 2**53 + 1),
        (torch.int32, INT32.min, INT32.max),
        (torch.float64, -1.7e308, 1.7e308),
        (torch.float32, -3e38, 3e38),
    ],
)
def test_ages_that_no_integer_holds(dtype, earliest, latest):
    module = embedding(num_ids=40, max_age=1e30)
    for now in (None, torch.tensor([latest], dtype=dtype)):
        actual = module.time_ids(torch.tensor([[earliest, latest]], dtype=dtype), now=now)
        age = min(latest - earliest, 1e30)
        assert actual.tolist() == [[math.floor(39 * math.log1p(age) / math.log1p(1e30)), 0]]


@pytest.mark.parametrize(
    "timestamp, now", [(INT64.max, INT64.min), (0, INT64.min), (INT64.max, -2), (INT64.max, INT64.max - 1)]
)
def test_a_behaviour_after_now_is_named_by_its_own_numbers(timestamp, now):
    message = rf"got now\[0\] = {now} and timestamps\[0, 1\] = {timestamp}"
    with pytest.raises(ValueError, match=message):
        embedding().time_ids(torch.tensor([[now, timestamp]]), now=torch.tensor([now]))


def test_similarities_whose_difference_overflows():
    module = embedding("similarity")
    assert module.similarity_ids(torch.tensor([[-1.7e308, 0, 1.7e308]], dtype=torch.float64)).tolist() == [[0, 49, 99]]


def test_wrong_signals_are_refused():
    module = embedding()
    timestamps = torch.tensor([[5.0, 3.0]])
    with pytest.raises(ValueError, match=r"now must be .*, got now\[0\] = 4.0 and timestamps\[0, 0\] = 5.0"):
        module.time_ids(timestamps, now=torch.tensor([4.0]))
    with pytest.raises(ValueError, match=r"now must be .*, got now\[0\] = nan and timestamps\[0, 0\] = 5.0"):
        module.time_ids(timestamps, now=torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match=r"now must be \[B\] = \[1\], got \[2\]"):
        module.time_ids(timestamps, now=torch.tensor([9.0, 9.0]))
    with pytest.raises(ValueError, match="now must be float32, got int64"):
        module.time_ids(timestamps, now=torch.tensor([9]))
    with pytest.raises(ValueError, match="timestamps must be finite where there is a behaviour, got inf"):
        module.time_ids(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(ValueError, match=r"mask must be \[B, k\] = \[1, 2\], got \[2, 2\]"):
        module.similarity_ids(timestamps, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be 0 or 1, got 2"):
        module.similarity_ids(timestamps, torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="similarities must be float64 or float32 or bfloat16 or float16, got bool"):
        module.similarity_ids(timestamps > 4)
    with pytest.raises(ValueError, match="timestamps must be int64 or int32 or float64 or float32, got bfloat16"):
        module.time_ids(timestamps.bfloat16())


# --- insert_sinks ---


def test_rows_of_token_ids():
    behaviors = [[[1, 2], [3], [4, 5]], [torch.tensor([6])], []]
    tokens = insert_sinks(behaviors, SINK, prefix_ids=[7], suffix_ids=[[8], [], [8, 9]])
    assert tokens.input_ids.tolist() == [
        [7, 1, 2, SINK, 3, SINK, 4, 5, 8],
        [7, 6] + [PAD] * 7,
        [7, 8, 9] + [PAD] * 6,
    ]
    assert tokens.attention_mask.tolist() == [[1] * 9, [1] * 2 + [0] * 7, [1] * 3 + [0] * 6]
    assert tokens.sink_positions.tolist() == [[3, 5], [-1, -1], [-1, -1]]
    assert tokens.sink_behaviors.tolist() == [[0, 1], [-1, -1], [-1, -1]]
    assert {x.dtype for x in tokens} == {torch.int64}


def test_left_padding_and_a_sink_after_the_last():
    behaviors = [[[1, 2], [3]], [[4]]]
    tokens = insert_sinks(behaviors, SINK, after_last=True, padding_side="left", pad_token_id=55)
    assert tokens.input_ids.tolist() == [[1, 2, SINK, 3, SINK], [55, 55, 55, 4, SINK]]
    assert tokens.attention_mask.tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    assert tokens.sink_positions.tolist() == [[2, 4], [4, -1]]
    assert tokens.sink_behaviors.tolist() == [[0, 1], [0, -1]]


@pytest.mark.parametrize("max_length", [3, 4, 5, 6, 7, 9, 30])
@pytest.mark.parametrize("after_last", [True, False])
def test_the_oldest_behaviours_are_left_out_whole(max_length, after_last):
    behaviors = [[[10, 11], [20], [30, 31, 32], [40]], [[50] * 40], [[60], [70]]]
    tokens = insert_sinks(
        behaviors, SINK, prefix_ids=[1, 2], suffix_ids=[3], max_length=max_length, after_last=after_last
    )
    for b, history in enumerate(behaviors):
        # The longest row of the last behaviours that fits.
        for first in range(len(history) + 1):
            kept = history[first:]
            row, sinks = [1, 2], []
            for j, ids in enumerate(kept):
                row += ids
                if after_last or j < len(kept) - 1:
                    sinks.append(len(row))
                    row.append(SINK)
            row.append(3)
            if len(row) <= max_length:
                break
        count = len(sinks)
        assert tokens.input_ids[b][tokens.attention_mask[b].bool()].tolist() == row
        assert tokens.sink_positions[b].tolist() == sinks + [-1] * (tokens.sink_positions.shape[1] - count)
        assert tokens.sink_behaviors[b, :count].tolist() == list(range(first, first + count))
        assert (tokens.sink_behaviors[b, count:] == -1).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_sinks_stand_where_the_positions_say(side):
    generator = random.Random(0)
    behaviors = [
        [[generator.randrange(1, 90) for _ in range(generator.randrange(0, 5))] for _ in range(generator.randrange(9))]
        for _ in range(20)
    ]
    tokens = insert_sinks(behaviors, SINK, max_length=17, padding_side=side)
    for b in range(20):
        at = tokens.sink_positions[b][tokens.sink_positions[b] >= 0]
        assert at.tolist() == (tokens.input_ids[b] == SINK).nonzero()[:, 0].tolist()
        for position, j in zip(at.tolist(), tokens.sink_behaviors[b].tolist(), strict=False):
            ids = behaviors[b][j]
            assert tokens.input_ids[b, position - len(ids) : position].tolist() == ids


def test_ids_of_the_behaviours_that_sinks_follow():
    tokens = insert_sinks([[[1]] * 4, [[2]] * 2], SINK, max_length=5)
    assert tokens.sink_behaviors.tolist() == [[1, 2], [0, -1]]
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, -1, -1]])
    assert at_sinks(ids, tokens.sink_behaviors).tolist() == [[6, 7], [9, -1]]
    with pytest.raises(ValueError, match=r"or -1 for padding, got 2 at \[0, 1\] beside 2 behaviours"):
        at_sinks(ids[:, :2], tokens.sink_behaviors)
    with pytest.raises(ValueError, match="sink_behaviors must be behaviours of values, or -1 for padding, got -5"):
        at_sinks(ids, torch.full((2, 2), -5))


def test_wrong_behaviours_are_refused():
    for behaviors, message in (
        ([], "behaviors must be at least one row, got none"),
        ([["ab"]], r"behaviors\[0\]\[0\] must be a list or 1-D tensor of token ids, got 'ab'"),
        ([[[1.5]]], r"behaviors\[0\]\[0\] must be a list or 1-D tensor of token ids, got \[1\.5\]"),
        ([[1, 2]], r"behaviors\[0\]\[0\] must be a list or 1-D tensor of token ids, got 1"),
        ([5], r"behaviors\[0\] must be a list of behaviours, got int"),
        ([[torch.ones(2)]], r"behaviors\[0\]\[0\] must be .*, got \[2\] of torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            insert_sinks(behaviors, SINK)
    with pytest.raises(ValueError, match="max_length must be at least the 3 of prefix and suffix, got 2"):
        insert_sinks([[[1]]], SINK, prefix_ids=[1, 2], suffix_ids=[3], max_length=2)
    with pytest.raises(ValueError, match="sink_token_id 99 must be at the 1 sinks of row 1 only, got 2"):
        insert_sinks([[[1]], [[1, SINK], [2]]], SINK)
    with pytest.raises(ValueError, match="suffix_ids must be one list of token ids, or 1, got 2"):
        insert_sinks([[[1]]], SINK, suffix_ids=[[1], [2]])
    with pytest.raises(ValueError, match="padding_side must be 'right' or 'left', got 'up'"):
        insert_sinks([[[1]]], SINK, padding_side="up")


# --- insert_sink_embeddings ---


def rows_by_hand(behaviors, sinks, lengths, after_last):
    """For each row its vectors, the positions of its sinks, and the behaviours that they follow."""
    for b, row in enumerate(lengths):
        present = [j for j, n in enumerate(row) if n > 0]
        vectors, positions, followed = [], [], []
        for j in present:
            vectors += list(behaviors[b, j, : row[j]])
            if after_last or j != present[-1]:
                positions.append(len(vectors))
                followed.append(j)
                vectors.append(sinks[b, j])
        yield vectors, positions, followed


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("after_last", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_embeddings_and_their_gradients(whole, after_last, side):
    batch, k, t, d = 5, 4, 3, 2
    behaviors = torch.randn(batch, k, t, d, dtype=torch.float64)
    lengths = torch.tensor([[3, 1, 2, 3], [2, 0, 0, 0], [0, 0, 0, 0], [0, 2, 0, 1], [1, 1, 1, 0]])
    given = lengths
    if whole:
        behaviors, given = behaviors[:, :, :1], torch.tensor([4, 1, 0, 2, 3])
        lengths = (torch.arange(k) < given[:, None]).long()
    behaviors[torch.arange(behaviors.shape[2]) >= lengths[..., None]] = torch.nan
    behaviors.requires_grad_()
    sinks = torch.randn(batch, k, d, dtype=torch.float64, requires_grad=True)
    actual = insert_sink_embeddings(
        behaviors[:, :, 0] if whole else behaviors, sinks, given, after_last=after_last, padding_side=side
    )
    rows = list(rows_by_hand(behaviors, sinks, lengths.tolist(), after_last))
    n = max(len(vectors) for vectors, _, _ in rows)
    assert actual.embeddings.shape == (batch, n, d)
    weights = torch.randn(batch, n, d, dtype=torch.float64)
    loss = 0
    for b, (vectors, positions, followed) in enumerate(rows):
        first = n - len(vectors) if side == "left" else 0
        mask = torch.zeros(n, dtype=torch.int64)
        mask[first : first + len(vectors)] = 1
        assert torch.equal(actual.attention_mask[b], mask)
        assert torch.equal(actual.embeddings[b][mask == 0], torch.zeros(n - len(vectors), d, dtype=torch.float64))
        padding = [-1] * (actual.sink_positions.shape[1] - len(positions))
        assert actual.sink_positions[b].tolist() == [first + p for p in positions] + padding
        assert actual.sink_behaviors[b].tolist() == followed + padding
        if vectors:
            expected = torch.stack(vectors)
            assert torch.equal(actual.embeddings[b, first : first + len(vectors)], expected)
            loss = loss + (expected * weights[b, first : first + len(vectors)]).sum()
    leaves = [behaviors, sinks]
    losses = (actual.embeddings * weights).sum(), loss
    for mine, other in zip(*(torch.autograd.grad(x, leaves) for x in losses), strict=True):
        assert torch.equal(mine, other)


def test_embeddings_of_rows_that_are_full():
    behaviors, sinks = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    actual = insert_sink_embeddings(behaviors, sinks)
    expected = torch.stack([behaviors, sinks], dim=2).flatten(1, 2)[:, :-1]
    assert torch.equal(actual.embeddings, expected) and actual.attention_mask.all()
    assert actual.sink_positions.tolist() == [[1, 3]] * 2
    empty = insert_sink_embeddings(behaviors[:, :0], sinks[:, :0])
    assert empty.embeddings.shape == (2, 0, 4) and empty.sink_positions.shape == (2, 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_both_forms_agree(side):
    """Embedding tokens and replacing the sinks equals inserting sinks into embedded behaviours."""
    behaviors = [[[1, 2], [3], [4, 5, 6]], [[7], [8, 9]], [[10]]]
    table = nn.Embedding(100, HIDDEN, dtype=torch.float64)
    sinks = embedding("similarity")(torch.tensor([[1, 2, 3], [4, 5, -1], [6, -1, -1]]))
    tokens = insert_sinks(behaviors, SINK, padding_side=side)
    followed = tokens.sink_behaviors.clamp(min=0)[..., None].expand(-1, -1, HIDDEN)
    replaced = replace_sink_embeddings(table(tokens.input_ids), tokens.sink_positions, sinks.gather(1, followed))
    ids = torch.zeros(3, 3, 3, dtype=torch.int64)
    lengths = torch.zeros(3, 3, dtype=torch.int64)
    for b, history in enumerate(behaviors):
        for j, b_ids in enumerate(history):
            ids[b, j, : len(b_ids)], lengths[b, j] = torch.tensor(b_ids), len(b_ids)
    inserted = insert_sink_embeddings(table(ids), sinks, lengths, padding_side=side)
    valid = tokens.attention_mask.bool()
    assert torch.equal(replaced[valid], inserted.embeddings[valid])
    for mine, other in zip(tokens[1:], inserted[1:], strict=True):
        assert torch.equal(mine, other)


def test_wrong_embeddings_are_refused():
    behaviors, sinks = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for arguments, message in (
        ((behaviors[0], sinks), r"behaviors must be \[B, k, t, d\]"),
        ((behaviors, sinks[:, 1:]), r"sinks must be \[B, k, d\] = \[2, 3, 4\], got \[2, 2, 4\]"),
        ((behaviors, sinks, torch.tensor([1, 4])), "lengths must be between 0 and 3, got 4"),
        ((behaviors, sinks, torch.ones(2, 3).long()), r"lengths must be \[B\] = \[2\], got \[2, 3\]"),
        ((behaviors[:, :, None], sinks, torch.tensor([[1, 2, 0]] * 2)), "lengths must be between 0 and 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            insert_sink_embeddings(*arguments)


# --- replace_sink_embeddings ---


def test_replacement_and_its_gradients():
    inputs_embeds = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 3, 6], [2, -1, -1], [-1, -1, -1]])
    before = inputs_embeds.detach().clone()
    actual = replace_sink_embeddings(inputs_embeds, positions, sinks)
    expected = [list(row) for row in inputs_embeds]
    for b, m in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        expected[b][positions[b, m]] = sinks[b, m]
    expected = torch.stack([torch.stack(row) for row in expected])
    assert torch.equal(actual, expected) and torch.equal(inputs_embeds, before)
    incoming, leaves = torch.randn_like(actual), [inputs_embeds, sinks]
    for mine, other in zip(*(torch.autograd.grad(x, leaves, incoming) for x in (actual, expected)), strict=True):
        assert torch.equal(mine, other)


def test_replacement_keeps_the_dtype():
    out = replace_sink_embeddings(torch.zeros(1, 3, 2).bfloat16(), torch.tensor([[1]]), torch.full((1, 1, 2), 1.001))
    assert out.dtype == torch.bfloat16 and out[0].tolist() == [[0, 0], [1, 1], [0, 0]]
    nothing = torch.randn(2, 3, 2)
    assert torch.equal(replace_sink_embeddings(nothing, torch.empty(2, 0).long(), torch.empty(2, 0, 2)), nothing)


def test_wrong_replacements_are_refused():
    inputs_embeds = torch.randn(1, 3, 2)
    with pytest.raises(ValueError, match="sink_positions must be below the sequence length 3, got 3"):
        replace_sink_embeddings(inputs_embeds, torch.tensor([[3]]), torch.randn(1, 1, 2))
    with pytest.raises(ValueError, match="sink_positions must be strictly ascending"):
        replace_sink_embeddings(inputs_embeds, torch.tensor([[1, 1]]), torch.randn(1, 2, 2))
    with pytest.raises(ValueError, match=r"sinks must be \[B, M, d\] = \[1, 1, 2\], got \[1, 2, 2\]"):
        replace_sink_embeddings(inputs_embeds, torch.tensor([[1]]), torch.randn(1, 2, 2))


def test_replacement_and_embedding_compile_to_one_graph_for_all_sizes():
    module = SinkTokenEmbedding(HIDDEN, "both")

    def call(inputs_embeds, positions, temporal, similarity):
        embeds = replace_sink_embeddings(inputs_embeds, positions, module(temporal, similarity))
        return SinkPooling("sinks")(embeds, sink_positions=positions)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, n in ((2, 9), (3, 12)):
            inputs_embeds = torch.randn(batch, n, HIDDEN, requires_grad=True)
            positions = torch.tensor([[1, 4, -1]]).repeat(batch, 1)
            ids = [torch.randint(-1, 100, (batch, 3)) for _ in range(2)]
            results = []
            for function in (call, compiled):
                out = function(inputs_embeds, positions, *ids)
                results.append([out, *torch.autograd.grad(out.square().sum(), [inputs_embeds, *module.parameters()])])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager)

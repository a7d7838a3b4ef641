"""The [SINK] tokens of CTR-Sink (arXiv 2508.03668): their embeddings and their insertion into histories."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recattn._check import (
    FLOATING,
    INTEGER,
    expect,
    expect_choice,
    expect_dtype,
    expect_index,
    expect_same_device,
    expect_shape,
    expect_tensors,
)
from recattn._gather import gather_rows
from recattn._typing import PaddingSide, Signal
from recattn.functional.validation import checked_indices, expect_values, values_are_checked
from recattn.nn._constructor_checks import expect_positive
from recattn.nn._masks import read_mask
from recattn.ops.index_checks import checked_lengths
from recattn.reference.sink_attention import valid_tokens, window_starts

TokenIds = Sequence[int] | Tensor
TEN_YEARS = 10 * 365 * 24 * 3600
TABLES: dict[Signal, tuple[str, ...]] = {
    "temporal": ("temporal",),
    "similarity": ("similarity",),
    "both": ("temporal", "similarity"),
    "none": ("none",),
}


class SinkTokens(NamedTuple):
    """Token ids with sinks inserted; the result of `insert_sinks`."""

    input_ids: Tensor  # [B, N] int64
    attention_mask: Tensor  # [B, N] int64, 0 at padding
    sink_positions: Tensor  # [B, M] int64, padded with -1
    sink_behaviors: Tensor  # [B, M] int64, index of the behaviour that a sink follows; padded with -1


class SinkEmbeddings(NamedTuple):
    """Embeddings with sinks inserted; the result of `insert_sink_embeddings`."""

    embeddings: Tensor  # [B, N, d], 0 at padding
    attention_mask: Tensor  # [B, N] int64, 0 at padding
    sink_positions: Tensor  # [B, M] int64, padded with -1
    sink_behaviors: Tensor  # [B, M] int64, index of the behaviour that a sink follows; padded with -1


class _Table(nn.Embedding):
    """nn.Embedding whose gradient is summed in float32, as a batch has few distinct ids, each many times."""

    def forward(self, ids: Tensor) -> Tensor:
        return gather_rows(self.weight, ids)


class SinkTokenEmbedding(nn.Module):
    """The embedding of a [SINK] token, computed from signals about the behaviour before it:

        e = MLP(Σ_s Embed_s(id_s))        MLP: `depth` linear maps with GELU between them

    The sum is over the signals s. CTR-Sink's official code has one signal, a table of 100 × 256 and one linear map; its
    temporal id is the index of the behaviour in its list. More depth, ids from real time (`time_ids`) and the sum of
    two signals are ours.

    Args:
        hidden_size: width of the embeddings.
        signal: "temporal" or "similarity" (one table), "both" (two), or "none" (one learned vector for all sinks).
        num_ids: rows of a table.
        embedding_dim: columns of a table.
        depth: number of linear maps; all but the last keep embedding_dim.
        max_age: age at which the last bucket of `time_ids` begins, in the unit of the timestamps; ten years in seconds
            by default.
    """

    def __init__(
        self,
        hidden_size: int,
        signal: Signal = "temporal",
        *,
        num_ids: int = 100,
        embedding_dim: int = 256,
        depth: int = 1,
        max_age: float = TEN_YEARS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_choice("signal", signal, tuple(TABLES))
        expect_positive(hidden_size=hidden_size, num_ids=num_ids, embedding_dim=embedding_dim, depth=depth)
        expect(0 < max_age < math.inf, "max_age", "above 0 and finite", max_age)
        self.hidden_size, self.signal, self.num_ids = hidden_size, signal, num_ids
        self.embedding_dim, self.depth, self.max_age = embedding_dim, depth, max_age

        options = {"device": device, "dtype": dtype}
        rows = 1 if signal == "none" else num_ids
        self.tables = nn.ModuleDict({name: _Table(rows, embedding_dim, **options) for name in TABLES[signal]})
        self.mlp = nn.Sequential()
        for _ in range(depth - 1):
            self.mlp.extend([nn.Linear(embedding_dim, embedding_dim, **options), nn.GELU()])
        self.mlp.append(nn.Linear(embedding_dim, hidden_size, **options))

    def reset_parameters(self) -> None:
        """The defaults of nn.Embedding and nn.Linear."""
        for module in (*self.tables.values(), *self.mlp):
            if isinstance(module, nn.Embedding | nn.Linear):
                module.reset_parameters()

    def forward(self, *ids: Tensor) -> Tensor:
        """
        Args:
            ids: [B, M] integers, one tensor per signal ("both": temporal ids, then similarity ids; "none": any ids, of
                which only the shape and the padding are used). -1 is padding. Ids beyond the table are clipped to its
                last row, as in the official code.

        Returns:
            [B, M, hidden_size], 0 at padding.

        Raises:
            ValueError: the number, shape, dtype or device of the ids does not match.
        """
        expected = f"one tensor for each signal, {' and '.join(self.tables)}"
        expect(len(ids) == len(self.tables), "ids", expected, f"{len(ids)} tensors")
        sizes: dict[str, int] = {}
        tables = cast("list[_Table]", [*self.tables.values()])
        for name, x in zip(self.tables, ids, strict=True):
            expect_index(sizes, f"{name} ids", x, "B M")
            expect_same_device("the parameters", tables[0].weight, **{f"{name} ids": x})
        rows = [table(x.clamp(0, table.num_embeddings - 1)) for table, x in zip(tables, ids, strict=True)]
        padding = (torch.stack(ids) < 0).any(dim=0)
        return self.mlp(sum(rows)).masked_fill(padding[..., None], 0)

    def time_ids(self, timestamps: Tensor, mask: Tensor | None = None, *, now: Tensor | None = None) -> Tensor:
        """The age of each behaviour as an id, in buckets that grow geometrically:

            id = ⌊(num_ids − 1) · log(1 + age)/log(1 + max_age)⌋,  age = now − timestamp, at most max_age

        Source: our own. With ten years in seconds and 100 ids, a bucket ends at 1.22 times the age at which it begins.

        Args:
            timestamps: [B, k], int64, int32, float64, or float32 (which resolves seconds since 1970 only to 128 s).
            mask: [B, k], True or 1 where there is a behaviour.
            now: [B], the time of the prediction, in the dtype of `timestamps`; by default the latest timestamp of each
                row.

        Returns:
            [B, k] int64, -1 where there is no behaviour.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also a
                behaviour after `now`, or a timestamp that is not finite.
        """
        sizes: dict[str, int] = {}
        valid = _signal_mask(sizes, "timestamps", timestamps, mask, (*INTEGER, torch.float64, torch.float32))
        if now is None:
            info = torch.finfo if timestamps.is_floating_point() else torch.iinfo
            masked = timestamps.masked_fill(~valid, info(timestamps.dtype).min)
            now = masked.amax(dim=1) if masked.shape[1] else masked.new_zeros(len(masked))
        else:
            expect_tensors(now=now)
            expect_shape(sizes, "now", now, "B")
            expect_dtype("now", now, (timestamps.dtype,))
            expect_same_device("timestamps", timestamps, now=now)
        if values_are_checked(timestamps.device):
            expect_values(
                ~valid | (timestamps <= now[:, None]),
                "now must be at or after the timestamps of its row",
                lambda b, j: f"now[{b}] = {now[b].item()} and timestamps[{b}, {j}] = {timestamps[b, j].item()}",
            )
        age = _subtract_in_float64(now[:, None], timestamps).masked_fill(~valid, 0)
        fraction = torch.log1p(age.clamp(0, self.max_age)) / math.log1p(self.max_age)
        return _bucket_ids(fraction, self.num_ids, valid)

    def similarity_ids(self, similarities: Tensor, mask: Tensor | None = None) -> Tensor:
        """The similarity of each behaviour to the candidate as an id, relative to the range of its list:

            id = ⌊(s − min)/(max − min) · (num_ids − 1)⌋,  0 in a list whose similarities are all equal

        Source: the formula of the official code, where s is the cosine of a retrieval model's embeddings.

        Args:
            similarities: [B, k] floats.
            mask: [B, k], True or 1 where there is a behaviour.

        Returns:
            [B, k] int64, -1 where there is no behaviour.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also a
                similarity that is not finite.
        """
        valid = _signal_mask({}, "similarities", similarities, mask, FLOATING)
        s = similarities.double() / 2  # halved so that no difference overflows
        if s.shape[1] == 0:
            return s.long()
        low = s.masked_fill(~valid, math.inf).amin(dim=1, keepdim=True)
        high = s.masked_fill(~valid, -math.inf).amax(dim=1, keepdim=True)
        spread = (high - low).masked_fill(high <= low, 1)
        return _bucket_ids(((s - low) / spread).masked_fill(~valid, 0), self.num_ids, valid)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, signal={self.signal!r}, num_ids={self.num_ids}, "
            f"embedding_dim={self.embedding_dim}, depth={self.depth}, max_age={self.max_age}"
        )


def at_sinks(values: Tensor, sink_behaviors: Tensor) -> Tensor:
    """values[b, sink_behaviors[b, m]]: ids per behaviour [B, k] -> ids per sink [B, M], -1 at padding.

    Raises:
        ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also an index in
            `sink_behaviors` that is out of range.
    """
    sizes: dict[str, int] = {}
    expect_index(sizes, "values", values, "B k")
    expect_index(sizes, "sink_behaviors", sink_behaviors, "B M")
    expect_same_device("values", values, sink_behaviors=sink_behaviors)
    if values_are_checked(values.device):
        expect_values(
            (sink_behaviors >= -1) & (sink_behaviors < values.shape[1]),
            "sink_behaviors must be behaviours of values, or -1 for padding",
            lambda b, m: f"{sink_behaviors[b, m].item()} at [{b}, {m}] beside {values.shape[1]} behaviours",
        )
    # Index -1, padding, reads a column of -1.
    padded = torch.cat([values.new_full((len(values), 1), -1), values], dim=1)
    return padded.gather(1, sink_behaviors.long() + 1)


def insert_sinks(
    behaviors: Sequence[Sequence[TokenIds]],
    sink_token_id: int,
    *,
    pad_token_id: int = 0,
    prefix_ids: TokenIds | Sequence[TokenIds] = (),
    suffix_ids: TokenIds | Sequence[TokenIds] = (),
    after_last: bool = False,
    max_length: int | None = None,
    padding_side: PaddingSide = "right",
    device: torch.device | str | None = None,
) -> SinkTokens:
    """The token ids of a batch of histories, with a sink after each behaviour except the last:

        prefix, b_1, [SINK], b_2, [SINK], …, b_k, suffix

    Source: CTR-Sink's official code, where a behaviour is the text of an item.

    Args:
        behaviors: a list of behaviours per row, the oldest first, each a list or 1-D tensor of token ids.
        sink_token_id: id of [SINK].
        pad_token_id: id of the padding.
        prefix_ids, suffix_ids: token ids before and after the behaviours, one list for all rows or one per row.
        after_last: also insert a sink after the last behaviour.
        max_length: the longest row. The oldest behaviours are dropped, each whole and with its sink, until the row
            fits; if not even the last behaviour fits, all are dropped.
        padding_side: "right" or "left".
        device: device of the returned tensors.

    Raises:
        ValueError: token ids are no integers or contain `sink_token_id`, numbers of rows differ, or prefix and suffix
            exceed `max_length`.
    """
    expect_choice("padding_side", padding_side, ("right", "left"))
    expect(len(behaviors) > 0, "behaviors", "at least one row", "none")
    prefixes = _token_ids_per_row("prefix_ids", prefix_ids, len(behaviors))
    suffixes = _token_ids_per_row("suffix_ids", suffix_ids, len(behaviors))
    rows, positions, followed = [], [], []
    for b, (prefix, history, suffix) in enumerate(zip(prefixes, behaviors, suffixes, strict=True)):
        blocks = _behavior_blocks(f"behaviors[{b}]", history, sink_token_id, after_last)
        first = 0
        if max_length is not None:
            around = len(prefix) + len(suffix)
            expect(max_length >= around, "max_length", f"at least the {around} of prefix and suffix", max_length)
            first = _first_kept_block([len(block) for block in blocks], max_length - around)
        ids, ends = [*prefix], []
        for block in blocks[first:]:
            ids += block
            ends.append(len(ids) - 1)
        ids += suffix
        sinks = ends if after_last else ends[:-1]
        found = ids.count(sink_token_id)
        expect(
            found == len(sinks), f"sink_token_id {sink_token_id}", f"at the {len(sinks)} sinks of row {b} only", found
        )
        rows.append(torch.tensor(ids, dtype=torch.int64))
        positions.append(torch.tensor(sinks, dtype=torch.int64))
        followed.append(torch.arange(first, first + len(sinks)))
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence(rows, True, pad_token_id, padding_side)
    batch, longest = input_ids.shape
    valid = valid_tokens(batch, longest, lengths, window_starts(padding_side, longest, lengths), input_ids.device)
    if padding_side == "left":
        positions = [p + longest - n for p, n in zip(positions, lengths, strict=True)]
    padded = (pad_sequence(x, True, -1) for x in (positions, followed))
    return SinkTokens(*(x.to(device=device) for x in (input_ids, valid.long(), *padded)))


def insert_sink_embeddings(
    behaviors: Tensor,
    sinks: Tensor,
    lengths: Tensor | None = None,
    *,
    after_last: bool = False,
    padding_side: PaddingSide = "right",
) -> SinkEmbeddings:
    """Insert the embedding of a sink after each behaviour vector except the last; differentiable:

        b_1, sink_1, b_2, sink_2, …, b_k

    Args:
        behaviors: [B, k, d], one vector per behaviour, or [B, k, t, d], up to t vectors per behaviour; the oldest
            first. Padding may hold anything.
        sinks: [B, k, d], the sink after each behaviour; cast to the dtype of `behaviors`.
        lengths: [B] integer, the number of behaviours per row; for behaviours [B, k, t, d] instead [B, k], the number
            of vectors per behaviour, 0 where there is none. By default nothing is padding.
        after_last: also insert a sink after the last behaviour.
        padding_side: "right" or "left".

    Returns:
        Tensors as long as the longest row; finding it costs a synchronisation on a GPU.

    Raises:
        ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also lengths out
            of range.
    """
    expect_choice("padding_side", padding_side, ("right", "left"))
    expect_tensors(behaviors=behaviors, sinks=sinks)
    sizes: dict[str, int] = {}
    single = behaviors.dim() == 3  # one vector per behaviour
    expect_shape(sizes, "behaviors", behaviors, "B k d" if single else "B k t d")
    expect_shape(sizes, "sinks", sinks, "B k d")
    expect_same_device("behaviors", behaviors, sinks=sinks, lengths=lengths)
    if single:
        behaviors = behaviors[:, :, None]
    batch, k, t, d = behaviors.shape
    device = behaviors.device
    if lengths is None:
        lengths = torch.full((batch, k), t, device=device)
    else:
        expect_index(sizes, "lengths", lengths, "B" if single else "B k")
        if values_are_checked(device):
            lengths = checked_lengths("lengths", lengths, k if single else t)
        if single:
            lengths = valid_tokens(batch, k, lengths, None, device).long()

    present = lengths > 0  # [B, k]
    has_sink = present if after_last else present & (present.flip(1).cumsum(1).flip(1) > 1)
    # Each behaviour has t entries for its vectors and one for its sink.
    filled = torch.cat([torch.arange(t, device=device) < lengths[..., None], has_sink[..., None]], dim=2).flatten(1)
    entries = torch.cat([behaviors, sinks[:, :, None].to(behaviors.dtype)], dim=2).flatten(1, 2)  # [B, k(t+1), d]
    row_lengths = filled.sum(dim=1)
    n = int(row_lengths.max()) if batch else 0
    valid = valid_tokens(batch, n, row_lengths, window_starts(padding_side, n, row_lengths), device)
    # `valid` and `filled` select the same vectors in the same order.
    embeddings = entries.new_zeros(batch, n, d).masked_scatter(valid[..., None], entries[filled])
    start = (n - row_lengths if padding_side == "left" else torch.zeros_like(row_lengths))[:, None]
    position = (filled.cumsum(dim=1) - 1 + start).unflatten(1, (k, t + 1))[..., -1]
    positions, followed = position.masked_fill(~has_sink, n).sort(dim=1)
    padding = positions == n
    count = k if after_last else max(k - 1, 0)
    positions, followed = (x.masked_fill(padding, -1)[:, :count] for x in (positions, followed))
    return SinkEmbeddings(embeddings, valid.long(), positions, followed)


def replace_sink_embeddings(inputs_embeds: Tensor, sink_positions: Tensor, sinks: Tensor) -> Tensor:
    """A copy of `inputs_embeds` with the vectors at the sinks replaced, as in CTR-Sink's official code:

        out[b, sink_positions[b, m]] = sinks[b, m]

    Args:
        inputs_embeds: [B, N, d], not changed. The replaced vectors get no gradient.
        sink_positions: [B, M], ascending, padded with -1.
        sinks: [B, M, d], for example from `SinkTokenEmbedding`; cast to the dtype of `inputs_embeds`.

    Raises:
        ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also positions
            out of range or order.
    """
    expect_tensors(inputs_embeds=inputs_embeds, sinks=sinks)
    sizes: dict[str, int] = {}
    expect_shape(sizes, "inputs_embeds", inputs_embeds, "B N d")
    expect_index(sizes, "sink_positions", sink_positions, "B M")
    expect_shape(sizes, "sinks", sinks, "B M d")
    expect_same_device("inputs_embeds", inputs_embeds, sink_positions=sink_positions, sinks=sinks)
    n = sizes["N"]
    sink_positions = checked_indices(inputs_embeds.device, sink_positions=sink_positions, seq_len=n).sink_positions
    # Padded sinks are written to an extra last row, which is cut off.
    padded = torch.cat([inputs_embeds, inputs_embeds.new_zeros(sizes["B"], 1, sizes["d"])], dim=1)
    index = sink_positions.long().masked_fill(sink_positions < 0, n)[..., None].expand_as(sinks)
    return padded.scatter(1, index, sinks.to(padded.dtype))[:, :n]


def _signal_mask(
    sizes: dict[str, int], name: str, signal: Tensor, mask: Tensor | None, allowed: tuple[torch.dtype, ...]
) -> Tensor:
    """Check a signal [B, k]; return where it has a behaviour, as bool."""
    expect_tensors(**{name: signal})
    expect_shape(sizes, name, signal, "B k")
    expect_dtype(name, signal, allowed)
    expect_same_device(name, signal, mask=mask)
    valid = torch.ones_like(signal, dtype=torch.bool) if mask is None else read_mask(sizes, "mask", mask, "B k")
    if values_are_checked(signal.device):
        finite = ~valid | signal.isfinite()
        expect_values(finite, f"{name} must be finite where there is a behaviour", lambda *index: signal[index].item())
    return valid


def _subtract_in_float64(x: Tensor, y: Tensor) -> Tensor:
    """x − y in float64. For integers the int64 difference is used unless it could overflow."""
    if x.is_floating_point():
        return x.double() - y.double()
    rounded = x.double() - y.double()
    return torch.where(rounded.abs() < 2**62, (x.long() - y.long()).double(), rounded)


def _bucket_ids(fraction: Tensor, num_ids: int, valid: Tensor) -> Tensor:
    """⌊fraction · (num_ids − 1)⌋ for fractions between 0 and 1; -1 where not valid."""
    return (fraction * (num_ids - 1)).floor().long().masked_fill(~valid, -1)


def _token_ids(name: str, ids: Any) -> list[int]:
    expected = "a list or 1-D tensor of token ids"
    if isinstance(ids, Tensor):
        integers = not ids.is_floating_point() and ids.dtype != torch.bool
        expect(ids.dim() == 1 and integers, name, expected, f"{list(ids.shape)} of {ids.dtype}")
        return ids.tolist()
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        raise ValueError(f"{name} must be {expected}, got {ids!r}") from None


def _token_ids_per_row(name: str, ids: TokenIds | Sequence[TokenIds], batch: int) -> list[list[int]]:
    """Token ids of each row, from one list for all rows or one per row."""
    if isinstance(ids, Tensor) or not any(isinstance(x, Sequence | Tensor) for x in ids):
        return [_token_ids(name, ids)] * batch
    expect(len(ids) == batch, name, f"one list of token ids, or {batch}", f"{len(ids)}")
    return [_token_ids(f"{name}[{b}]", x) for b, x in enumerate(ids)]


def _behavior_blocks(name: str, history: Sequence[TokenIds], sink_token_id: int, after_last: bool) -> list[list[int]]:
    """Token ids of each behaviour with the sink after it."""
    expect(isinstance(history, Sequence | Tensor), name, "a list of behaviours", type(history).__name__)
    blocks = [_token_ids(f"{name}[{j}]", ids) for j, ids in enumerate(history)]
    last = len(blocks) - 1
    return [[*ids, sink_token_id] if after_last or j < last else ids for j, ids in enumerate(blocks)]


def _first_kept_block(lengths: list[int], room: int) -> int:
    """Index of the first block such that it and all later ones fit into `room` tokens."""
    first = len(lengths)
    while first > 0 and lengths[first - 1] <= room:
        first -= 1
        room -= lengths[first]
    return first

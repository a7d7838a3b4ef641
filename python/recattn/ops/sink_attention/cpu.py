"""sink_attention on a CPU: dense batches as they are, ragged ones as dense parts of sequences of similar length."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recattn._check import checked_lengths, checked_offsets, checked_sink_positions
from recattn._options import SinkAttentionOptions
from recattn.ops._ragged import Bucket, length_buckets
from recattn.ops.sink_attention.cpu_dense import Sinks, Terms, dense_bwd, dense_fwd, is_contiguous_token_major


# The arguments are those of the operators' schemas.
def sink_attention_fwd(
    q, k, v, sink_positions, inter_sink_bias, sink_logits, seq_lens, cu_seqlens, options: SinkAttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and sink_stats, laid out as by `empty_fwd`."""
    sink_positions, seq_lens, cu_seqlens = _checked(q, sink_positions, seq_lens, cu_seqlens)
    inputs = (sink_positions, inter_sink_bias, sink_logits, options)
    batch = _ragged_batch(q, seq_lens, cu_seqlens, options.left_padded)
    if batch.rows is None and q.numel() > 0:
        return dense_fwd(q, k, v, _terms(q, batch, None, *inputs))
    out, lse, sink_stats = empty_fwd(q, v, sink_positions)
    out.zero_()
    lse.fill_(-math.inf)
    sink_stats.zero_()
    for part in _parts(batch):
        terms = _terms(q, batch, part, *inputs)
        part_out, part_lse, part_stats = dense_fwd(*(part.gather(x) for x in (q, k, v)), terms)
        part.scatter(out, part_out)
        part.scatter(lse, part_lse)
        sink_stats[:, part.members, :, : part_stats.shape[3]] = part_stats
    return out, lse, sink_stats


def sink_attention_bwd(
    dout, q, k, v, out, lse, sink_stats, sink_positions, inter_sink_bias, sink_logits, seq_lens, cu_seqlens, options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, dsink_logits (empty without sink_logits)."""
    inputs = (sink_positions, inter_sink_bias, sink_logits, options)
    batch = _ragged_batch(q, seq_lens, cu_seqlens, options.left_padded)
    if batch.rows is None and q.numel() > 0:
        dq, dk, dv, dbias, dsink_logits = dense_bwd(
            dout, q, k, v, out, lse, sink_stats, _terms(q, batch, None, *inputs)
        )
    else:
        dq, dk, dv = (_empty_gradient(x).zero_() for x in (q, k, v))
        dbias = lse.new_zeros(inter_sink_bias.shape)
        dsink_logits = lse.new_zeros(0 if sink_logits is None else sink_logits.shape[0])
        for part in _parts(batch):
            terms = _terms(q, batch, part, *inputs)
            count = terms.sinks.positions.shape[1]
            dense = (
                part.gather(dout, 0.0),
                *(part.gather(x) for x in (q, k, v, out)),
                part.gather(lse, math.inf),
                sink_stats[:, part.members, :, :count],
            )
            *grads, part_dbias, part_dsink_logits = dense_bwd(*dense, terms)
            for gradient, part_gradient in zip((dq, dk, dv), grads, strict=True):
                part.scatter(gradient, part_gradient)
            dbias[part.members, :, :count, :count] = part_dbias
            dsink_logits += part_dsink_logits
    sink_logits_dtype = q.dtype if sink_logits is None else sink_logits.dtype
    return dq, dk, dv, dbias.to(inter_sink_bias.dtype), dsink_logits.to(sink_logits_dtype)


def _checked(
    q: Tensor, sink_positions: Tensor, seq_lens: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checked copies of the index tensors."""
    if cu_seqlens is not None:
        cu_seqlens = checked_offsets("cu_seqlens", cu_seqlens, q.shape[0])
        return checked_sink_positions(sink_positions, None, cu_seqlens), seq_lens, cu_seqlens
    if seq_lens is not None:
        seq_lens = checked_lengths("seq_lens", seq_lens, q.shape[2])
    return checked_sink_positions(sink_positions, q.shape[2]), seq_lens, cu_seqlens


# --- Dense and ragged batches ---


class _Ragged(NamedTuple):
    """Sequences as ranges of tokens in rows: [B, N] of a padded batch, [1, T] of a packed one."""

    rows: Tensor | None  # [B] row of each sequence; None if every sequence fills its own row
    starts: Tensor  # [B]
    lengths: Tensor  # [B]
    packed: bool

    def tokens(self, x: Tensor) -> Tensor:
        """View [B, H, N, ...] as [B, N, H, ...], or packed [T, H, ...] as [1, T, H, ...]."""
        return x.unsqueeze(0) if self.packed else x.transpose(1, 2)


def _ragged_batch(q: Tensor, seq_lens: Tensor | None, cu_seqlens: Tensor | None, left_padded: bool) -> _Ragged:
    if cu_seqlens is not None:
        lengths = cu_seqlens.long().diff()
        return _Ragged(torch.zeros_like(lengths), cu_seqlens[:-1].long(), lengths, True)
    batch, length = q.shape[0], q.shape[2]
    if seq_lens is None:
        return _Ragged(None, torch.zeros(batch, dtype=torch.long), torch.full((batch,), length), False)
    lengths = seq_lens.long()
    starts = length - lengths if left_padded else torch.zeros_like(lengths)
    return _Ragged(torch.arange(batch), starts, lengths, False)


class _Part:
    """Sequences of similar length as a dense batch, padded at the end: a view of one sequence, a copy of several."""

    def __init__(self, batch: _Ragged, bucket: Bucket):
        self.batch = batch
        self.members = bucket.members
        self.valid = bucket.valid  # [b, n]
        self.padded = not bool(bucket.valid.all())
        if len(bucket.members) == 1:
            row, start = int(batch.rows[bucket.members]), int(bucket.positions[0, 0])
            self.index = (slice(row, row + 1), slice(start, start + bucket.positions.shape[1]))
        else:
            self.index = (batch.rows[bucket.members].unsqueeze(1), bucket.positions)

    def gather(self, x: Tensor, padding: float | None = None) -> Tensor:
        """The tokens of the part, [b, H, n, ...]. Padding holds `padding`, or repeats a sequence's last token."""
        gathered = self.batch.tokens(x)[self.index]
        if self.padded and padding is not None:
            gathered[~self.valid] = padding
        return gathered.transpose(1, 2)

    def scatter(self, x: Tensor, values: Tensor) -> None:
        index, values = self.index, values.transpose(1, 2)
        if self.padded:
            index = tuple(axis.expand_as(self.valid)[self.valid] for axis in index)
            values = values[self.valid]
        self.batch.tokens(x)[index] = values

    def mask(self, dtype: torch.dtype, causal: bool) -> Tensor | None:
        """[b, 1, 1, n], added to the scores. A causal mask already hides the padding, which comes last."""
        if causal or not self.padded:
            return None
        return torch.zeros(self.valid.shape, dtype=dtype).masked_fill_(~self.valid, -math.inf)[:, None, None]


def _parts(batch: _Ragged) -> list[_Part]:
    # Work grows with the square of the length. Padding up to an eighth of a length pays for larger batches.
    return [_Part(batch, bucket) for bucket in length_buckets(batch.starts, batch.lengths, unit=16, steps=8)]


def _terms(
    q: Tensor,
    batch: _Ragged,
    part: _Part | None,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    sink_logits: Tensor | None,
    options: SinkAttentionOptions,
) -> Terms:
    """The terms of a part; without one, of the whole dense batch."""
    dtype = _lse_dtype(q)
    if sink_logits is not None:
        sink_logits = sink_logits.to(dtype)[:, None]
    if part is None:
        sinks = _sinks(batch, slice(None), sink_positions, inter_sink_bias, dtype)
        return Terms(sinks, sink_logits, None, options)
    sinks = _sinks(batch, part.members, sink_positions, inter_sink_bias, dtype).trimmed()
    return Terms(sinks, sink_logits, part.mask(q.dtype, options.causal), options)


def _sinks(batch: _Ragged, members: Tensor | slice, sink_positions: Tensor, bias: Tensor, dtype: torch.dtype) -> Sinks:
    """The sinks of some sequences, at positions that count from each sequence's first token."""
    positions = sink_positions[members].long()
    live = positions >= 0
    if not batch.packed:
        positions = positions - batch.starts[members].unsqueeze(1)
        live &= (positions >= 0) & (positions < batch.lengths[members].unsqueeze(1))
    return Sinks(positions.masked_fill(~live, 0), live, bias[members].to(dtype))


# --- Layouts ---


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised, with x's shape; [B, H, N, D] in the memory layout of [B, N, H, D]."""
    return x.new_empty(x.shape) if x.dim() == 3 else x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def empty_fwd(q: Tensor, v: Tensor, sink_positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised out [B, Hq, N, Dv] (packed [T, Hq, Dv]), lse [B, Hq, N] ([T, Hq]), sink_stats [2, B, Hq, M]."""
    packed = q.dim() == 3
    heads = q.shape[1]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if not packed and is_contiguous_token_major(q):
        out = _empty_gradient(out)
    tokens = q.shape[:-1] if packed else (q.shape[0], q.shape[2], heads)
    lse = q.new_empty(tokens, dtype=_lse_dtype(q))
    sink_stats = lse.new_empty(2, sink_positions.shape[0], heads, sink_positions.shape[1])
    return out, lse if packed else lse.transpose(1, 2), sink_stats


def empty_bwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradient(q), _empty_gradient(k), _empty_gradient(v)

"""sink_attention on a CPU: the correction path over PyTorch's flash attention.

The bias touches M² of the N² pairs, so any unbiased attention that returns its log-sum-exp serves, corrected at the
sinks. For a sink row i and the sinks j that it sees, with s = scale · q_i·k_j:

    Δ_ij = exp(s_ij - lse_i) · expm1(β_ij)      z_i = 1 + Σ_j Δ_ij
    O_i ← (O_i + Σ_j Δ_ij v_j) / z_i            lse_i ← lse_i + log z_i

A row much of whose mass sat on suppressed sinks is redone over all its keys, for there the sums cancel; and so is one
whose scores are too large for exp(s - lse) to mean anything.
The backward is that of the unbiased attention, given the corrected O and lse, plus what it misses at sink pairs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._check import checked_lengths, checked_offsets, checked_sink_positions
from recattn._options import SinkAttentionOptions
from recattn.ops._ragged import Bucket, length_buckets
from recattn.reference.sink_attention import softmax_or_zeros

# A row that loses more than this share of what it keeps is redone over all its keys: its sums cancel. (z itself does
# not tell: a row may lose nearly all its mass at some sinks and gain as much at others.)
_CANCELLED = 0.5
# So is a row whose log-sum-exp rounds by more than this: the scores computed here have roundings of their own, and
# exp(s - lse) may be anything.
_COARSE = 1 / 16
# Sink rows are taken in blocks of at most this many sink pairs over all heads.
_BLOCK_PAIRS = 1 << 22


class _Sinks(NamedTuple):
    """The sinks of a dense batch, gathered from it. `live` is False at padded sinks, whose position reads 0."""

    positions: Tensor  # [B, M]
    live: Tensor  # [B, M]
    bias: Tensor  # [B, 1 or Hq, M, M]

    def gather(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [B, H, M, ...], contiguous, in at least float32."""
        if not (x.is_contiguous() or is_token_major(x)):
            b, h = _batch_and_head(x)
            return _upcast(x[b, h, self.positions[:, None]])
        tokens, index = self._flat(x)
        return _upcast(tokens.index_select(0, index.flatten()).view(*index.shape, *x.shape[3:]))

    def write(self, x: Tensor, values: Tensor, *, add: bool = False) -> None:
        """Put, or add, [B, H, M, ...] into [B, H, N, ...] at the live sinks."""
        tokens, index = self._flat(x)
        index, values = index.flatten(), values.flatten(0, 2)
        if not bool(self.live.all()):
            live = self.live[:, None].expand(-1, x.shape[1], -1).flatten()
            index, values = index[live], values[live]
        if add:
            values = values + tokens.index_select(0, index)
        tokens.index_copy_(0, index, values.to(x.dtype))

    def _flat(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A view of [B, H, N, ...] with one axis for its tokens, and where on it the sinks are [B, H, M].

        Selecting along one axis is many times faster than indexing three.
        """
        _, heads, length = x.shape[:3]
        b, h = _batch_and_head(x)
        positions = self.positions[:, None]
        if x.is_contiguous():
            return x.flatten(0, 2), (b * heads + h) * length + positions
        return x.transpose(1, 2).flatten(0, 2), (b * length + positions) * heads + h

    def visible(self, rows: slice, causal: bool) -> Tensor:
        """[B, 1, m, M], True where sink i of `rows` may see sink j."""
        visible = self.live[:, rows, None] & self.live[:, None, :]
        if causal:
            visible &= self.positions[:, rows, None] >= self.positions[:, None, :]
        return visible.unsqueeze(1)

    def trimmed(self) -> "_Sinks":
        """Without the columns after the last live sink of any sequence."""
        used = torch.nonzero(self.live.any(dim=0))
        count = int(used[-1]) + 1 if len(used) else 0
        return _Sinks(self.positions[:, :count], self.live[:, :count], self.bias[:, :, :count, :count])

    def row_blocks(self, heads: int) -> list[slice]:
        batch, sinks = self.positions.shape
        step = max(1, _BLOCK_PAIRS // max(1, batch * heads * sinks))
        return [slice(start, start + step) for start in range(0, sinks, step)]


def _batch_and_head(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the first two axes, [B, 1, 1] and [H, 1]."""
    return torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])[:, None]


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, ...] -> [B, Hkv, ...], summed over the query heads of each key head."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


# --- The unbiased attention ---


def _base_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: SinkAttentionOptions
) -> tuple[Tensor, Tensor]:
    """Unbiased out [B, Hq, N, Dv] and lse [B, Hq, N] of a dense batch; `mask` [B, 1, 1, N] is added to the scores."""
    follows_tokens = is_token_major(q)
    kv_heads, groups, value_dim = k.shape[1], q.shape[1] // k.shape[1], v.shape[-1]
    factor, scale = _split_scale(options.scale, q.dtype)
    q, k, v, mask = _base_inputs(q, k, v, mask, factor)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, options.causal, attn_mask=mask, scale=scale
    )
    if not math.isfinite((lse / lse).sum()):
        # A score of +inf, or its own of NaN, makes a row NaN. PyTorch's op takes few scores, all NaN or infinite, for
        # none at all (lse = 0), writes zeros for +inf in half precision, and leaves such rows out of its backward
        # (lse = +inf).
        diverged = (lse == math.inf) | (q * k).sum(-1).isnan() | ((lse == 0) & ~q.isfinite().all(-1))
        out, lse = out.masked_fill(diverged.unsqueeze(-1), math.nan), lse.masked_fill(diverged, math.nan)
    out = _unfold(out[..., :value_dim], kv_heads, groups)
    out = token_major(out) if follows_tokens else out.contiguous()
    return out, token_major(_unfold(lse, kv_heads, groups))


def _base_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    options: SinkAttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the unbiased attention that `out` and `lse` are said to come from."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    head_dim, value_dim = k.shape[-1], v.shape[-1]
    factor, scale = _split_scale(options.scale, q.dtype)
    q, k, v, mask = _base_inputs(q, k, v, mask, factor)
    dout, out = (_fold(_pad(x, q.shape[-1]), kv_heads, groups) for x in (dout, out))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, _fold(lse, kv_heads, groups), 0.0, options.causal, attn_mask=mask, scale=scale
    )
    dq = dq if factor == 1 else dq.mul_(factor)
    dq, dk, dv = (_unfold(x, kv_heads, groups) for x in (dq, dk, dv))
    dk, dv = _sum_groups(dk, kv_heads), _sum_groups(dv, kv_heads)
    return token_major(dq[..., :head_dim]), token_major(dk[..., :head_dim]), token_major(dv[..., :value_dim])


def _split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """A factor for the queries, and what is left of the scale for PyTorch's op: a power of two.

    That op scales what it multiplies in the backward, what it has multiplied in the forward. Where this rounds, the
    weights of the backward do not sum to one. (In half precision the queries have no bits to spare for it.)
    """
    if dtype.itemsize < 4:
        return 1.0, scale
    half_factor, exponent = math.frexp(scale)
    return 2 * half_factor, math.ldexp(1.0, exponent - 1)


def _base_inputs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What PyTorch's op takes: one head dim, as many key heads as query heads, none of them copied; q by a factor."""
    q = q if factor == 1 else q * factor
    kv_heads, groups, dim = k.shape[1], q.shape[1] // k.shape[1], max(q.shape[-1], v.shape[-1])
    q, k, v = (_pad(x, dim) for x in (q, k, v))
    if groups > 1:
        k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v))
        mask = None if mask is None else mask.repeat_interleave(kv_heads, dim=0)
    return _fold(q, kv_heads, groups), k, v, mask


def _pad(x: Tensor, dim: int) -> Tensor:
    x = F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x
    strides = x.stride()
    # Beside a second axis of stride 1 (rows overlap) PyTorch's op may lay out its result with that one last.
    return x if strides[-1] == 1 and strides.count(1) == 1 else x.contiguous()


def _fold(x: Tensor, kv_heads: int, groups: int) -> Tensor:
    """[B, Hq, N, ...] -> [B·Hkv, G, N, ...]: query heads that share a key head become the heads of one batch entry."""
    return x if groups == 1 else x.unflatten(1, (kv_heads, groups)).flatten(0, 1)


def _unfold(x: Tensor, kv_heads: int, groups: int) -> Tensor:
    return x if groups == 1 else x.unflatten(0, (-1, kv_heads)).flatten(1, 2)


def token_major(x: Tensor) -> Tensor:
    """[B, H, N, ...] laid out as [B, N, H, ...]: PyTorch's op lays out lse and gradients so, and out if q is."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def is_token_major(x: Tensor) -> bool:
    return x.transpose(1, 2).is_contiguous()


# --- The correction of a dense batch ---


def _dense_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: _Sinks,
    sink_logits: Tensor | None,
    mask: Tensor | None,
    options: SinkAttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and what the backward reads of the sink rows: see `_correct`."""
    out, lse = _base_fwd(q, k, v, mask, options)
    if sink_logits is not None:
        # Further mass in each row's softmax, which the correction then finds there.
        sink_logits = sink_logits.to(lse.dtype)[:, None]
        out *= torch.sigmoid(lse - sink_logits).unsqueeze(-1)
        lse = token_major(torch.logaddexp(lse, sink_logits))
    sink_stats = lse.new_empty(2, *lse.shape[:2], sinks.positions.shape[1])
    if sinks.positions.shape[1] > 0:
        _correct(out, lse, sink_stats, q, k, v, sinks, sink_logits, mask, options)
    return out, lse, sink_stats


def _correct(
    out: Tensor,
    lse: Tensor,
    sink_stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: _Sinks,
    sink_logits: Tensor | None,
    mask: Tensor | None,
    options: SinkAttentionOptions,
) -> None:
    """Turn the unbiased `out` and `lse` into the biased ones, in place, and write the sink rows' shift and mass:

    P_ij = exp(s_ij + β_ij - shift_i) / mass_i        mass < 0 marks a row that was redone over all its keys
    """
    out_s, q_s, lse_s = sinks.gather(out), sinks.gather(q), sinks.gather(lse)
    k_s, v_s = (_repeat_heads(sinks.gather(x), q.shape[1]) for x in (k, v))
    shift, mass = sink_stats.unsqueeze(-1)
    coarse = lse_s.abs() > _COARSE / torch.finfo(lse_s.dtype).eps
    redone = torch.empty_like(coarse)
    for rows in sinks.row_blocks(q.shape[1]):
        scores, biased = _sink_scores(q_s, k_s, sinks, rows, options)
        base = lse_s[:, :, rows, None]
        shift[:, :, rows] = torch.maximum(biased.amax(dim=-1, keepdim=True), base)
        delta = _exp(biased, shift[:, :, rows]).sub_(_exp(scores, shift[:, :, rows]))
        base = (base - shift[:, :, rows]).exp_()
        mass[:, :, rows] = base + delta.sum(dim=-1, keepdim=True)
        redone[:, :, rows] = _cancels(delta, mass[:, :, rows])
        out_s[:, :, rows] = (out_s[:, :, rows] * base + delta @ v_s) / mass[:, :, rows]
    lse_s = (shift + mass.log()).squeeze(-1)
    redone = (redone | coarse) & sinks.live.unsqueeze(1)
    mass[redone] = -1
    for b, h, m in _redone_rows(redone):
        weights, lse_s[b, h, m] = _full_softmax(q_s, k, sinks, sink_logits, mask, options, b, h, m)
        out_s[b, h, m] = weights @ _upcast(v[b, _kv_head(h, q, k)])
    sinks.write(out, out_s)
    sinks.write(lse, lse_s)


def _dense_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_stats: Tensor,
    sinks: _Sinks,
    sink_logits: Tensor | None,
    mask: Tensor | None,
    options: SinkAttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, dsink_logits."""
    dsink_logits = lse.new_empty(0)
    if sink_logits is not None:
        sink_logits = sink_logits.to(lse.dtype)[:, None]
        row_sum = (_upcast(dout) * out).sum(dim=-1, dtype=torch.float64)  # [B, Hq, N]
        dsink_logits = -((sink_logits - lse).exp() * row_sum).sum(dim=(0, 2))
    if sinks.positions.shape[1] == 0:
        return *_base_bwd(dout, q, k, v, out, lse, mask, options), torch.zeros_like(sinks.bias), dsink_logits

    heads, kv_heads = q.shape[1], k.shape[1]
    dout_s, q_s = sinks.gather(dout), sinks.gather(q)
    k_s, v_s = (_repeat_heads(sinks.gather(x), heads) for x in (k, v))
    row_sum = (dout_s.double() * sinks.gather(out)).sum(dim=-1, keepdim=True)  # [B, Hq, M, 1]
    dq_s, dk_s, dv_s = (torch.zeros_like(x) for x in (q_s, k_s, v_s))
    dbias = torch.zeros_like(sinks.bias)
    shift, mass = sink_stats
    redone = (mass < 0) & sinks.live.unsqueeze(1)
    shift = shift.masked_fill(redone, math.inf).unsqueeze(-1)  # those rows are done whole, below
    for rows in sinks.row_blocks(heads):
        scores, biased = _sink_scores(q_s, k_s, sinks, rows, options)
        row_mass = mass[:, :, rows, None]
        biased = _exp(biased, shift[:, :, rows]).div_(row_mass)  # P
        delta = torch.sub(biased, _exp(scores, shift[:, :, rows]).div_(row_mass), out=scores)  # what the base lacks
        # In float64: where a row has one key that counts, its score's gradient is a difference of equal numbers.
        dweights = dout_s[:, :, rows].double() @ v_s.double().transpose(-2, -1)
        dscore = (dweights - row_sum[:, :, rows]).to(lse.dtype)
        dbias[:, :, rows] = (biased.mul_(dscore)).sum_to_size(dbias[:, :, rows].shape)
        dv_s += delta.transpose(-2, -1) @ dout_s[:, :, rows]
        delta.mul_(dscore).mul_(options.scale)
        dq_s[:, :, rows] = delta @ k_s
        dk_s += delta.transpose(-2, -1) @ q_s[:, :, rows]

    if bool(redone.any()):  # lse = +inf takes those rows out of the unbiased backward
        lse = lse.clone()
        sinks.write(lse, sinks.gather(lse).masked_fill(redone, math.inf))
    dq, dk, dv = _base_bwd(dout, q, k, v, out, lse, mask, options)
    sinks.write(dq, dq_s, add=True)
    sinks.write(dk, _sum_groups(dk_s, kv_heads), add=True)
    sinks.write(dv, _sum_groups(dv_s, kv_heads), add=True)
    for b, h, m in _redone_rows(redone):
        head, live = _kv_head(h, q, k), sinks.live[b]
        weights, _ = _full_softmax(q_s, k, sinks, sink_logits, mask, options, b, h, m)  # [m, N]
        dweights = dout_s[b, h, m].double() @ v[b, head].double().T
        dscore = weights * (dweights - row_sum[b, h, m]).to(lse.dtype)
        dbias[b, h % dbias.shape[1]][m[:, None], torch.nonzero(live).T] += dscore[:, sinks.positions[b, live]]
        dscore *= options.scale
        dq[b, h, sinks.positions[b, m]] += (dscore @ _upcast(k[b, head])).to(dq.dtype)
        dk[b, head] += (dscore.T @ q_s[b, h, m]).to(dk.dtype)
        dv[b, head] += (weights.T @ dout_s[b, h, m]).to(dv.dtype)
    return dq, dk, dv, dbias, dsink_logits


def _sink_scores(
    q_s: Tensor, k_s: Tensor, sinks: _Sinks, rows: slice, options: SinkAttentionOptions
) -> tuple[Tensor, Tensor]:
    """s and s + β of some sink rows over the sinks, [B, Hq, m, M]; -inf where a sink is not seen."""
    unseen = ~sinks.visible(rows, options.causal)
    scores = ((q_s[:, :, rows] * options.scale) @ k_s.transpose(-2, -1)).masked_fill_(unseen, -math.inf)
    return scores, scores + sinks.bias[:, :, rows].masked_fill(unseen, 0)


def _exp(scores: Tensor, shift: Tensor) -> Tensor:
    """exp(scores - shift), in place."""
    return scores.sub_(shift).exp_()


def _cancels(delta: Tensor, mass: Tensor) -> Tensor:
    """[B, Hq, m], True where what the correction takes away is much of what is left."""
    lost = -delta.clamp(max=0).sum(dim=-1)
    return ~(lost < _CANCELLED * mass.squeeze(-1))  # True for NaN


def _redone_rows(redone: Tensor):
    """(batch entry, head, sinks) in groups of bounded size, over [B, Hq, M]."""
    for b, h in torch.nonzero(redone.any(dim=-1)).tolist():
        for m in torch.nonzero(redone[b, h]).squeeze(1).split(128):
            yield b, h, m


def _full_softmax(
    q_s: Tensor,
    k: Tensor,
    sinks: _Sinks,
    sink_logits: Tensor | None,
    mask: Tensor | None,
    options: SinkAttentionOptions,
    b: int,
    h: int,
    m: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weights [m, N] and lse [m] of the sinks `m` of one head over every key."""
    scores = _full_scores(q_s, k, sinks, mask, options, b, h, m)
    weights, lse = softmax_or_zeros(scores), torch.logsumexp(scores, dim=-1)
    if sink_logits is None:
        return weights, lse
    return weights * torch.sigmoid(lse - sink_logits[h]).unsqueeze(-1), torch.logaddexp(lse, sink_logits[h])


def _full_scores(
    q_s: Tensor, k: Tensor, sinks: _Sinks, mask: Tensor | None, options: SinkAttentionOptions, b: int, h: int, m: Tensor
) -> Tensor:
    """Biased and masked scores of the sinks `m` of one head over every key: [m, N]."""
    key = _upcast(k[b, _kv_head(h, q_s, k)])
    scores = (q_s[b, h, m] * options.scale) @ key.T
    live = sinks.live[b]
    scores[:, sinks.positions[b, live]] += sinks.bias[b, h % sinks.bias.shape[1], m][:, live]
    if mask is not None:
        scores += mask[b, 0]
    if options.causal:
        future = torch.arange(key.shape[0]) > sinks.positions[b, m].unsqueeze(1)
        scores.masked_fill_(future, -math.inf)
    return scores


def _kv_head(h: int, q: Tensor, k: Tensor) -> int:
    return h * k.shape[1] // q.shape[1]


# --- Dense and ragged batches ---


class _Ragged(NamedTuple):
    """Sequences as rows of a token axis: [B, N] of a padded batch, [1, T] of a packed one."""

    rows: Tensor | None  # [B] row of each sequence; None where every sequence fills its own row
    starts: Tensor  # [B]
    lengths: Tensor  # [B]
    packed: bool

    def tokens(self, x: Tensor) -> Tensor:
        """A view of [B, H, N, ...] as [B, N, H, ...], or of [T, H, ...] as [1, T, H, ...]."""
        return x.unsqueeze(0) if self.packed else x.transpose(1, 2)


def _checked(
    q: Tensor, sink_positions: Tensor, seq_lens: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if cu_seqlens is not None:
        cu_seqlens = checked_offsets("cu_seqlens", cu_seqlens, q.shape[0])
        return checked_sink_positions(sink_positions, None, cu_seqlens), seq_lens, cu_seqlens
    if seq_lens is not None:
        seq_lens = checked_lengths("seq_lens", seq_lens, q.shape[2])
    return checked_sink_positions(sink_positions, q.shape[2]), seq_lens, cu_seqlens


def _describe_batch(q: Tensor, seq_lens: Tensor | None, cu_seqlens: Tensor | None, left_padded: bool) -> _Ragged:
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
    """Sequences of similar length as a dense batch padded at the end: a view of one, a copy of several."""

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
        """The part's tokens as [b, H, n, ...]; padding repeats a sequence's last token unless a value is given."""
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
        """[b, 1, 1, n], added to the scores; where the mask is causal no valid token sees the padding anyway."""
        if causal or not self.padded:
            return None
        return torch.zeros(self.valid.shape, dtype=dtype).masked_fill_(~self.valid, -math.inf)[:, None, None]


def _parts(batch: _Ragged) -> list[_Part]:
    # Work grows with the square of the length: padding by an eighth is as much as larger batches are worth.
    return [_Part(batch, bucket) for bucket in length_buckets(batch.starts, batch.lengths, unit=16, steps=8)]


def _sinks(batch: _Ragged, members: Tensor | slice, sink_positions: Tensor, bias: Tensor, dtype: torch.dtype) -> _Sinks:
    """The sinks of some sequences, at positions that count from each sequence's first token."""
    positions = sink_positions[members].long()
    live = positions >= 0
    if not batch.packed:
        positions = positions - batch.starts[members].unsqueeze(1)
        live &= (positions >= 0) & (positions < batch.lengths[members].unsqueeze(1))
    return _Sinks(positions.masked_fill(~live, 0), live, bias[members].to(dtype))


def sink_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    sink_logits: Tensor | None,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    options: SinkAttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    lse_dtype = _lse_dtype(q)
    sink_positions, seq_lens, cu_seqlens = _checked(q, sink_positions, seq_lens, cu_seqlens)
    batch = _describe_batch(q, seq_lens, cu_seqlens, options.left_padded)
    if batch.rows is None and q.numel() > 0:
        sinks = _sinks(batch, slice(None), sink_positions, inter_sink_bias, lse_dtype)
        return _dense_fwd(q, k, v, sinks, sink_logits, None, options)
    out, lse, sink_stats = empty_fwd(q, v, sink_positions)
    out.zero_()
    lse.fill_(-math.inf)
    sink_stats.zero_()
    for part in _parts(batch):
        sinks = _sinks(batch, part.members, sink_positions, inter_sink_bias, lse_dtype).trimmed()
        dense = (part.gather(x) for x in (q, k, v))
        part_out, part_lse, part_state = _dense_fwd(
            *dense, sinks, sink_logits, part.mask(q.dtype, options.causal), options
        )
        part.scatter(out, part_out)
        part.scatter(lse, part_lse)
        sink_stats[:, part.members, :, : part_state.shape[3]] = part_state
    return out, lse, sink_stats


def sink_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_stats: Tensor,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    sink_logits: Tensor | None,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    options: SinkAttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = _describe_batch(q, seq_lens, cu_seqlens, options.left_padded)
    if batch.rows is None and q.numel() > 0:
        sinks = _sinks(batch, slice(None), sink_positions, inter_sink_bias, lse.dtype)
        dq, dk, dv, dbias, dsink_logits = _dense_bwd(
            dout, q, k, v, out, lse, sink_stats, sinks, sink_logits, None, options
        )
    else:
        dq, dk, dv = (_empty_gradient(x).zero_() for x in (q, k, v))
        dbias = lse.new_zeros(inter_sink_bias.shape)
        dsink_logits = lse.new_zeros(0 if sink_logits is None else sink_logits.shape[0])
        for part in _parts(batch):
            sinks = _sinks(batch, part.members, sink_positions, inter_sink_bias, lse.dtype).trimmed()
            count = sinks.positions.shape[1]
            dense = (
                part.gather(dout, 0.0),
                *(part.gather(x) for x in (q, k, v, out)),
                part.gather(lse, math.inf),
                sink_stats[:, part.members, :, :count],
            )
            *grads, part_dbias, part_dsink_logits = _dense_bwd(
                *dense, sinks, sink_logits, part.mask(q.dtype, options.causal), options
            )
            for gradient, part_gradient in zip((dq, dk, dv), grads, strict=True):
                part.scatter(gradient, part_gradient)
            dbias[part.members, :, :count, :count] = part_dbias
            dsink_logits += part_dsink_logits
    sink_logits_dtype = q.dtype if sink_logits is None else sink_logits.dtype
    return dq, dk, dv, dbias.to(inter_sink_bias.dtype), dsink_logits.to(sink_logits_dtype)


# --- Layouts ---


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape; [B, H, N, D] is laid out token by token."""
    return x.new_empty(x.shape) if x.dim() == 3 else x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def empty_fwd(q: Tensor, v: Tensor, sink_positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised out [B, Hq, N, Dv] (packed [T, Hq, Dv]), lse [B, Hq, N] ([T, Hq]), sink_stats [2, B, Hq, M]."""
    packed = q.dim() == 3
    heads = q.shape[1]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if not packed and is_token_major(q):
        out = _empty_gradient(out)
    tokens = q.shape[:-1] if packed else (q.shape[0], q.shape[2], heads)
    lse = q.new_empty(tokens, dtype=_lse_dtype(q))
    sink_stats = lse.new_empty(2, sink_positions.shape[0], heads, sink_positions.shape[1])
    return out, lse if packed else lse.transpose(1, 2), sink_stats


def empty_bwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradient(q), _empty_gradient(k), _empty_gradient(v)

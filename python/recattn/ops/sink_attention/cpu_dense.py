"""sink_attention of a dense batch on a CPU: PyTorch's flash attention, corrected at the sinks.

The bias touches M² of the N² scores. So an unbiased attention that returns its log-sum-exp is corrected: with
s_ij = scale · q_i·k_j, for each sink row i, over the sinks j that it sees,

    Δ_ij = exp(s_ij - lse_i) · expm1(β_ij)      z_i = 1 + Σ_j Δ_ij
    O_i ← (O_i + Σ_j Δ_ij v_j) / z_i            lse_i ← lse_i + log z_i

Two kinds of rows are recomputed over all their keys instead: where the bias removes much of the softmax sum, because
then the sums cancel; and where the scores are so large that rounding makes exp(s - lse) meaningless.

The backward runs the unbiased backward with the corrected O and lse, and adds what that misses between sinks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._options import SinkAttentionOptions
from recattn.ops._support import token_major
from recattn.reference.sink_attention import softmax_or_zeros

# A row is recomputed if it loses more than this share of what remains of its softmax sum. (z does not tell: a row may
# lose nearly all of its sum at some sinks and gain as much at others.)
_MAX_LOST_SHARE = 0.5
# A row is recomputed if its log-sum-exp rounds by more than this: exp(s - lse) may then be anything.
_MAX_LSE_ROUNDING = 1 / 16
# Sink rows are processed in blocks of at most this many (sink, sink) scores over all heads.
_BLOCK_SCORES = 1 << 22


class Sinks(NamedTuple):
    """The sinks of a dense batch. Padded sinks are not `live`, and their position is 0."""

    positions: Tensor  # [B, M]
    live: Tensor  # [B, M]
    bias: Tensor  # [B, 1 or Hq, M, M]

    def gather(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [B, H, M, ...], contiguous, at least float32."""
        if not (x.is_contiguous() or is_contiguous_token_major(x)):
            b, h = _batch_and_head(x)
            return _upcast(x[b, h, self.positions[:, None]])
        tokens, index = self._flat(x)
        return _upcast(tokens.index_select(0, index.flatten()).view(*index.shape, *x.shape[3:]))

    def write(self, x: Tensor, values: Tensor, *, add: bool = False) -> None:
        """Write, or add, [B, H, M, ...] into [B, H, N, ...] at the live sinks."""
        tokens, index = self._flat(x)
        index, values = index.flatten(), values.flatten(0, 2)
        if not bool(self.live.all()):
            live = self.live[:, None].expand(-1, x.shape[1], -1).flatten()
            index, values = index[live], values[live]
        if add:
            values = values + tokens.index_select(0, index)
        tokens.index_copy_(0, index, values.to(x.dtype))

    def _flat(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, N, ...] viewed with one axis for all tokens, and the index [B, H, M] of each sink on that axis.

        Selecting along one axis is many times faster than indexing three.
        """
        _, heads, length = x.shape[:3]
        b, h = _batch_and_head(x)
        positions = self.positions[:, None]
        if x.is_contiguous():
            return x.flatten(0, 2), (b * heads + h) * length + positions
        return x.transpose(1, 2).flatten(0, 2), (b * length + positions) * heads + h

    def visible(self, rows: slice, causal: bool) -> Tensor:
        """[B, 1, m, M], True where sink i of `rows` sees sink j."""
        visible = self.live[:, rows, None] & self.live[:, None, :]
        if causal:
            visible &= self.positions[:, rows, None] >= self.positions[:, None, :]
        return visible.unsqueeze(1)

    def trimmed(self) -> "Sinks":
        """Without the columns after the last live sink of any sequence."""
        used = torch.nonzero(self.live.any(dim=0))
        count = int(used[-1]) + 1 if len(used) else 0
        return Sinks(self.positions[:, :count], self.live[:, :count], self.bias[:, :, :count, :count])

    def row_blocks(self, heads: int) -> list[slice]:
        batch, sinks = self.positions.shape
        step = max(1, _BLOCK_SCORES // max(1, batch * heads * sinks))
        return [slice(start, start + step) for start in range(0, sinks, step)]


class Terms(NamedTuple):
    """Everything that shapes the softmax besides q and k."""

    sinks: Sinks
    sink_logits: Tensor | None  # [Hq, 1] in lse's dtype
    mask: Tensor | None  # [B, 1, 1, N], added to the scores
    options: SinkAttentionOptions


def is_contiguous_token_major(x: Tensor) -> bool:
    """Whether [B, H, N, ...] is [B, N, H, ...] contiguous in memory."""
    return x.transpose(1, 2).is_contiguous()


def _batch_and_head(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the first two axes, [B, 1, 1] and [H, 1]."""
    return torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])[:, None]


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- The unbiased attention ---


def _unbiased_fwd(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Unbiased out [B, Hq, N, Dv] and lse [B, Hq, N]."""
    options, token_major_q = terms.options, is_contiguous_token_major(q)
    kv_heads, groups, value_dim = k.shape[1], q.shape[1] // k.shape[1], v.shape[-1]
    factor, scale = _split_scale(options.scale, q.dtype)
    q, k, v, mask = _unbiased_inputs(q, k, v, terms.mask, factor)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, options.causal, attn_mask=mask, scale=scale
    )
    if not math.isfinite((lse / lse).sum()):
        # A row with a score of +inf or NaN is NaN. PyTorch's op hides such rows: it treats a few scores that are all
        # NaN or infinite as none (lse = 0), writes zeros for +inf in half precision, and leaves such rows out of its
        # backward (lse = +inf).
        diverged = (lse == math.inf) | (q * k).sum(-1).isnan() | ((lse == 0) & ~q.isfinite().all(-1))
        out, lse = out.masked_fill(diverged.unsqueeze(-1), math.nan), lse.masked_fill(diverged, math.nan)
    out = _ungroup_heads(out[..., :value_dim], kv_heads, groups)
    out = token_major(out) if token_major_q else out.contiguous()
    return out, token_major(_ungroup_heads(lse, kv_heads, groups))


def _unbiased_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the unbiased attention, as if it had returned `out` and `lse`."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    head_dim, value_dim = k.shape[-1], v.shape[-1]
    factor, scale = _split_scale(terms.options.scale, q.dtype)
    q, k, v, mask = _unbiased_inputs(q, k, v, terms.mask, factor)
    dout, out = (_group_heads(_pad_head_dim(x, q.shape[-1]), kv_heads, groups) for x in (dout, out))
    lse = _group_heads(lse, kv_heads, groups)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, terms.options.causal, attn_mask=mask, scale=scale
    )
    dq = dq if factor == 1 else dq.mul_(factor)
    dq, dk, dv = (_ungroup_heads(x, kv_heads, groups) for x in (dq, dk, dv))
    dk, dv = _sum_groups(dk, kv_heads), _sum_groups(dv, kv_heads)
    return token_major(dq[..., :head_dim]), token_major(dk[..., :head_dim]), token_major(dv[..., :value_dim])


def _split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """scale = factor · power of two: the queries are multiplied by the factor, PyTorch's op gets the power of two.

    The op scales before the product in its backward and after it in its forward. Where the scaling rounds, the
    backward's probabilities would not sum to one. (In half precision the queries have no bits to spare for a factor.)
    """
    if dtype.itemsize < 4:
        return 1.0, scale
    half_factor, exponent = math.frexp(scale)
    return 2 * half_factor, math.ldexp(1.0, exponent - 1)


def _unbiased_inputs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs as PyTorch's op takes them: one head dim, and as many key heads as query heads, without a copy of
    keys; q is multiplied by `factor`."""
    q = q if factor == 1 else q * factor
    kv_heads, groups, dim = k.shape[1], q.shape[1] // k.shape[1], max(q.shape[-1], v.shape[-1])
    q, k, v = (_pad_head_dim(x, dim) for x in (q, k, v))
    if groups > 1:
        k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v))
        mask = None if mask is None else mask.repeat_interleave(kv_heads, dim=0)
    return _group_heads(q, kv_heads, groups), k, v, mask


def _pad_head_dim(x: Tensor, dim: int) -> Tensor:
    x = F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x
    strides = x.stride()
    # If a second axis has stride 1 (rows overlap), PyTorch's op may put that axis last in its result.
    return x if strides[-1] == 1 and strides.count(1) == 1 else x.contiguous()


def _group_heads(x: Tensor, kv_heads: int, groups: int) -> Tensor:
    """[B, Hq, N, ...] -> [B·Hkv, G, N, ...]: query heads that share a key head become the heads of one batch entry."""
    return x if groups == 1 else x.unflatten(1, (kv_heads, groups)).flatten(0, 1)


def _ungroup_heads(x: Tensor, kv_heads: int, groups: int) -> Tensor:
    return x if groups == 1 else x.unflatten(0, (-1, kv_heads)).flatten(1, 2)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, ...] -> [B, Hkv, ...], summed over the query heads of each key head."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


# --- Forward ---


def dense_fwd(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and sink_stats; see `_correct`."""
    out, lse = _unbiased_fwd(q, k, v, terms)
    if terms.sink_logits is not None:
        # One more term in each row's softmax sum. The correction below starts from that sum.
        out *= torch.sigmoid(lse - terms.sink_logits).unsqueeze(-1)
        lse = token_major(torch.logaddexp(lse, terms.sink_logits))
    sink_stats = lse.new_empty(2, *lse.shape[:2], terms.sinks.positions.shape[1])
    if terms.sinks.positions.shape[1] > 0:
        _correct(out, lse, sink_stats, q, k, v, terms)
    return out, lse, sink_stats


def _correct(out: Tensor, lse: Tensor, sink_stats: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> None:
    """Correct the unbiased `out` and `lse` in place, and write row_max and row_sum of the sink rows to `sink_stats`:

    P_ij = exp(s_ij + β_ij - row_max_i) / row_sum_i        row_sum < 0: see `_mark_recomputed`
    """
    sinks = terms.sinks
    out_s, q_s, lse_s = sinks.gather(out), sinks.gather(q), sinks.gather(lse)
    k_s, v_s = (_repeat_heads(sinks.gather(x), q.shape[1]) for x in (k, v))
    row_max, row_sum = sink_stats.unsqueeze(-1)
    rounds = lse_s.abs() > _MAX_LSE_ROUNDING / torch.finfo(lse_s.dtype).eps
    recomputed = torch.empty_like(rounds)
    for rows in sinks.row_blocks(q.shape[1]):
        scores, biased_scores = _sink_scores(q_s, k_s, terms, rows)
        unbiased_sum = lse_s[:, :, rows, None]
        row_max[:, :, rows] = torch.maximum(biased_scores.amax(dim=-1, keepdim=True), unbiased_sum)
        p_change = _exp_(biased_scores, row_max[:, :, rows]).sub_(_exp_(scores, row_max[:, :, rows]))
        unbiased_sum = (unbiased_sum - row_max[:, :, rows]).exp_()
        row_sum[:, :, rows] = unbiased_sum + p_change.sum(dim=-1, keepdim=True)
        recomputed[:, :, rows] = _cancels(p_change, row_sum[:, :, rows])
        out_s[:, :, rows] = (out_s[:, :, rows] * unbiased_sum + p_change @ v_s) / row_sum[:, :, rows]
    lse_s = (row_max + row_sum.log()).squeeze(-1)
    recomputed = (recomputed | rounds) & sinks.live.unsqueeze(1)
    _mark_recomputed(row_sum, recomputed)
    for b, h, m in _chunks_of_rows(recomputed):
        p, lse_s[b, h, m] = _softmax_over_all_keys(q_s, k, terms, b, h, m)
        out_s[b, h, m] = p @ _upcast(v[b, _kv_head(h, q, k)])
    sinks.write(out, out_s)
    sinks.write(lse, lse_s)


def _sink_scores(q_s: Tensor, k_s: Tensor, terms: Terms, rows: slice) -> tuple[Tensor, Tensor]:
    """s and s + β of some sink rows over the sinks, [B, Hq, m, M]; -inf where a sink is not visible."""
    sinks, options = terms.sinks, terms.options
    hidden = ~sinks.visible(rows, options.causal)
    scores = ((q_s[:, :, rows] * options.scale) @ k_s.transpose(-2, -1)).masked_fill_(hidden, -math.inf)
    return scores, scores + sinks.bias[:, :, rows].masked_fill(hidden, 0)


def _exp_(scores: Tensor, row_max: Tensor) -> Tensor:
    """exp(scores - row_max), in place."""
    return scores.sub_(row_max).exp_()


def _cancels(p_change: Tensor, row_sum: Tensor) -> Tensor:
    """[B, Hq, m], True where the correction removes much of the remaining row_sum."""
    lost = -p_change.clamp(max=0).sum(dim=-1)
    return ~(lost < _MAX_LOST_SHARE * row_sum.squeeze(-1))  # True for NaN


# --- Rows that are recomputed over all their keys ---


def _mark_recomputed(row_sum: Tensor, recomputed: Tensor) -> None:
    """Mark rows for the backward by a negative row_sum, which no other row has."""
    row_sum[recomputed] = -1


def _is_recomputed(row_sum: Tensor, live: Tensor) -> Tensor:
    """The marked rows, [B, Hq, M]."""
    return (row_sum < 0) & live.unsqueeze(1)


def _chunks_of_rows(recomputed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(batch entry, head, sinks) of the rows in [B, Hq, M], at most 128 sinks at a time."""
    for b, h in torch.nonzero(recomputed.any(dim=-1)).tolist():
        for m in torch.nonzero(recomputed[b, h]).squeeze(1).split(128):
            yield b, h, m


def _softmax_over_all_keys(q_s: Tensor, k: Tensor, terms: Terms, b: int, h: int, m: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [m, N] and lse [m] of the sinks `m` of one head."""
    scores = _scores_over_all_keys(q_s, k, terms, b, h, m)
    p, lse = softmax_or_zeros(scores), torch.logsumexp(scores, dim=-1)
    if terms.sink_logits is None:
        return p, lse
    sink_logit = terms.sink_logits[h]
    return p * torch.sigmoid(lse - sink_logit).unsqueeze(-1), torch.logaddexp(lse, sink_logit)


def _scores_over_all_keys(q_s: Tensor, k: Tensor, terms: Terms, b: int, h: int, m: Tensor) -> Tensor:
    """Biased and masked scores [m, N] of the sinks `m` of one head."""
    sinks, options = terms.sinks, terms.options
    keys = _upcast(k[b, _kv_head(h, q_s, k)])
    scores = (q_s[b, h, m] * options.scale) @ keys.T
    live = sinks.live[b]
    scores[:, sinks.positions[b, live]] += sinks.bias[b, h % sinks.bias.shape[1], m][:, live]
    if terms.mask is not None:
        scores += terms.mask[b, 0]
    if options.causal:
        future = torch.arange(keys.shape[0]) > sinks.positions[b, m].unsqueeze(1)
        scores.masked_fill_(future, -math.inf)
    return scores


def _kv_head(h: int, q: Tensor, k: Tensor) -> int:
    return h * k.shape[1] // q.shape[1]


# --- Backward ---


def dense_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink_stats: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, dsink_logits."""
    sinks, scale = terms.sinks, terms.options.scale
    dsink_logits = lse.new_empty(0)
    if terms.sink_logits is not None:
        delta = (_upcast(dout) * out).sum(dim=-1, dtype=torch.float64)  # [B, Hq, N]
        dsink_logits = -((terms.sink_logits - lse).exp() * delta).sum(dim=(0, 2))
    if sinks.positions.shape[1] == 0:
        return *_unbiased_bwd(dout, q, k, v, out, lse, terms), torch.zeros_like(sinks.bias), dsink_logits

    heads, kv_heads = q.shape[1], k.shape[1]
    dout_s, q_s = sinks.gather(dout), sinks.gather(q)
    k_s, v_s = (_repeat_heads(sinks.gather(x), heads) for x in (k, v))
    delta = (dout_s.double() * sinks.gather(out)).sum(dim=-1, keepdim=True)  # [B, Hq, M, 1]
    dq_s, dk_s, dv_s = (torch.zeros_like(x) for x in (q_s, k_s, v_s))
    dbias = torch.zeros_like(sinks.bias)
    row_max, row_sum = sink_stats
    recomputed = _is_recomputed(row_sum, sinks.live)
    row_max = row_max.masked_fill(recomputed, math.inf).unsqueeze(-1)  # p = 0: these rows follow below
    for rows in sinks.row_blocks(heads):
        scores, biased_scores = _sink_scores(q_s, k_s, terms, rows)
        block_sum = row_sum[:, :, rows, None]
        p = _exp_(biased_scores, row_max[:, :, rows]).div_(block_sum)
        # What the unbiased backward lacks of p.
        p_change = torch.sub(p, _exp_(scores, row_max[:, :, rows]).div_(block_sum), out=scores)
        # In float64: in a row with one dominant key, dp and delta are nearly equal.
        dp = dout_s[:, :, rows].double() @ v_s.double().transpose(-2, -1)
        dp = (dp - delta[:, :, rows]).to(lse.dtype)
        dbias[:, :, rows] = (p.mul_(dp)).sum_to_size(dbias[:, :, rows].shape)
        dv_s += p_change.transpose(-2, -1) @ dout_s[:, :, rows]
        ds = p_change.mul_(dp).mul_(scale)
        dq_s[:, :, rows] = ds @ k_s
        dk_s += ds.transpose(-2, -1) @ q_s[:, :, rows]

    if bool(recomputed.any()):  # lse = +inf takes these rows out of the unbiased backward
        lse = lse.clone()
        sinks.write(lse, sinks.gather(lse).masked_fill(recomputed, math.inf))
    dq, dk, dv = _unbiased_bwd(dout, q, k, v, out, lse, terms)
    sinks.write(dq, dq_s, add=True)
    sinks.write(dk, _sum_groups(dk_s, kv_heads), add=True)
    sinks.write(dv, _sum_groups(dv_s, kv_heads), add=True)
    for b, h, m in _chunks_of_rows(recomputed):
        kv_head, live = _kv_head(h, q, k), sinks.live[b]
        p, _ = _softmax_over_all_keys(q_s, k, terms, b, h, m)  # [m, N]
        dp = dout_s[b, h, m].double() @ v[b, kv_head].double().T
        ds = p * (dp - delta[b, h, m]).to(lse.dtype)
        dbias[b, h % dbias.shape[1]][m[:, None], torch.nonzero(live).T] += ds[:, sinks.positions[b, live]]
        ds *= scale
        dq[b, h, sinks.positions[b, m]] += (ds @ _upcast(k[b, kv_head])).to(dq.dtype)
        dk[b, kv_head] += (ds.T @ q_s[b, h, m]).to(dk.dtype)
        dv[b, kv_head] += (p.T @ dout_s[b, h, m]).to(dv.dtype)
    return dq, dk, dv, dbias, dsink_logits

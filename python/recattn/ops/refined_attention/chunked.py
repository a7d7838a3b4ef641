"""refined_attention by chunked PyTorch matmuls, on any device and for any length.

A chunk is a few batch-heads, on a CPU as many as stay in its cache. The backward recomputes the forward of its chunk,
so only the inputs are saved. The product x = A W is computed in one of two ways:

    linear     A_i W = q_i · Σ_{j≤i} k_j ⊗ W_j, a running state over blocks of positions: where A holds raw logits and
               is not needed for anything else
    by rows    a block of rows of A at a time

With R ≥ N the product W_q W_kᵀ is folded, Q'K'ᵀ = A (W_q W_kᵀ) Aᵀ, which needs fewer matmuls.

Shapes in comments: s batch-heads of a chunk, n of its positions, r rows of a block, c keys that the block may see.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recattn._options import RefinedAttentionOptions
from recattn.ops._support import packed_sequences, resolve_scale
from recattn.reference.wasserstein_attention import centre_

# Rows of a block, in the linear form its positions.
BLOCK_ROWS = 64
# Elements of the largest tensor of a chunk of more than one batch-head.
_CHUNK_ELEMENTS = 1 << 17
_CHUNK_ELEMENTS_ON_GPU = 1 << 25


# --- Chunks ---


class Chunk(NamedTuple):
    """Batch-heads that are computed together, and the positions that hold their tokens."""

    batch_heads: slice | Tensor
    positions: slice
    padding: Tensor | None  # [s, n], True at padding

    def load(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """[B·H, N, D] -> [s, n, D], zero at padding."""
        values = tensor[self.batch_heads, self.positions].to(dtype)
        return values if self.padding is None else values.masked_fill(self.padding.unsqueeze(-1), 0)

    def store(self, tensor: Tensor, values: Tensor) -> None:
        """[s, n, D] -> [B·H, N, D], zero at padding."""
        if self.padding is not None:
            values.masked_fill_(self.padding.unsqueeze(-1), 0)
        tensor[self.batch_heads, self.positions] = values.to(tensor.dtype)


class Windows(NamedTuple):
    """The positions of each batch-head's tokens."""

    starts: Tensor  # [B·H]
    lengths: Tensor

    def at(self, batch_heads: slice | Tensor) -> "Windows":
        return Windows(self.starts[batch_heads], self.lengths[batch_heads])

    def padding(self, positions: slice) -> Tensor:
        """[s, n], True at padding."""
        position = torch.arange(positions.start, positions.stop, device=self.lengths.device)
        start = self.starts.unsqueeze(1)
        return (position < start) | (position >= start + self.lengths.unsqueeze(1))


def windows_of(seq_lens: Tensor | None, seq_starts: Tensor | None, heads: int) -> Windows | None:
    """The windows of sequences, each for all of `heads`; None: all have all positions."""
    if seq_lens is None:
        return None
    starts = torch.zeros_like(seq_lens) if seq_starts is None else seq_starts
    return Windows(starts.repeat_interleave(heads), seq_lens.repeat_interleave(heads))


def cut_chunks(count: int, n: int, windows: Windows | None, width: int, device: torch.device) -> Iterator[Chunk]:
    """Cut `count` batch-heads of `n` positions into chunks; on a CPU by similar lengths."""
    if windows is None or device.type != "cpu":  # sorting the lengths would synchronize with a GPU
        size = _batch_heads_per_chunk(n, width, device)
        for first in range(0, count if n else 0, size):
            batch_heads, positions = slice(first, first + size), slice(0, n)
            padding = None if windows is None else windows.at(batch_heads).padding(positions)
            yield Chunk(batch_heads, positions, padding)
        return
    order = windows.lengths.argsort(descending=True, stable=True)
    descending = windows.lengths[order].tolist()
    first, count = 0, count - descending.count(0)
    while first < count:
        batch_heads = order[first : min(count, first + _batch_heads_per_chunk(descending[first], width, device))]
        chunk = windows.at(batch_heads)
        positions = slice(int(chunk.starts.min()), int((chunk.starts + chunk.lengths).max()))
        yield Chunk(batch_heads, positions, chunk.padding(positions))
        first += len(batch_heads)


def _batch_heads_per_chunk(n: int, width: int, device: torch.device) -> int:
    elements = _CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS_ON_GPU
    return max(1, elements // max(1, n * max(width, min(n, BLOCK_ROWS))))


class Mask(NamedTuple):
    """Which keys each row of a chunk sees."""

    future: Tensor | None  # [BLOCK_ROWS, BLOCK_ROWS], -inf above the diagonal; None: not causal
    padding: Tensor | None  # [s, n]

    def blocks(self, n: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of rows, each with the keys that any of its rows sees. The first block sees all keys."""
        for start in reversed(range(0, n, BLOCK_ROWS)):
            stop = min(start + BLOCK_ROWS, n)
            yield slice(start, stop), slice(0, n if self.future is None else stop)

    def lengths(self) -> Tensor | None:
        """[s], the valid tokens of each batch-head (None: no padding)."""
        return None if self.padding is None else (~self.padding).sum(1)

    def zero_(self, entries: Tensor, rows: slice) -> Tensor:
        """Zero the future in [s, r, c]."""
        return entries if self.future is None else entries.tril_(rows.start)

    def softmax_(self, scores: Tensor, rows: slice) -> Tensor:
        """Softmax of [s, r, c] over the keys that a row sees, in place; zero elsewhere and in rows of padding."""
        if self.future is not None:
            r = scores.shape[1]
            # Zeroed first, because -inf added to +inf or NaN is NaN. masked_fill would take many times longer.
            scores[..., rows.start :].tril_().add_(self.future[:r, :r])
        if self.padding is not None:
            scores.masked_fill_(self.padding[:, None, : scores.shape[2]], -math.inf)
        torch.softmax(scores, dim=-1, out=scores)
        if self.padding is not None:
            scores.masked_fill_(self.padding[:, rows, None], 0)
        return scores


def multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b; out may be a view."""
    out.baddbmm_(a, b, beta=int(add))


def _multiply_and_sum(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = Σ_s aᵀ b, or out += Σ_s aᵀ b: [s, m, n], [s, m, p] -> [n, p]."""
    out.addmm_(a.flatten(0, 1).T, b.flatten(0, 1), beta=int(add))


def softmax_backward_(dp: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores, in place of dp, that of p = softmax(scores)."""
    return torch.ops.aten._softmax_backward_data.out(dp, weights, -1, weights.dtype, grad_input=dp)


# --- A and its products, x = A W ---


def _source_rows(q: Tensor, k: Tensor, rows: slice, keys: slice, mask: Mask, source: str) -> Tensor:
    """Rows of A [s, r, c], zero at padding: of "logits" because the tokens there are zero."""
    logits = torch.bmm(q[:, rows], k[:, keys].mT)
    return mask.zero_(logits, rows) if source == "logits" else mask.softmax_(logits, rows)


def project_rows(q: Tensor, k: Tensor, w: Tensor, mask: Mask, source: str, keep: bool) -> tuple[Tensor, Tensor | None]:
    """A W [s, n, P], and with `keep` A [s, n, n]."""
    s, n, _ = q.shape
    w = w.expand(s, -1, -1)
    x = q.new_empty(s, n, w.shape[2])
    a = q.new_empty(s, n, n) if keep else None
    for rows, keys in mask.blocks(n):
        a_rows = _source_rows(q, k, rows, keys, mask, source)
        multiply(x[:, rows], a_rows, w[:, keys])
        if a is not None:
            a[:, rows, keys] = a_rows
            a[:, rows, keys.stop :] = 0
    return x, a


def project_rows_backward(
    dx: Tensor, da: Tensor | None, q: Tensor, k: Tensor, w: Tensor, a: Tensor | None, mask: Mask, source: str
) -> tuple[Tensor, Tensor, Tensor]:
    n = q.shape[1]
    dq, dk, dw = torch.empty_like(q), torch.empty_like(k), torch.empty_like(w)
    for rows, keys in mask.blocks(n):
        add = rows.stop < n
        a_rows = _source_rows(q, k, rows, keys, mask, source) if a is None else a[:, rows, keys]
        da_rows = dx[:, rows] @ w[keys].T
        if da is not None:
            da_rows += da[:, rows, keys]
        _multiply_and_sum(dw[keys], a_rows, dx[:, rows], add)
        dlogits = mask.zero_(da_rows, rows) if source == "logits" else softmax_backward_(da_rows, a_rows)
        multiply(dq[:, rows], dlogits, k[:, keys])
        multiply(dk[:, keys], dlogits.mT, q[:, rows], add)
    return dq, dk, dw


def project_linear(q: Tensor, k: Tensor, w: Tensor, causal: bool) -> Tensor:
    """A W [s, n, P] of raw logits, by the linear form."""
    if not causal:
        return q @ _state(k, w)
    x = q.new_empty(*q.shape[:2], w.shape[1])
    for rows, state in _prefix_states(k, w):
        multiply(x[:, rows], torch.bmm(q[:, rows], k[:, rows].mT).tril_(), w[rows].expand(len(x), -1, -1))
        if state is not None:
            multiply(x[:, rows], q[:, rows], state, add=True)
    return x


def project_linear_backward(dx: Tensor, q: Tensor, k: Tensor, w: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    dw = torch.empty_like(w)
    if not causal:
        state, dstate = _state(k, w), q.mT @ dx
        _multiply_and_sum(dw, k.mT, dstate)
        return dx @ state.mT, w @ dstate.mT, dw
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dstate = None  # gradient of the state that the later rows read [s, D, P]
    for rows, state in reversed(list(_prefix_states(k, w))):
        q_rows, k_rows, w_rows, dx_rows = q[:, rows], k[:, rows], w[rows], dx[:, rows]
        a = torch.bmm(q_rows, k_rows.mT).tril_()
        da = (dx_rows @ w_rows.T).tril_()
        multiply(dq[:, rows], da, k_rows)
        multiply(dk[:, rows], da.mT, q_rows)
        _multiply_and_sum(dw[rows], a, dx_rows)
        if state is not None:
            multiply(dq[:, rows], dx_rows, state.mT, add=True)
        if dstate is not None:
            multiply(dk[:, rows], w_rows.expand(len(k), -1, -1), dstate.mT, add=True)
            _multiply_and_sum(dw[rows], k_rows.mT, dstate, add=True)
        dstate = q_rows.mT @ dx_rows if dstate is None else dstate.baddbmm_(q_rows.mT, dx_rows)
    return dq, dk, dw


def _state(k: Tensor, w: Tensor) -> Tensor:
    """Σ_j k_j ⊗ W_j: [s, n, D], [n, P] -> [s, D, P]."""
    return k.mT @ w


def _prefix_states(k: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Blocks of positions, each with the state of those before it (None for the first)."""
    state = None
    n = k.shape[1]
    for start in range(0, n, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, n))
        yield rows, state
        if rows.stop < n:
            added = _state(k[:, rows], w[rows])
            state = added if state is None else state + added


# --- M, from x and A ---


class Plan(NamedTuple):
    """How the chunks of a call are computed."""

    mechanism: str
    source: str
    causal: bool
    scale: float
    rank: int  # R
    folded: bool  # x starts with A (W_q W_kᵀ), and the rows of A are its keys; else x starts with [A W_q, A W_k]

    @property
    def has_values(self) -> bool:
        return self.mechanism in ("value", "additive")

    @property
    def keeps_a(self) -> bool:
        return self.folded or self.mechanism == "additive"

    @property
    def linear(self) -> bool:
        return self.source == "logits" and not self.keeps_a


def _split(x: Tensor, a: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and values of the second attention: views of x [s, n, P] and A [s, n, n]."""
    width = x.shape[2] - x.shape[1] if plan.has_values else x.shape[2]
    values = x[..., width:] if plan.has_values else None
    if plan.folded and a is not None:
        return x[..., :width], a, values
    queries, keys = x[..., :width].chunk(2, dim=-1)
    return queries, keys, values


def _refine(x: Tensor, a: Tensor | None, mask: Mask, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries and keys whose products are the scores, the values, and the mean subtracted from Gaussians."""
    if plan.mechanism == "stochastic":
        queries, keys, mean = _gaussian_operands(x, mask.lengths(), plan.rank)
        return queries, keys, None, mean
    return *_split(x, a, plan), None


def _gaussian_operands(x: Tensor, lengths: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors whose products are -W²/√R, up to the query's own term, which changes no softmax; the mean of keys."""
    gaussian_q, gaussian_k = map(gaussians, x.chunk(2, dim=-1))
    mean = centre_(gaussian_q, gaussian_k, lengths)
    queries = torch.cat([gaussian_q, torch.ones_like(gaussian_q[..., :1])], dim=-1) * (2 / math.sqrt(rank))
    return queries, torch.cat([gaussian_k, gaussian_k.square().sum(-1, keepdim=True) / -2], dim=-1), mean


def _gaussian_operands_backward(
    dqueries: Tensor, dkeys: Tensor, queries: Tensor, keys: Tensor, mean: Tensor, rank: int
) -> Tensor:
    scale = 2 / math.sqrt(rank)
    gaussian_q, gaussian_k = queries[..., :-1] / scale, keys[..., :-1]
    dgaussian_q, dgaussian_k = dqueries[..., :-1] * scale, dkeys[..., :-1] - gaussian_k * dkeys[..., -1:]
    dx_q, dx_k = gaussians_backward(dgaussian_q, gaussian_q, mean), gaussians_backward(dgaussian_k, gaussian_k, mean)
    return torch.cat([dx_q, dx_k], dim=-1)


def gaussians(x: Tensor) -> Tensor:
    """[mean, x] -> [mean, √Σ - 1] with Σ = elu(x) + 1. The -1 changes no distance; near 0 products do not cancel."""
    mean, x = x.chunk(2, dim=-1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    std = torch.where(x > 0, x / ((1 + x).sqrt() + 1), (x / 2).expm1())
    return torch.cat([mean, std.to(mean.dtype)], dim=-1)


def gaussians_backward(dgaussians: Tensor, gaussians: Tensor, mean: Tensor) -> Tensor:
    """The gradient of x, from `gaussians(x)` with `mean` subtracted."""
    dmean, dstd = dgaussians.chunk(2, dim=-1)
    std = gaussians.chunk(2, dim=-1)[1].to(dstd.dtype) + (mean.chunk(2, dim=-1)[1] + 1)
    std = std.clamp(min=0)  # near 0 the sum may be negative, and 1 / std a large negative number
    return torch.cat([dmean, dstd * torch.minimum(std, 1 / std) / 2], dim=-1)


# --- One chunk ---


def _project(q: Tensor, k: Tensor, w: Tensor, mask: Mask, plan: Plan) -> tuple[Tensor, Tensor | None]:
    if plan.linear:
        return project_linear(q, k, w, plan.causal), None
    return project_rows(q, k, w, mask, plan.source, plan.keeps_a)


def _project_backward(
    dx: Tensor, da: Tensor | None, q: Tensor, k: Tensor, w: Tensor, a: Tensor | None, mask: Mask, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dw."""
    if plan.linear:
        return project_linear_backward(dx, q, k, w, plan.causal)
    return project_rows_backward(dx, da, q, k, w, a, mask, plan.source)


def _attend(x: Tensor, a: Tensor | None, v: Tensor, mask: Mask, plan: Plan) -> Tensor:
    """softmax(mask(M)) V."""
    queries, keys, values, _ = _refine(x, a, mask, plan)
    added = a if plan.mechanism == "additive" else None
    out = torch.empty_like(v)
    for rows, columns in mask.blocks(v.shape[1]):
        m = torch.bmm(queries[:, rows], keys[:, columns].mT)  # [s, r, c]
        if values is not None:
            m = torch.bmm(mask.softmax_(m, rows), values[:, columns, columns])
        if added is not None:
            m += added[:, rows, columns]
        multiply(out[:, rows], mask.softmax_(m, rows), v[:, columns])
    return out


def _attend_backward(
    dout: Tensor, x: Tensor, a: Tensor | None, v: Tensor, mask: Mask, plan: Plan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dv, dx and, where A is kept, its direct gradient."""
    queries, keys, values, mean = _refine(x, a, mask, plan)
    dv, dx, da = torch.empty_like(v), torch.empty_like(x), None if a is None else torch.zeros_like(a)
    dqueries, dkeys, dvalues = _split(dx, da, plan)
    added, dadded = (a, da) if plan.mechanism == "additive" else (None, None)
    if mean is not None:  # "stochastic"
        dqueries, dkeys = torch.empty_like(queries), torch.empty_like(keys)
    n = v.shape[1]
    for rows, columns in mask.blocks(n):
        add = rows.stop < n
        m = torch.bmm(queries[:, rows], keys[:, columns].mT)  # [s, r, c]
        p_values = None
        if values is not None:
            p_values = mask.softmax_(m, rows)
            m = torch.bmm(p_values, values[:, columns, columns])
        if added is not None:
            m += added[:, rows, columns]
        p = mask.softmax_(m, rows)
        multiply(dv[:, columns], p.mT, dout[:, rows], add)
        dm = softmax_backward_(torch.bmm(dout[:, rows], v[:, columns].mT), p)
        ds = dm
        if values is not None and dvalues is not None and p_values is not None:
            multiply(dvalues[:, columns, columns], p_values.mT, dm, add)
            ds = softmax_backward_(torch.bmm(dm, values[:, columns, columns].mT), p_values)
        multiply(dqueries[:, rows], ds, keys[:, columns])
        multiply(dkeys[:, columns], ds.mT, queries[:, rows], add)
        if dadded is not None:
            dadded[:, rows, columns].add_(dm)
    if mean is not None:  # "stochastic"
        dx = _gaussian_operands_backward(dqueries, dkeys, queries, keys, mean, plan.rank)
    return dv, dx, da


def _forward_chunk(q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Mask, plan: Plan) -> Tensor:
    x, a = _project(q, k, w, mask, plan)
    return _attend(x, a, v, mask, plan)


def _backward_chunk(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Mask, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [s, n, ·] and dw [n, P]."""
    x, a = _project(q, k, w, mask, plan)
    dv, dx, da = _attend_backward(dout, x, a, v, mask, plan)
    del x  # frees its memory
    dq, dk, dw = _project_backward(dx, da, q, k, w, a, mask, plan)
    return dq, dk, dv, dw


# --- All chunks ---


def plan_of(q: Tensor, w_q: Tensor, options: RefinedAttentionOptions) -> Plan:
    stochastic = options.mechanism == "stochastic"
    rank = w_q.shape[-1] // 2 if stochastic else w_q.shape[-1]
    scale = resolve_scale(options.scale, q.shape[3])
    folded = not stochastic and rank >= q.shape[2]
    return Plan(options.mechanism, options.source, options.causal, scale, rank, folded)


class Weights:
    """The matrices of one head side by side, as the chunks read them, and the sum of the chunks' gradients."""

    def __init__(self, plan: Plan, w_q: Tensor, w_k: Tensor, w_v: Tensor | None = None):
        # W_q takes the 1/√R of the scores. "stochastic" scales its distances instead.
        self.scale = 1.0 if plan.mechanism == "stochastic" else 1 / math.sqrt(plan.rank)
        self.w_q, self.w_k = w_q * self.scale, w_k
        self.folded = plan.folded
        self.matrices = [self.w_q @ w_k.T] if self.folded else [self.w_q, w_k]
        if w_v is not None:
            self.matrices.append(w_v)
        self.gradients = [torch.zeros_like(matrix) for matrix in self.matrices]

    def rows(self, positions: slice) -> Tensor:
        """[n, P]"""
        return torch.cat(self._cut(self.matrices, positions), dim=1)

    def add_gradient(self, positions: slice, dw: Tensor) -> None:
        gradients = self._cut(self.gradients, positions)
        for gradient, chunk in zip(gradients, dw.split([g.shape[1] for g in gradients], dim=1), strict=True):
            gradient += chunk

    def _finish(self) -> list[Tensor]:
        if self.folded:
            dproduct, *dw_v = self.gradients
            # Its terms are larger than their sums: in float32 this would be the largest error of all.
            dproduct, w_q, w_k = (x.double() for x in (dproduct, self.w_q, self.w_k))
            return [dproduct @ w_k * self.scale, dproduct.T @ w_q, *dw_v]
        dw_q, *others = self.gradients
        return [dw_q * self.scale, *others]

    def add_to(self, totals: list[Tensor]) -> None:
        """Add the gradients of w_q, w_k and, if any, w_v."""
        for total, gradient in zip(totals, self._finish(), strict=True):
            total.add_(gradient)

    def _cut(self, matrices: list[Tensor], positions: slice) -> list[Tensor]:
        # The columns of W_q W_kᵀ and of W_v are positions too.
        return [w[positions, positions] if self.folded or i == 2 else w[positions] for i, w in enumerate(matrices)]


def heads_apart(q: Tensor, matrices: list[Tensor]) -> list[int | None]:
    """The heads one by one if any matrix is [H, ...]; else [None], all heads together."""
    return list(range(q.shape[1])) if any(w.dim() == 3 for w in matrices) else [None]


def batch_heads_of(tensor: Tensor, head: int | None) -> Tensor:
    """[B, H, N, D] -> [B·H, N, D], or [B, N, D] of one head."""
    return tensor.flatten(0, 1) if head is None else tensor[:, head]


def leading(matrices: list[Tensor], head: int | None, n: int) -> list[Tensor]:
    """The part of one head's w_q, w_k and w_v that `n` positions use."""
    w_q, w_k, *w_v = (w if w.dim() == 2 else w[head] for w in matrices)
    return [w_q[:n], w_k[:n], *(w[:n, :n] for w in w_v)]


def _head_chunks(
    q: Tensor, v: Tensor, seq_lens: Tensor | None, seq_starts: Tensor | None, head: int | None, weights: Weights
) -> Iterator[Chunk]:
    batch, all_heads, n, _ = q.shape
    heads = all_heads if head is None else 1
    width = max(q.shape[3], v.shape[3], sum(w.shape[1] for w in weights.matrices))
    return cut_chunks(batch * heads, n, windows_of(seq_lens, seq_starts, heads), width, q.device)


def chunked_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    matrices: list[Tensor],
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    plan: Plan,
) -> Tensor:
    out, future = new_output(v, seq_lens), future_in_block(q.shape[2], plan.causal, matrices[0])
    for head in heads_apart(q, matrices):
        weights = Weights(plan, *leading(matrices, head, q.shape[2]))
        inputs, out_batch_heads = [batch_heads_of(x, head) for x in (q, k, v)], batch_heads_of(out, head)
        for chunk in _head_chunks(q, v, seq_lens, seq_starts, head, weights):
            q_chunk, k_chunk, v_chunk = (chunk.load(x, matrices[0].dtype) for x in inputs)
            mask = Mask(future, chunk.padding)
            out_chunk = _forward_chunk(
                q_chunk * plan.scale, k_chunk, v_chunk, weights.rows(chunk.positions), mask, plan
            )
            chunk.store(out_batch_heads, out_chunk)
    return out


def chunked_bwd(dout, q, k, v, matrices, seq_lens, seq_starts, plan) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    dq, dk, dv = (new_output(x, seq_lens) for x in (q, k, v))
    dmatrices = [torch.zeros_like(w) for w in matrices]
    future = future_in_block(q.shape[2], plan.causal, matrices[0])
    for head in heads_apart(q, matrices):
        weights = Weights(plan, *leading(matrices, head, q.shape[2]))
        inputs = [batch_heads_of(x, head) for x in (dout, q, k, v)]
        dq_batch_heads, dk_batch_heads, dv_batch_heads = (batch_heads_of(x, head) for x in (dq, dk, dv))
        for chunk in _head_chunks(q, v, seq_lens, seq_starts, head, weights):
            dout_chunk, q_chunk, k_chunk, v_chunk = (chunk.load(x, matrices[0].dtype) for x in inputs)
            mask = Mask(future, chunk.padding)
            w = weights.rows(chunk.positions)
            dq_chunk, dk_chunk, dv_chunk, dw = _backward_chunk(
                dout_chunk, q_chunk * plan.scale, k_chunk, v_chunk, w, mask, plan
            )
            chunk.store(dq_batch_heads, dq_chunk.mul_(plan.scale))
            chunk.store(dk_batch_heads, dk_chunk)
            chunk.store(dv_batch_heads, dv_chunk)
            weights.add_gradient(chunk.positions, dw)
            del dq_chunk, dk_chunk, dv_chunk  # frees their memory for the next chunk
        weights.add_to(leading(dmatrices, head, q.shape[2]))
    return [dq, dk, dv, *dmatrices]


def new_output(like: Tensor, seq_lens: Tensor | None) -> Tensor:
    """Contiguous; zero where no chunk writes."""
    return like.new_empty(like.shape) if seq_lens is None else like.new_zeros(like.shape)


def future_in_block(n: int, causal: bool, like: Tensor) -> Tensor | None:
    """Mask.future: -inf above the diagonal (None: not causal)."""
    size = min(n, BLOCK_ROWS)
    return torch.full((size, size), -math.inf, dtype=like.dtype, device=like.device).triu_(1) if causal else None


def in_compute_dtype(*weights: Tensor | None) -> list[Tensor]:
    """Those that are not None, in the dtype of the computation."""
    return [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights if w is not None]


# --- The operators' kernels ---


def refined_attention_fwd(
    q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, options: RefinedAttentionOptions
) -> Tensor:
    matrices = in_compute_dtype(w_q, w_k, w_v)
    if cu_seqlens is None:
        return chunked_fwd(q, k, v, matrices, seq_lens, seq_starts, plan_of(q, w_q, options))
    out = v.new_empty(v.shape)
    for tokens in packed_sequences(cu_seqlens, w_q, options.max_seqlen):
        q_b, k_b, v_b = (_as_batch(x[tokens]) for x in (q, k, v))
        out_b = chunked_fwd(q_b, k_b, v_b, matrices, None, None, plan_of(q_b, w_q, options))
        out[tokens] = out_b[0].transpose(0, 1)
    return out


def refined_attention_bwd(
    dout, q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, options: RefinedAttentionOptions
) -> list[Tensor]:
    matrices = in_compute_dtype(w_q, w_k, w_v)
    if cu_seqlens is None:
        plan = plan_of(q, w_q, options)
        dq, dk, dv, *dmatrices = chunked_bwd(dout, q, k, v, matrices, seq_lens, seq_starts, plan)
    else:
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        dmatrices = [torch.zeros_like(w) for w in matrices]
        for tokens in packed_sequences(cu_seqlens, w_q, options.max_seqlen):
            dout_b, q_b, k_b, v_b = (_as_batch(x[tokens]) for x in (dout, q, k, v))
            gradients = chunked_bwd(dout_b, q_b, k_b, v_b, matrices, None, None, plan_of(q_b, w_q, options))
            for gradient, gradient_b in zip((dq, dk, dv), gradients, strict=False):
                gradient[tokens] = gradient_b[0].transpose(0, 1)
            for dmatrix, dmatrix_b in zip(dmatrices, gradients[3:], strict=True):
                dmatrix += dmatrix_b
    return [dq, dk, dv, *(dmatrix.to(w_q.dtype) for dmatrix in dmatrices)]


def _as_batch(x: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D]"""
    return x.transpose(0, 1).unsqueeze(0)

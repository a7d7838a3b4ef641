"""refined_attention by PyTorch's products, on any device and for any length.

A slice of (batch, head) pairs is computed at a time, on a CPU small enough to stay in the cache, and the backward
recomputes the forward of its slice: nothing but the inputs is saved. A product with A is taken one of two ways. Where A
itself is needed no further and holds raw logits, it is linear attention with W for values,

    A_i W = q_i · Σ_{j≤i} k_j ⊗ W_j,

a running state over chunks of positions. Otherwise blocks of A's rows are computed and multiplied.
With R ≥ N the product W_q W_kᵀ is folded, Q'K'ᵀ = A (W_q W_kᵀ) Aᵀ, which needs fewer products.
Comments count the pairs of a slice as s, its positions as n, the rows of a block as r and the keys they may see as c.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.reference.wasserstein_attention import centre_

# Rows of a block, and positions of a chunk of the linear form.
BLOCK_ROWS = 64
# Elements of the largest tensor of a slice that holds more than one pair.
_SLICE_ELEMENTS = 1 << 17
_SLICE_ELEMENTS_ON_GPU = 1 << 25


class Settings(NamedTuple):
    mechanism: str
    source: str
    causal: bool
    left_padded: bool
    scale: float | None


# --- What a slice is ---


class Slice(NamedTuple):
    """Pairs computed together, and the positions that hold their tokens."""

    pairs: slice | Tensor
    positions: slice
    padding: Tensor | None  # [s, n], True at padding

    def load(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """[pairs, N, D] -> [s, n, D], zero at padding whatever it held."""
        values = tensor[self.pairs, self.positions].to(dtype)
        return values if self.padding is None else values.masked_fill(self.padding.unsqueeze(-1), 0)

    def store(self, tensor: Tensor, values: Tensor) -> None:
        """[s, n, D] -> [pairs, N, D], zero at padding."""
        if self.padding is not None:
            values.masked_fill_(self.padding.unsqueeze(-1), 0)
        tensor[self.pairs, self.positions] = values.to(tensor.dtype)


def cut_slices(
    count: int, n: int, lengths: Tensor | None, left_padded: bool, width: int, device: torch.device
) -> Iterator[Slice]:
    """Cut `count` pairs of `n` positions into slices; on a CPU with `lengths` [count], similar lengths together."""
    if lengths is None or device.type != "cpu":  # elsewhere sorting the lengths would wait for the device
        size = _pairs_per_slice(n, width, device)
        for first in range(0, count if n else 0, size):
            pairs = slice(first, first + size)
            padding = None if lengths is None else _padding(n, lengths[pairs], left_padded)
            yield Slice(pairs, slice(0, n), padding)
        return
    order = lengths.argsort(descending=True, stable=True)
    descending = lengths[order].tolist()
    first = 0
    while first < count and descending[first] > 0:
        longest = descending[first]
        pairs = order[first : first + _pairs_per_slice(longest, width, device)]
        start = n - longest if left_padded else 0
        yield Slice(pairs, slice(start, start + longest), _padding(longest, lengths[pairs], left_padded))
        first += len(pairs)


def _padding(n: int, lengths: Tensor, left_padded: bool) -> Tensor:
    """[s, n], True where one of `n` positions holds no token."""
    positions = torch.arange(n, device=lengths.device)
    return (n - 1 - positions if left_padded else positions) >= lengths.unsqueeze(1)


def _pairs_per_slice(n: int, width: int, device: torch.device) -> int:
    elements = _SLICE_ELEMENTS if device.type == "cpu" else _SLICE_ELEMENTS_ON_GPU
    return max(1, elements // max(1, n * max(width, min(n, BLOCK_ROWS))))


class Mask(NamedTuple):
    """Which keys the rows of a slice see."""

    future: Tensor | None  # [BLOCK_ROWS, BLOCK_ROWS], -inf above the diagonal; None: rows see the future
    padding: Tensor | None  # [s, n]

    def blocks(self, n: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of rows and the keys that any of them sees; the first block sees all keys."""
        for start in reversed(range(0, n, BLOCK_ROWS)):
            stop = min(start + BLOCK_ROWS, n)
            yield slice(start, stop), slice(0, n if self.future is None else stop)

    def lengths(self) -> Tensor | None:
        """[s], the tokens of each pair (None: all positions hold one)."""
        return None if self.padding is None else (~self.padding).sum(1)

    def zero_(self, entries: Tensor, rows: slice) -> Tensor:
        """Zero the future in [s, r, c]."""
        return entries if self.future is None else entries.tril_(rows.start)

    def softmax_(self, scores: Tensor, rows: slice) -> Tensor:
        """Softmax of [s, r, c] over what a row sees, zero elsewhere and in rows of padding; in place."""
        if self.future is not None:
            r = scores.shape[1]
            # Zeroed first, for -inf added to +inf or NaN is NaN. (To fill by a mask takes many times longer.)
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
    """out = Σ over pairs of aᵀ b, or out += it: [s, m, n], [s, m, p] -> [n, p]."""
    out.addmm_(a.flatten(0, 1).T, b.flatten(0, 1), beta=int(add))


def softmax_backward_(dweights: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores, in place of that of their softmax."""
    return torch.ops.aten._softmax_backward_data.out(dweights, weights, -1, weights.dtype, grad_input=dweights)


# --- A and its products, x = A W ---


def _source_rows(q: Tensor, k: Tensor, rows: slice, keys: slice, mask: Mask, source: str) -> Tensor:
    """Rows of A [s, r, c]. Entries of padding are zero: under "logits" as products with zeroed tokens."""
    logits = torch.bmm(q[:, rows], k[:, keys].mT)
    return mask.zero_(logits, rows) if source == "logits" else mask.softmax_(logits, rows)


def project_rows(q: Tensor, k: Tensor, w: Tensor, mask: Mask, source: str, keep: bool) -> tuple[Tensor, Tensor | None]:
    """A W [s, n, P], and A [s, n, n] if it is to be kept."""
    s, n, _ = q.shape
    w = w.expand(s, -1, -1)
    x = q.new_empty(s, n, w.shape[2])
    a = q.new_empty(s, n, n) if keep else None
    for rows, keys in mask.blocks(n):
        a_rows = _source_rows(q, k, rows, keys, mask, source)
        multiply(x[:, rows], a_rows, w[:, keys])
        if keep:
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
    """A W [s, n, P] for raw logits, without A."""
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
    dstate = None  # of the state that the later rows read [s, D, P]
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
    """Σ_j k_j ⊗ W_j of each pair: [s, n, D], [n, P] -> [s, D, P]."""
    return k.mT @ w


def _prefix_states(k: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Chunks of positions, each with the state of those before it (None: there are none)."""
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
    """How the pairs of a call are computed."""

    mechanism: str
    source: str
    causal: bool
    scale: float
    rank: int  # R, of the Gaussians for "stochastic"
    folded: bool  # x starts with A (W_q W_kᵀ), whose keys are A's rows, instead of [A W_q, A W_k]

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
    queries, keys = (x[..., :width], a) if plan.folded else x[..., :width].chunk(2, dim=-1)
    return queries, keys, x[..., width:] if plan.has_values else None


def _refine(x: Tensor, a: Tensor | None, mask: Mask, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Vectors whose products are the scores, the values, and the mean that Gaussians were centred by."""
    if plan.mechanism == "stochastic":
        queries, keys, mean = _gaussian_operands(x, mask.lengths(), plan.rank)
        return queries, keys, None, mean
    return *_split(x, a, plan), None


def _gaussian_operands(x: Tensor, lengths: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors whose product is -W²/√R but for the query's own term, which the softmax drops; the mean of the keys'."""
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
    """[mean, x] -> [mean, √(elu(x) + 1) - 1]: a shift changes no distance, and near 0 their products do not cancel."""
    mean, x = x.chunk(2, dim=-1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    std = torch.where(x > 0, x / ((1 + x).sqrt() + 1), (x / 2).expm1())
    return torch.cat([mean, std.to(mean.dtype)], dim=-1)


def gaussians_backward(dgaussians: Tensor, gaussians: Tensor, mean: Tensor) -> Tensor:
    """Of `gaussians` from which `mean` was subtracted."""
    dmean, dstd = dgaussians.chunk(2, dim=-1)
    std = gaussians.chunk(2, dim=-1)[1].to(dstd.dtype) + (mean.chunk(2, dim=-1)[1] + 1)
    return torch.cat([dmean, dstd * torch.minimum(std, 1 / std) / 2], dim=-1)


# --- One slice ---


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
    out = torch.empty_like(v)
    for rows, columns in mask.blocks(v.shape[1]):
        m = torch.bmm(queries[:, rows], keys[:, columns].mT)  # [s, r, c]
        if plan.has_values:
            m = torch.bmm(mask.softmax_(m, rows), values[:, columns, columns])
        if plan.mechanism == "additive":
            m += a[:, rows, columns]
        multiply(out[:, rows], mask.softmax_(m, rows), v[:, columns])
    return out


def _attend_backward(
    dout: Tensor, x: Tensor, a: Tensor | None, v: Tensor, mask: Mask, plan: Plan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dv, dx and, where A is kept, what reaches A directly."""
    queries, keys, values, mean = _refine(x, a, mask, plan)
    dv, dx, da = torch.empty_like(v), torch.empty_like(x), None if a is None else torch.zeros_like(a)
    dqueries, dkeys, dvalues = _split(dx, da, plan)
    if plan.mechanism == "stochastic":
        dqueries, dkeys = torch.empty_like(queries), torch.empty_like(keys)
    n = v.shape[1]
    for rows, columns in mask.blocks(n):
        add = rows.stop < n
        m = torch.bmm(queries[:, rows], keys[:, columns].mT)  # [s, r, c]
        if plan.has_values:
            p_values = mask.softmax_(m, rows)
            m = torch.bmm(p_values, values[:, columns, columns])
        if plan.mechanism == "additive":
            m += a[:, rows, columns]
        p = mask.softmax_(m, rows)
        multiply(dv[:, columns], p.mT, dout[:, rows], add)
        dm = softmax_backward_(torch.bmm(dout[:, rows], v[:, columns].mT), p)
        dscores = dm
        if plan.has_values:
            multiply(dvalues[:, columns, columns], p_values.mT, dm, add)
            dscores = softmax_backward_(torch.bmm(dm, values[:, columns, columns].mT), p_values)
        multiply(dqueries[:, rows], dscores, keys[:, columns])
        multiply(dkeys[:, columns], dscores.mT, queries[:, rows], add)
        if plan.mechanism == "additive":
            da[:, rows, columns].add_(dm)
    if plan.mechanism == "stochastic":
        dx = _gaussian_operands_backward(dqueries, dkeys, queries, keys, mean, plan.rank)
    return dv, dx, da


def _forward_slice(q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Mask, plan: Plan) -> Tensor:
    x, a = _project(q, k, w, mask, plan)
    return _attend(x, a, v, mask, plan)


def _backward_slice(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Mask, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [s, n, ·] and dw [n, P]."""
    x, a = _project(q, k, w, mask, plan)
    dv, dx, da = _attend_backward(dout, x, a, v, mask, plan)
    del x  # its memory is wanted next
    dq, dk, dw = _project_backward(dx, da, q, k, w, a, mask, plan)
    return dq, dk, dv, dw


# --- All slices ---


def plan_of(q: Tensor, w_q: Tensor, settings: Settings) -> Plan:
    stochastic = settings.mechanism == "stochastic"
    rank = w_q.shape[-1] // 2 if stochastic else w_q.shape[-1]
    scale = 1 / math.sqrt(q.shape[3]) if settings.scale is None else settings.scale
    folded = not stochastic and rank >= q.shape[2]
    return Plan(settings.mechanism, settings.source, settings.causal, scale, rank, folded)


class Weights:
    """The matrices of one head, side by side as the slices read them, and the gradients that the slices add up."""

    def __init__(self, plan: Plan, w_q: Tensor, w_k: Tensor, w_v: Tensor | None = None):
        # The 1/√R of the scores goes into W_q; Gaussians are scaled when their distance is taken.
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
        for gradient, part in zip(gradients, dw.split([g.shape[1] for g in gradients], dim=1), strict=True):
            gradient += part

    def _finish(self) -> list[Tensor]:
        if self.folded:
            dproduct, *dw_v = self.gradients
            # Its terms are larger than their sums: those of float32 would be the largest error of all.
            dproduct, w_q, w_k = (x.double() for x in (dproduct, self.w_q, self.w_k))
            return [dproduct @ w_k * self.scale, dproduct.T @ w_q, *dw_v]
        dw_q, *others = self.gradients
        return [dw_q * self.scale, *others]

    def add_to(self, totals: list[Tensor]) -> None:
        """Add the gradients of w_q, w_k and, where there is one, w_v."""
        for total, gradient in zip(totals, self._finish(), strict=True):
            total.add_(gradient)

    def _cut(self, matrices: list[Tensor], positions: slice) -> list[Tensor]:
        # The columns of W_q W_kᵀ and of W_v are positions too.
        return [w[positions, positions] if self.folded or i == 2 else w[positions] for i, w in enumerate(matrices)]


def heads_apart(q: Tensor, matrices: list[Tensor]) -> list[int | None]:
    """Heads are computed apart where they have matrices of their own, else all together (None)."""
    return list(range(q.shape[1])) if any(w.dim() == 3 for w in matrices) else [None]


def pairs_of(tensor: Tensor, head: int | None) -> Tensor:
    """[B, H, N, D] -> [pairs, N, D]"""
    return tensor.flatten(0, 1) if head is None else tensor[:, head]


def leading(matrices: list[Tensor], head: int | None, n: int) -> list[Tensor]:
    """What `n` positions use of one head's w_q, w_k and w_v."""
    w_q, w_k, *w_v = (w if w.dim() == 2 else w[head] for w in matrices)
    return [w_q[:n], w_k[:n], *(w[:n, :n] for w in w_v)]


def _head_slices(
    q: Tensor, v: Tensor, seq_lens: Tensor | None, head: int | None, settings: Settings, weights: Weights
) -> Iterator[Slice]:
    batch, heads, n, _ = q.shape
    if head is None:
        batch, seq_lens = batch * heads, None if seq_lens is None else seq_lens.repeat_interleave(heads)
    width = max(q.shape[3], v.shape[3], sum(w.shape[1] for w in weights.matrices))
    return cut_slices(batch, n, seq_lens, settings.left_padded, width, q.device)


def slices_fwd(
    q: Tensor, k: Tensor, v: Tensor, matrices: list[Tensor], seq_lens: Tensor | None, plan: Plan, settings: Settings
) -> Tensor:
    out, future = new_output(v, seq_lens), future_in_block(q.shape[2], settings.causal, matrices[0])
    for head in heads_apart(q, matrices):
        weights = Weights(plan, *leading(matrices, head, q.shape[2]))
        inputs, out_pairs = [pairs_of(x, head) for x in (q, k, v)], pairs_of(out, head)
        for part in _head_slices(q, v, seq_lens, head, settings, weights):
            q_s, k_s, v_s = (part.load(x, matrices[0].dtype) for x in inputs)
            mask = Mask(future, part.padding)
            out_s = _forward_slice(q_s * plan.scale, k_s, v_s, weights.rows(part.positions), mask, plan)
            part.store(out_pairs, out_s)
    return out


def slices_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    matrices: list[Tensor],
    seq_lens: Tensor | None,
    plan: Plan,
    settings: Settings,
) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    dq, dk, dv = (new_output(x, seq_lens) for x in (q, k, v))
    dmatrices = [torch.zeros_like(w) for w in matrices]
    future = future_in_block(q.shape[2], settings.causal, matrices[0])
    for head in heads_apart(q, matrices):
        weights = Weights(plan, *leading(matrices, head, q.shape[2]))
        inputs = [pairs_of(x, head) for x in (dout, q, k, v)]
        dq_pairs, dk_pairs, dv_pairs = (pairs_of(x, head) for x in (dq, dk, dv))
        for part in _head_slices(q, v, seq_lens, head, settings, weights):
            dout_s, q_s, k_s, v_s = (part.load(x, matrices[0].dtype) for x in inputs)
            mask = Mask(future, part.padding)
            w = weights.rows(part.positions)
            dq_s, dk_s, dv_s, dw = _backward_slice(dout_s, q_s * plan.scale, k_s, v_s, w, mask, plan)
            part.store(dq_pairs, dq_s.mul_(plan.scale))
            part.store(dk_pairs, dk_s)
            part.store(dv_pairs, dv_s)
            weights.add_gradient(part.positions, dw)
            del dq_s, dk_s, dv_s  # not held while the next slice is computed
        weights.add_to(leading(dmatrices, head, q.shape[2]))
    return [dq, dk, dv, *dmatrices]


def new_output(like: Tensor, seq_lens: Tensor | None) -> Tensor:
    """Contiguous; zero where no slice will write."""
    return like.new_empty(like.shape) if seq_lens is None else like.new_zeros(like.shape)


def future_in_block(n: int, causal: bool, like: Tensor) -> Tensor | None:
    """The -inf of the future in a block on the diagonal (None: not causal)."""
    size = min(n, BLOCK_ROWS)
    return torch.full((size, size), -math.inf, dtype=like.dtype, device=like.device).triu_(1) if causal else None


def in_compute_dtype(*weights: Tensor | None) -> list[Tensor]:
    """Those that there are, in the dtype of the computation."""
    return [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights if w is not None]


# --- The operators' kernels where nothing faster serves ---


def refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, *settings) -> Tensor:
    settings = Settings(*settings)
    return slices_fwd(q, k, v, in_compute_dtype(w_q, w_k, w_v), seq_lens, plan_of(q, w_q, settings), settings)


def refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, *settings) -> list[Tensor]:
    settings = Settings(*settings)
    matrices = in_compute_dtype(w_q, w_k, w_v)
    dq, dk, dv, *dmatrices = slices_bwd(dout, q, k, v, matrices, seq_lens, plan_of(q, w_q, settings), settings)
    return [dq, dk, dv, *(dmatrix.to(w_q.dtype) for dmatrix in dmatrices)]

"""wasserstein_attention on a CPU, on the slices and masks of refined_attention's.

Blocks of P are computed once for both products, and again by the backward: nothing but the inputs is saved.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from recattn._check import checked_lengths
from recattn.ops.refined_attention import chunked as refined
from recattn.ops.refined_attention.chunked import Mask, Slice, multiply


def wasserstein_attention_fwd(
    query: Tensor,
    key: Tensor,
    mean_v: Tensor,
    cov_v: Tensor,
    seq_lens: Tensor | None,
    causal: bool,
    left_padded: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """P μ_v and (P∘P) Σ_v with P = softmax(mask(-scale · ‖query_i - key_j‖²))."""
    seq_lens = _checked(seq_lens, query)
    mean, cov = (refined.new_output(x, seq_lens) for x in (mean_v, cov_v))
    inputs, outputs = [x.flatten(0, 1) for x in (query, key, mean_v, cov_v)], [x.flatten(0, 1) for x in (mean, cov)]
    for part, mask in _slices(query, mean_v, seq_lens, causal, left_padded):
        query_s, key_s, mean_v_s, cov_v_s = (part.load(x, query.dtype) for x in inputs)
        queries, keys = _operands(query_s, key_s, scale)
        mean_s, cov_s = torch.empty_like(mean_v_s), torch.empty_like(cov_v_s)
        for rows, columns in mask.blocks(query_s.shape[1]):
            p = mask.softmax_(torch.bmm(queries[:, rows], keys[:, columns].mT), rows)  # [s, r, c]
            multiply(mean_s[:, rows], p, mean_v_s[:, columns])
            multiply(cov_s[:, rows], p.square_(), cov_v_s[:, columns])
        for output, values in zip(outputs, (mean_s, cov_s), strict=True):
            part.store(output, values)
    return mean, cov


def wasserstein_attention_bwd(
    dmean: Tensor,
    dcov: Tensor,
    query: Tensor,
    key: Tensor,
    mean_v: Tensor,
    cov_v: Tensor,
    seq_lens: Tensor | None,
    causal: bool,
    left_padded: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """dquery, dkey, dmean_v, dcov_v."""
    gradients = [refined.new_output(x, seq_lens) for x in (query, key, mean_v, cov_v)]
    inputs = [x.flatten(0, 1) for x in (dmean, dcov, query, key, mean_v, cov_v)]
    outputs = [x.flatten(0, 1) for x in gradients]
    for part, mask in _slices(query, mean_v, seq_lens, causal, left_padded):
        gradients_s = _backward_slice(*(part.load(x, query.dtype) for x in inputs), mask, scale)
        for output, values in zip(outputs, gradients_s, strict=True):
            part.store(output, values)
    return tuple(gradients)


def _backward_slice(dmean, dcov, query, key, mean_v, cov_v, mask: Mask, scale: float) -> tuple[Tensor, ...]:
    queries, keys = _operands(query, key, scale)
    dqueries, dkeys, dmean_v, dcov_v = (torch.empty_like(x) for x in (queries, keys, mean_v, cov_v))
    n = query.shape[1]
    for rows, columns in mask.blocks(n):
        add = rows.stop < n
        p = mask.softmax_(torch.bmm(queries[:, rows], keys[:, columns].mT), rows)  # [s, r, c]
        multiply(dmean_v[:, columns], p.mT, dmean[:, rows], add)
        dp = torch.bmm(dcov[:, rows], cov_v[:, columns].mT).mul_(p)
        dp.baddbmm_(dmean[:, rows], mean_v[:, columns].mT, beta=2)
        multiply(dcov_v[:, columns], p.square().mT, dcov[:, rows], add)
        dscores = refined.softmax_backward_(dp, p)
        multiply(dqueries[:, rows], dscores, keys[:, columns])
        multiply(dkeys[:, columns], dscores.mT, queries[:, rows], add)
    dquery = dqueries[..., :-1].mul_(2 * scale)
    return dquery, dkeys[..., :-1] - key * dkeys[..., -1:], dmean_v, dcov_v


def _operands(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Vectors whose products are -scale · ‖query_i - key_j‖² but for the query's own term, which the softmax drops."""
    queries = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1) * (2 * scale)
    return queries, torch.cat([key, key.square().sum(-1, keepdim=True) / -2], dim=-1)


def projection_fwd(
    query: Tensor,
    key: Tensor,
    w: Tensor,
    seq_lens: Tensor | None,
    source: str,
    causal: bool,
    left_padded: bool,
    scale: float,
) -> Tensor:
    """A W with A = scale · query keyᵀ, or its softmax; [B, H, N, P]."""
    seq_lens = _checked(seq_lens, query)
    x = refined.new_output(query.new_empty(*query.shape[:3], w.shape[-1]), seq_lens)
    for head in refined.heads_apart(query, [w]):
        query_h, key_h, x_h = (refined.pairs_of(t, head) for t in (query, key, x))
        matrix = w if head is None else w[head]
        for part, mask in _slices(query, matrix, seq_lens, causal, left_padded, head):
            query_s, key_s = part.load(query_h, query.dtype) * scale, part.load(key_h, query.dtype)
            rows = matrix[part.positions]
            if source == "logits":
                x_s = refined.project_linear(query_s, key_s, rows, causal)
            else:
                x_s, _ = refined.project_rows(query_s, key_s, rows, mask, source, keep=False)
            part.store(x_h, x_s)
    return x


def projection_bwd(
    dx: Tensor,
    query: Tensor,
    key: Tensor,
    w: Tensor,
    seq_lens: Tensor | None,
    source: str,
    causal: bool,
    left_padded: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dquery, dkey, dw."""
    dquery, dkey, dw = refined.new_output(query, seq_lens), refined.new_output(key, seq_lens), torch.zeros_like(w)
    for head in refined.heads_apart(query, [w]):
        dx_h, query_h, key_h, dquery_h, dkey_h = (refined.pairs_of(t, head) for t in (dx, query, key, dquery, dkey))
        matrix, dmatrix = (w, dw) if head is None else (w[head], dw[head])
        for part, mask in _slices(query, matrix, seq_lens, causal, left_padded, head):
            dx_s, query_s, key_s = (part.load(t, query.dtype) for t in (dx_h, query_h, key_h))
            query_s, rows = query_s * scale, matrix[part.positions]
            if source == "logits":
                gradients = refined.project_linear_backward(dx_s, query_s, key_s, rows, causal)
            else:
                gradients = refined.project_rows_backward(dx_s, None, query_s, key_s, rows, None, mask, source)
            part.store(dquery_h, gradients[0].mul_(scale))
            part.store(dkey_h, gradients[1])
            dmatrix[part.positions] += gradients[2]
    return dquery, dkey, dw


def _checked(seq_lens: Tensor | None, query: Tensor) -> Tensor | None:
    return None if seq_lens is None else checked_lengths("seq_lens", seq_lens, query.shape[2])


def _slices(
    query: Tensor, widest: Tensor, seq_lens: Tensor | None, causal: bool, left_padded: bool, head: int | None = None
) -> Iterator[tuple[Slice, Mask]]:
    """The slices of one head, or of all (None), each with its mask."""
    batch, heads, n, width = query.shape
    if head is None:
        batch, seq_lens = batch * heads, None if seq_lens is None else seq_lens.repeat_interleave(heads)
    future = refined.future_in_block(n, causal, query)
    for part in refined.cut_slices(batch, n, seq_lens, left_padded, max(width, widest.shape[-1]), query.device):
        yield part, Mask(future, part.padding)

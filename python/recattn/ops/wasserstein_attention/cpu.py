"""wasserstein_attention on a CPU, by the chunks and masks of refined_attention.

A block of P is computed once for both products, and again in the backward: only the inputs are saved.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from recattn._check import checked_lengths
from recattn.ops.refined_attention import chunked
from recattn.ops.refined_attention.chunked import Chunk, Mask, multiply


def vector_attention_fwd(query, key, mean_v, cov_v, seq_lens, causal, left_padded, scale) -> tuple[Tensor, Tensor]:
    """P μ_v and (P∘P) Σ_v with P = softmax(mask(-scale · ‖query_i - key_j‖²))."""
    seq_lens = _checked(seq_lens, query)
    mean, cov = (chunked.new_output(x, seq_lens) for x in (mean_v, cov_v))
    inputs, outputs = [x.flatten(0, 1) for x in (query, key, mean_v, cov_v)], [x.flatten(0, 1) for x in (mean, cov)]
    for chunk, mask in _chunks(query, mean_v, seq_lens, causal, left_padded):
        query_chunk, key_chunk, mean_v_chunk, cov_v_chunk = (chunk.load(x, query.dtype) for x in inputs)
        queries, keys = _operands(query_chunk, key_chunk, scale)
        mean_chunk, cov_chunk = torch.empty_like(mean_v_chunk), torch.empty_like(cov_v_chunk)
        for rows, columns in mask.blocks(query_chunk.shape[1]):
            p = mask.softmax_(torch.bmm(queries[:, rows], keys[:, columns].mT), rows)  # [s, r, c]
            multiply(mean_chunk[:, rows], p, mean_v_chunk[:, columns])
            multiply(cov_chunk[:, rows], p.square_(), cov_v_chunk[:, columns])
        for output, values in zip(outputs, (mean_chunk, cov_chunk), strict=True):
            chunk.store(output, values)
    return mean, cov


def vector_attention_bwd(
    dmean, dcov, query, key, mean_v, cov_v, seq_lens, causal, left_padded, scale
) -> tuple[Tensor, ...]:
    """dquery, dkey, dmean_v, dcov_v."""
    gradients = [chunked.new_output(x, seq_lens) for x in (query, key, mean_v, cov_v)]
    inputs = [x.flatten(0, 1) for x in (dmean, dcov, query, key, mean_v, cov_v)]
    outputs = [x.flatten(0, 1) for x in gradients]
    for chunk, mask in _chunks(query, mean_v, seq_lens, causal, left_padded):
        gradients_chunk = _backward_chunk(*(chunk.load(x, query.dtype) for x in inputs), mask, scale)
        for output, values in zip(outputs, gradients_chunk, strict=True):
            chunk.store(output, values)
    return tuple(gradients)


def _backward_chunk(dmean, dcov, query, key, mean_v, cov_v, mask: Mask, scale: float) -> tuple[Tensor, ...]:
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
        ds = chunked.softmax_backward_(dp, p)
        multiply(dqueries[:, rows], ds, keys[:, columns])
        multiply(dkeys[:, columns], ds.mT, queries[:, rows], add)
    dquery = dqueries[..., :-1].mul_(2 * scale)
    return dquery, dkeys[..., :-1] - key * dkeys[..., -1:], dmean_v, dcov_v


def _operands(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Vectors whose products are -scale · ‖query_i - key_j‖², up to the query's own term, which changes no softmax."""
    queries = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1) * (2 * scale)
    return queries, torch.cat([key, key.square().sum(-1, keepdim=True) / -2], dim=-1)


def projection_fwd(query, key, w, seq_lens, source, causal, left_padded, scale) -> Tensor:
    """A W with A = scale · query keyᵀ, or its softmax; [B, H, N, P]."""
    seq_lens = _checked(seq_lens, query)
    x = chunked.new_output(query.new_empty(*query.shape[:3], w.shape[-1]), seq_lens)
    for head in chunked.heads_apart(query, [w]):
        query_h, key_h, x_h = (chunked.batch_heads_of(t, head) for t in (query, key, x))
        matrix = w if head is None else w[head]
        for chunk, mask in _chunks(query, matrix, seq_lens, causal, left_padded, head):
            query_chunk, key_chunk = chunk.load(query_h, query.dtype) * scale, chunk.load(key_h, query.dtype)
            rows = matrix[chunk.positions]
            if source == "logits":
                x_chunk = chunked.project_linear(query_chunk, key_chunk, rows, causal)
            else:
                x_chunk, _ = chunked.project_rows(query_chunk, key_chunk, rows, mask, source, keep=False)
            chunk.store(x_h, x_chunk)
    return x


def projection_bwd(dx, query, key, w, seq_lens, source, causal, left_padded, scale) -> tuple[Tensor, Tensor, Tensor]:
    """dquery, dkey, dw."""
    dquery, dkey, dw = chunked.new_output(query, seq_lens), chunked.new_output(key, seq_lens), torch.zeros_like(w)
    for head in chunked.heads_apart(query, [w]):
        dx_h, query_h, key_h, dquery_h, dkey_h = (
            chunked.batch_heads_of(t, head) for t in (dx, query, key, dquery, dkey)
        )
        matrix, dmatrix = (w, dw) if head is None else (w[head], dw[head])
        for chunk, mask in _chunks(query, matrix, seq_lens, causal, left_padded, head):
            dx_chunk, query_chunk, key_chunk = (chunk.load(t, query.dtype) for t in (dx_h, query_h, key_h))
            query_chunk, rows = query_chunk * scale, matrix[chunk.positions]
            if source == "logits":
                gradients = chunked.project_linear_backward(dx_chunk, query_chunk, key_chunk, rows, causal)
            else:
                gradients = chunked.project_rows_backward(
                    dx_chunk, None, query_chunk, key_chunk, rows, None, mask, source
                )
            chunk.store(dquery_h, gradients[0].mul_(scale))
            chunk.store(dkey_h, gradients[1])
            dmatrix[chunk.positions] += gradients[2]
    return dquery, dkey, dw


def _checked(seq_lens: Tensor | None, query: Tensor) -> Tensor | None:
    return None if seq_lens is None else checked_lengths("seq_lens", seq_lens, query.shape[2])


def _chunks(
    query: Tensor, widest: Tensor, seq_lens: Tensor | None, causal: bool, left_padded: bool, head: int | None = None
) -> Iterator[tuple[Chunk, Mask]]:
    """The chunks of one head, or of all (None), each with its mask."""
    batch, heads, n, width = query.shape
    if head is None:
        batch, seq_lens = batch * heads, None if seq_lens is None else seq_lens.repeat_interleave(heads)
    future = chunked.future_in_block(n, causal, query)
    for chunk in chunked.cut_chunks(batch, n, seq_lens, left_padded, max(width, widest.shape[-1]), query.device):
        yield chunk, Mask(future, chunk.padding)

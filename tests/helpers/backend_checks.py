"""Inputs for the attention backends that the correction path uses, and the checks that each backend must pass."""

import math

import torch
from torch import Tensor

from recattn import reference
from recattn.ops.backends import AttentionBackend, Call, empty_backward, empty_forward
from recattn.testing import assert_matches_reference

PACKAGES = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
IN_TORCH = ("flash", "cudnn", "efficient")


def call(**changes) -> Call:
    """A call on a Hopper that every backend supports, with these fields changed."""
    simple = Call(
        dtype=torch.float16,
        capability=(9, 0),
        head_dim=64,
        value_dim=64,
        q_heads=4,
        kv_heads=4,
        batch=8,
        max_seqlen=100,
        packed=False,
        scale=0.125,
        deterministic=False,
    )
    return simple._replace(**changes)


# --- What a backend is for: an attention whose output and lse were corrected ---


class Corrected(torch.autograd.Function):
    """The backend's attention, corrected in place: a logit joins each head's softmax, and some rows are left out.

    Returns (out, lse).
    """

    @staticmethod
    def forward(ctx, q, k, v, backend, options, sink_logits, left_out):
        out, lse = backend.forward(q, k, v, **options)
        if sink_logits is not None:
            total = torch.logaddexp(lse, sink_logits[:, None] if lse.dim() == 3 else sink_logits)
            out *= (lse - total).exp().unsqueeze(-1)
            lse.copy_(total)
        returned = out.clone(), lse.clone()
        if left_out is not None:
            returned[0].masked_fill_(left_out.unsqueeze(-1), 0)
            lse.masked_fill_(left_out, math.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend, ctx.options = backend, options
        ctx.mark_non_differentiable(returned[1])
        return returned

    @staticmethod
    def backward(ctx, dout, _dlse):
        return *ctx.backend.backward(dout, *ctx.saved_tensors, **ctx.options), None, None, None, None


def plain(q, k, v, *, causal, scale, cu_seqlens=None, max_seqlen=None, sink_logits=None, left_out=None, swap=False):
    """The same in plain PyTorch: recattn's reference without sinks."""
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    nowhere = torch.zeros(batch, 0, dtype=torch.int64, device=q.device)
    options = {"causal": causal, "scale": scale, "cu_seqlens": cu_seqlens, "sink_logits": sink_logits}
    out, lse = reference.sink_attention(q, k, v, nowhere, q.new_zeros(batch, 1, 0, 0), **options, return_lse=True)
    out = out if left_out is None else out.masked_fill(left_out.unsqueeze(-1), 0)
    return out.transpose(1, 2) if swap else out, lse if cu_seqlens is None else lse.t()


def check(backend: AttentionBackend, q, k, v, *, sink_logits=None, left_out=None, swap=False, **options) -> None:
    """out, lse, dq, dk and dv are within the bound and have the promised layout. With `swap`, dout is token-major."""

    def kernel(q, k, v):
        out, lse = Corrected.apply(q, k, v, backend, options, sink_logits, left_out)
        return out.transpose(1, 2) if swap else out, lse

    def expected(q, k, v):
        return plain(q, k, v, **options, sink_logits=sink_logits, left_out=left_out, swap=swap)

    assert_matches_reference(kernel, expected, {"q": q, "k": k, "v": v}, grads=("q", "k", "v"))
    out, lse = backend.forward(q, k, v, **options)
    grads = backend.backward(torch.randn_like(out), q, k, v, out, lse, **options)
    for got, want in zip((out, lse, *grads), (*empty_forward(q, v), *empty_backward(q, k, v)), strict=True):
        expect_same_layout(got, want)


def expect_same_layout(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert all(a == b for size, a, b in zip(got.shape, got.stride(), want.stride(), strict=True) if size > 1)


def draw(layout: str, lengths, heads=(4, 4), dims=(64, 64), dtype=torch.float32, device="cpu"):
    """q, k, v and the options that locate the sequences. For a dense batch `lengths` is (B, N)."""
    (q_heads, kv_heads), (dim, value_dim) = heads, dims
    if layout == "packed":
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
        tokens, options = (sum(lengths),), {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}
    else:
        tokens, options = lengths, {}
    shapes = ((*tokens, q_heads, dim), (*tokens, kv_heads, dim), (*tokens, kv_heads, value_dim))
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    if layout == "sliced":  # from one projection
        q, k, v = torch.cat([q, k, v], dim=2).split([q_heads, kv_heads, kv_heads], dim=2)
    if layout == "misaligned":
        q, k, v = (x.new_empty(*tokens, x.shape[2], dim + 1).normal_()[..., 1:] for x in (q, k, v))
    if layout != "packed":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if layout == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    return (q, k, v), options


def grouped(name: str) -> tuple[int, int]:
    return (4, 4) if name == "efficient" else (4, 2)

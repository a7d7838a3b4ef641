"""PyTorch's own attentions: FlashAttention 2, cuDNN and the memory-efficient one."""

import math
import os

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn.ops.backends.backend import (
    AttentionBackend,
    BackendOptions,
    Call,
    flash_unsupported_reason,
    format_version,
    swap_heads,
    unsupported_reason,
)


def _unused_random_state(q: Tensor) -> Tensor:
    """For the operators' argument that holds the state of dropout. Without dropout they do not read it."""
    return q.new_empty(0, dtype=torch.int64)


# --- FlashAttention 2 in PyTorch ---


def _flash_unsupported_reason(call: Call) -> str | None:
    enabled = torch.backends.cuda.flash_sdp_enabled()
    return unsupported_reason(
        (enabled, "torch.backends.cuda.enable_flash_sdp(True)", enabled)
    ) or flash_unsupported_reason(call)


def _flash_fwd(q: Tensor, k: Tensor, v: Tensor, options: BackendOptions) -> tuple[Tensor, Tensor]:
    lengths = (options.cu_seqlens, options.cu_seqlens, options.max_seqlen, options.max_seqlen)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, options.causal, False, scale=options.scale
    )
    return out, lse


def _flash_bwd(dout, q, k, v, out, lse, options: BackendOptions) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (options.cu_seqlens, options.cu_seqlens, options.max_seqlen, options.max_seqlen)
    unused = _unused_random_state(q)
    # PyTorch itself copies dout and out that are not contiguous with the tokens first.
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *lengths, 0.0, options.causal, unused, unused, scale=options.scale
    )


# --- cuDNN ---

# dropout_p = 0, but with other bytes than the 0.0 of PyTorch's own calls. PyTorch caches the plan of a backward under
# the bytes of a key that holds the strides of q, k and v, but not those of out and dout. Under a shared key, a plan
# made for other strides of dout would read ours wrongly.
_OUR_NO_DROPOUT = -0.0


def _cudnn_unsupported_reason(call: Call) -> str | None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    version = torch.backends.cudnn.version() or 0
    served = range(8, (256 if call.capability == (9, 0) and version >= 91000 else 128) + 1, 8)
    # With this variable set, it expects another layout of lse.
    ragged = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"
    return unsupported_reason(
        (enabled, "torch.backends.cuda.enable_cudnn_sdp(True)", enabled),
        (version >= 90501, "cuDNN 9.5.1 or newer", version),
        (not ragged, "TORCH_CUDNN_SDPA_AVOID_RECOMPILE unset", 1),
        # PyTorch builds a new plan for every packed call, and its versions differ in the layout of a packed lse.
        (not call.packed, "a dense batch", "a packed one"),
        (call.dtype in (torch.float16, torch.bfloat16), "float16 or bfloat16", call.dtype),
        (call.capability >= (8, 0), "compute capability 8.0 or newer", format_version(call.capability)),
        (call.head_dim in served, f"a multiple of 8 up to {served[-1]} for D", call.head_dim),
        (call.value_dim in served, f"a multiple of 8 up to {served[-1]} for Dv", call.value_dim),
        (call.max_seqlen != 1, "sequences longer than 1", call.max_seqlen),
    )


def _cudnn_fwd(q: Tensor, k: Tensor, v: Tensor, options: BackendOptions) -> tuple[Tensor, Tensor]:
    q, k, v = map(swap_heads, (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
    )
    return swap_heads(out), lse.squeeze(-1)


def _cudnn_bwd(dout, q, k, v, out, lse, options: BackendOptions) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, dout = map(swap_heads, (q, k, v, out, dout))
    strides = _output_strides(q, v.shape[-1])
    out, dout, lse = _with_strides(out, strides), _with_strides(dout, strides), lse.unsqueeze(-1)
    unused = _unused_random_state(q)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        unused,
        unused,
        None,
        None,
        None,
        options.max_seqlen,
        options.max_seqlen,
        _OUR_NO_DROPOUT,
        options.causal,
        scale=options.scale,
    )
    dq, dk, dv = map(swap_heads, grads)
    return dq, dk, dv


def _output_strides(q: Tensor, width: int) -> tuple[int, ...]:
    """Strides of an output of this width as PyTorch lays it out: dense, with the axes in q's order.

    Newer versions assume these strides for dout as well.
    """
    if width == q.shape[-1]:
        return torch.empty_like(q, device="meta").stride()
    strides, step = [0] * q.dim(), 1
    for axis in sorted(range(q.dim()), key=q.stride):
        strides[axis], step = step, step * (width if axis == q.dim() - 1 else q.shape[axis])
    return tuple(strides)


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


# --- Memory-efficient attention in PyTorch ---

# It pads lse to a multiple of this.
_LSE_ALIGNMENT = 32


def _efficient_unsupported_reason(call: Call) -> str | None:
    enabled = torch.backends.cuda.mem_efficient_sdp_enabled()
    dtypes = (torch.float32, torch.float16) + ((torch.bfloat16,) if call.capability >= (8, 0) else ())
    multiple = 4 if call.dtype == torch.float32 else 8
    heads = f"{call.q_heads} and {call.kv_heads}"
    return unsupported_reason(
        (enabled, "torch.backends.cuda.enable_mem_efficient_sdp(True)", enabled),
        (call.dtype in dtypes, " or ".join(map(str, dtypes)), call.dtype),
        (call.capability >= (5, 0), "compute capability 5.0 or newer", format_version(call.capability)),
        (call.q_heads == call.kv_heads, "as many key heads as query heads", heads),
        (call.head_dim % multiple == 0, f"a multiple of {multiple} for D", call.head_dim),
        (call.value_dim % multiple == 0, f"a multiple of {multiple} for Dv", call.value_dim),
    )


def _efficient_fwd(q: Tensor, k: Tensor, v: Tensor, options: BackendOptions) -> tuple[Tensor, Tensor]:
    q, k, v = (x.view(-1, *x.shape[-3:]) for x in (q, k, v))  # packed, a batch of one
    longest = min(options.max_seqlen, q.shape[1])
    lengths = (options.cu_seqlens, options.cu_seqlens, longest, longest)
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, *lengths, 0.0, int(options.causal), True, scale=options.scale
    )
    if options.cu_seqlens is None:
        return out, lse[..., : q.shape[1]]
    return out.squeeze(0), _pack_lse(lse, options.cu_seqlens, q.shape[1])


def _efficient_bwd(dout, q, k, v, out, lse, options: BackendOptions) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (q.shape, k.shape, v.shape)
    dout, q, k, v, out = (x.view(-1, *x.shape[-3:]) for x in (dout, q, k, v, out))
    longest = min(options.max_seqlen, q.shape[1])
    padded = math.ceil(longest / _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    if options.cu_seqlens is None:
        lse = F.pad(lse, (0, padded - longest), value=math.inf)
    else:
        lse = _unpack_lse(lse, options.cu_seqlens, padded)
    unused = _unused_random_state(q)
    lengths = (options.cu_seqlens, options.cu_seqlens, longest, longest)
    *grads, _ = torch.ops.aten._efficient_attention_backward(
        # It assumes that the tokens of `out` are contiguous, and copies a dout that is not.
        *(dout, q, k, v, None, out.contiguous()),
        *lengths,
        *(lse, 0.0, unused, unused, int(options.causal), False),
        scale=options.scale,
    )
    dq, dk, dv = (grad.view(shape) for grad, shape in zip(grads, shapes, strict=True))
    return dq, dk, dv


def _pack_lse(lse: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """lse of padded sequences [B, H, L] -> of packed ones [H, T]."""
    token = torch.arange(tokens, device=lse.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    return lse[sequence, :, token - cu_seqlens[sequence]].t()


def _unpack_lse(lse: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """lse of packed sequences [H, T] -> of padded ones [B, H, L], with +inf at the padding."""
    position = torch.arange(length, device=lse.device, dtype=torch.int32)
    token = cu_seqlens[:-1, None] + position  # [B, L]
    padding = token >= cu_seqlens[1:, None]
    lse = lse[:, token.clamp(max=lse.shape[1] - 1)].masked_fill(padding, math.inf)
    return lse.transpose(0, 1).contiguous()


# Fastest first.
CUDNN = AttentionBackend("cudnn", _cudnn_unsupported_reason, _cudnn_fwd, _cudnn_bwd, deterministic=False)
FLASH = AttentionBackend("flash", _flash_unsupported_reason, _flash_fwd, _flash_bwd, deterministic=True)
EFFICIENT = AttentionBackend(
    "efficient", _efficient_unsupported_reason, _efficient_fwd, _efficient_bwd, deterministic=True
)

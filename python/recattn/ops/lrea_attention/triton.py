"""LREA's training by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor

from recattn._graphs import constant_in_graphs
from recattn.ops._library import define
from recattn.ops._support import contiguous, triton_unsupported_reason


def unsupported_reason(device_type: str, dtype: torch.dtype | None, rank: int) -> str | None:
    """Why the kernels cannot run with tensors of this device type, dtype (None: any) and rank (None: they can)."""
    if dtype == torch.float64:
        return "its kernels compute in float32, and the tensors are float64"
    reason = triton_unsupported_reason(device_type, dtype)
    if reason is not None:
        return reason
    largest = _largest_rank()
    return f"its kernels hold ranks up to {largest}, and r is {rank}" if rank > largest else None


@constant_in_graphs
def _largest_rank() -> int:
    from recattn.triton_kernels.lrea.attention import LARGEST_RANK

    return LARGEST_RANK


# --- Attention ---


def attention_fwd(
    targets, keys, values, w_decomp, target_offsets, seq_lens, negative_slope, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and what the backward takes: x, y and the plan."""
    from recattn.triton_kernels.lrea.attention import launch_lrea_attention_fwd

    tensors = (targets, keys, values, w_decomp, target_offsets.contiguous(), contiguous(seq_lens))
    return launch_lrea_attention_fwd(*tensors, negative_slope, scale)


def attention_bwd(
    dout, targets, keys, values, w_decomp, target_offsets, seq_lens, x, y, plan, negative_slope, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dtargets, dkeys, dvalues and dw_decomp."""
    from recattn.triton_kernels.lrea.attention import launch_lrea_attention_bwd

    tensors = (dout, targets, keys, values, w_decomp, target_offsets.contiguous(), contiguous(seq_lens), x, y, plan)
    return launch_lrea_attention_bwd(*tensors, negative_slope, scale)


def _attention_fwd_fake(targets, keys, values, w_decomp, target_offsets, seq_lens, negative_slope, scale):
    (num_targets, heads, _), (users, _, rank, width) = targets.shape, values.shape
    out = targets.new_empty(num_targets, heads, width)
    parts = 1 if w_decomp.dtype == torch.float32 else 2
    x = w_decomp.new_empty(parts, num_targets, heads, rank)
    y = targets.new_empty(num_targets, heads, rank, dtype=torch.float32)
    plan = targets.new_empty(3 * num_targets + 4 * (users + 2), dtype=torch.int32)
    return out, x, y, plan


def _attention_bwd_fake(dout, targets, keys, values, w_decomp, *_others):
    tensors = (targets, keys, values, w_decomp)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


_TENSORS = "Tensor targets, Tensor keys, Tensor values, Tensor w_decomp, Tensor target_offsets, Tensor? seq_lens"
lrea_attention_fwd = define(
    f"lrea_attention_fwd({_TENSORS}, float negative_slope, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=attention_fwd,
    cuda=attention_fwd,
    fake=_attention_fwd_fake,
)
lrea_attention_bwd = define(
    f"lrea_attention_bwd(Tensor dout, {_TENSORS}, Tensor x, Tensor y, Tensor plan, float negative_slope, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=attention_bwd,
    cuda=attention_bwd,
    fake=_attention_bwd_fake,
)


# --- Compression ---


def compress_fwd(
    behaviors: Tensor,
    w_comp: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    item_ids: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_fwd

    return launch_lrea_compress_fwd(behaviors, w_comp, _as_lengths(seq_lens, cu_seqlens), item_ids, max_seqlen)


def compress_bwd_behaviors(
    dcompressed: Tensor,
    w_comp: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    num_rows: int,
    max_seqlen: int | None,
) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_bwd_behaviors

    tensors = (dcompressed.contiguous(), w_comp.contiguous(), _as_lengths(seq_lens, cu_seqlens))
    return launch_lrea_compress_bwd_behaviors(*tensors, num_rows, max_seqlen)


def compress_bwd_w_comp(
    dcompressed: Tensor,
    behaviors: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    max_seqlen: int | None,
) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_bwd_w_comp

    tensors = (dcompressed.contiguous(), behaviors, _as_lengths(seq_lens, cu_seqlens))
    return launch_lrea_compress_bwd_w_comp(*tensors, longest, max_seqlen)


def _as_lengths(seq_lens: Tensor | None, cu_seqlens: Tensor | None):
    from recattn.triton_kernels.common.ragged import as_lengths

    return as_lengths(seq_lens, None, cu_seqlens)

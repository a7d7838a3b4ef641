"""LREA's training by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor

from recattn import reference
from recattn._graphs import constant_in_graphs
from recattn.ops._fallback import or_reference, or_reference_gradients
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


def _attention_by_reference(targets, keys, values, w_decomp, target_offsets, seq_lens, negative_slope, scale) -> Tensor:
    tensors = (targets, keys, values, w_decomp, target_offsets)
    return reference.lrea_attention(*tensors, seq_lens=seq_lens, negative_slope=negative_slope, scale=scale)


def _attention_inputs(dout, *others):
    """`others` without x, y and the plan of the forward."""
    return (dout,), (*others[:6], *others[9:])


@or_reference("lrea_attention", _attention_by_reference, like=_attention_fwd_fake)
def attention_fwd(
    targets, keys, values, w_decomp, target_offsets, seq_lens, negative_slope, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and what the backward takes: x, y and the plan."""
    from recattn.triton_kernels.lrea.attention import launch_lrea_attention_fwd

    tensors = (targets, keys, values, w_decomp, target_offsets.contiguous(), contiguous(seq_lens))
    return launch_lrea_attention_fwd(*tensors, negative_slope, scale)


@or_reference_gradients(
    "lrea_attention", _attention_by_reference, like=_attention_bwd_fake, split=_attention_inputs, wrt=range(4)
)
def attention_bwd(
    dout, targets, keys, values, w_decomp, target_offsets, seq_lens, x, y, plan, negative_slope, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dtargets, dkeys, dvalues and dw_decomp."""
    from recattn.triton_kernels.lrea.attention import launch_lrea_attention_bwd

    tensors = (dout, targets, keys, values, w_decomp, target_offsets.contiguous(), contiguous(seq_lens), x, y, plan)
    return launch_lrea_attention_bwd(*tensors, negative_slope, scale)


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


def compress_fake(behaviors, w_comp, seq_lens, cu_seqlens, item_ids, max_seqlen=None):
    if cu_seqlens is not None:
        users = cu_seqlens.shape[0] - 1
    else:
        users = behaviors.shape[0] if item_ids is None else item_ids.shape[0]
    return behaviors.new_empty(users, w_comp.shape[1], behaviors.shape[-1])


def compress_bwd_behaviors_fake(dcompressed, w_comp, seq_lens, cu_seqlens, num_rows, max_seqlen):
    users = () if cu_seqlens is not None else dcompressed.shape[:1]
    return dcompressed.new_empty(*users, num_rows, dcompressed.shape[2])


def compress_bwd_w_comp_fake(dcompressed, behaviors, seq_lens, cu_seqlens, longest, max_seqlen):
    return behaviors.new_empty(longest, dcompressed.shape[1])


def _compress_by_reference(behaviors, w_comp, seq_lens, cu_seqlens, item_ids, _max_seqlen) -> Tensor:
    return reference.lrea_compress(behaviors, w_comp, seq_lens, item_ids=item_ids, cu_seqlens=cu_seqlens)


@or_reference("lrea_compress", _compress_by_reference, like=compress_fake)
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


# A product's gradient does not depend on the factor that it is of: any numbers stand for that one.
def _behaviors_inputs(dcompressed, w_comp, seq_lens, cu_seqlens, num_rows, max_seqlen):
    like = compress_bwd_behaviors_fake(dcompressed, w_comp, seq_lens, cu_seqlens, num_rows, max_seqlen)
    return (dcompressed,), (like.zero_(), w_comp, seq_lens, cu_seqlens, None, max_seqlen)


def _w_comp_inputs(dcompressed, behaviors, seq_lens, cu_seqlens, longest, max_seqlen):
    like = compress_bwd_w_comp_fake(dcompressed, behaviors, seq_lens, cu_seqlens, longest, max_seqlen)
    return (dcompressed,), (behaviors, like.zero_(), seq_lens, cu_seqlens, None, max_seqlen)


@or_reference_gradients(
    "lrea_compress", _compress_by_reference, like=compress_bwd_behaviors_fake, split=_behaviors_inputs, wrt=(0,)
)
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


@or_reference_gradients(
    "lrea_compress", _compress_by_reference, like=compress_bwd_w_comp_fake, split=_w_comp_inputs, wrt=(1,)
)
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

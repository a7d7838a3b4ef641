"""LREA's training by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from recattn.ops._support import constant_in_graphs, contiguous, triton_unsupported_reason


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
    from recattn.triton_kernels.lrea.core import LARGEST_RANK

    return LARGEST_RANK


def jagged_dense_bmm(x: Tensor, y: Tensor, target_offsets: Tensor) -> Tensor:
    from recattn.triton_kernels.lrea.jagged import launch_lrea_jagged_dense_bmm

    return launch_lrea_jagged_dense_bmm(x, y, target_offsets.contiguous())


def jagged_jagged_bmm(x: Tensor, y: Tensor, target_offsets: Tensor) -> Tensor:
    from recattn.triton_kernels.lrea.jagged import launch_lrea_jagged_jagged_bmm

    return launch_lrea_jagged_jagged_bmm(x, y, target_offsets.contiguous())


def middle_factor_fwd(x, w_decomp, target_offsets, seq_lens, negative_slope) -> Tensor:
    from recattn.triton_kernels.lrea.core import launch_lrea_middle_factor_fwd

    ragged = _sort_rows_by_length(x, target_offsets, seq_lens)
    x_rows = _take_rows(x, ragged).to(w_decomp.dtype)
    return launch_lrea_middle_factor_fwd(x_rows, w_decomp, ragged, negative_slope).view(x.shape)


def middle_factor_bwd(dout, x, w_decomp, target_offsets, seq_lens, negative_slope) -> tuple[Tensor, Tensor]:
    from recattn.triton_kernels.lrea.core import launch_lrea_middle_factor_bwd

    dtype = w_decomp.dtype
    ragged = _sort_rows_by_length(x, target_offsets, seq_lens)
    x_rows, dout_rows = _take_rows(x, ragged), _take_rows(dout, ragged).to(dtype)
    rounded = x_rows.to(dtype)
    x_error = None if dtype == x.dtype else (x_rows - rounded).to(dtype)
    dx, dw = launch_lrea_middle_factor_bwd(dout_rows, rounded, x_error, w_decomp, ragged, negative_slope)
    return dx.view(x.shape), dw


def _sort_rows_by_length(x: Tensor, target_offsets: Tensor, seq_lens: Tensor | None):
    """The T·H rows of x [T, H, r] by how many columns of W they see; None where all see all of them."""
    from recattn.triton_kernels.lrea.core import RaggedRows

    if seq_lens is None:
        return None
    targets, heads, _ = x.shape
    # Targets before the first offset and behind the last are of no user: they see 0 columns.
    rows = torch.arange(targets, dtype=target_offsets.dtype, device=x.device)
    users = torch.searchsorted(target_offsets.contiguous(), rows, right=True)
    lengths = pad(seq_lens.int(), (1, 1))[users]
    return RaggedRows(*lengths[:, None].expand(targets, heads).flatten().sort(stable=True))


def _take_rows(x: Tensor, ragged) -> Tensor:
    """[T, H, r] -> [T·H, r], in the order of `ragged`."""
    rows = x.flatten(0, 1)
    return rows.contiguous() if ragged is None else rows[ragged.order]


def compress_fwd(behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None, item_ids: Tensor | None) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_fwd

    return launch_lrea_compress_fwd(behaviors, w_comp, contiguous(seq_lens), item_ids)


def compress_bwd_behaviors(dcompressed: Tensor, w_comp: Tensor, seq_lens: Tensor | None, length: int) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_bwd_behaviors

    tensors = (dcompressed.contiguous(), w_comp.contiguous(), contiguous(seq_lens))
    return launch_lrea_compress_bwd_behaviors(*tensors, length)


def compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_bwd_w_comp

    return launch_lrea_compress_bwd_w_comp(dcompressed.contiguous(), behaviors, contiguous(seq_lens))

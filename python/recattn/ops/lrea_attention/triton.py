"""LREA's training by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from recattn.ops._support import constant_in_graphs, triton_unsupported_reason


def refusal(device: str, dtype: torch.dtype | None, rank: int) -> str | None:
    """Why the kernels cannot run on tensors of this device type, dtype (None: any) and rank (None: they can)."""
    if dtype == torch.float64:
        return "its kernels compute in float32, and the tensors are float64"
    unusable = triton_unsupported_reason(device, dtype)
    if unusable is not None:
        return unusable
    largest = _largest_rank()
    return f"its kernels hold ranks up to {largest}, and r is {rank}" if rank > largest else None


@constant_in_graphs
def _largest_rank() -> int:
    from recattn.triton_kernels.lrea.core import LARGEST_RANK

    return LARGEST_RANK


def user_matmul(rows: Tensor, matrices: Tensor, target_offsets: Tensor) -> Tensor:
    from recattn.triton_kernels.lrea.jagged import launch_lrea_jagged_dense_bmm

    return launch_lrea_jagged_dense_bmm(rows, matrices, target_offsets.contiguous())


def user_outer(left: Tensor, right: Tensor, target_offsets: Tensor) -> Tensor:
    from recattn.triton_kernels.lrea.jagged import launch_lrea_jagged_jagged_bmm

    return launch_lrea_jagged_jagged_bmm(left, right, target_offsets.contiguous())


def middle_factor_fwd(
    z: Tensor, w_decomp: Tensor, target_offsets: Tensor, seq_lens: Tensor | None, negative_slope: float
) -> Tensor:
    from recattn.triton_kernels.lrea.core import launch_lrea_middle_factor_fwd

    ragged = _rows_by_length(z, target_offsets, seq_lens)
    z_rows = _rows(z, ragged).to(w_decomp.dtype)
    return launch_lrea_middle_factor_fwd(z_rows, w_decomp, ragged, negative_slope).view(z.shape)


def middle_factor_bwd(
    dy: Tensor,
    z: Tensor,
    w_decomp: Tensor,
    target_offsets: Tensor,
    seq_lens: Tensor | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    from recattn.triton_kernels.lrea.core import launch_lrea_middle_factor_bwd

    dtype = w_decomp.dtype
    ragged = _rows_by_length(z, target_offsets, seq_lens)
    z_rows, dy_rows = _rows(z, ragged), _rows(dy, ragged).to(dtype)
    rounded = z_rows.to(dtype)
    rest = None if dtype == z.dtype else (z_rows - rounded).to(dtype)
    dz, dw = launch_lrea_middle_factor_bwd(dy_rows, rounded, rest, w_decomp, ragged, negative_slope)
    return dz.view(z.shape), dw


def _rows_by_length(z: Tensor, target_offsets: Tensor, seq_lens: Tensor | None):
    """How the T·H rows of z are sorted; None: they see all columns, and are not."""
    from recattn.triton_kernels.lrea.core import RaggedRows

    if seq_lens is None:
        return None
    targets, heads, _ = z.shape
    # 0 before the first offset and behind the last, where targets are of no user.
    rows = torch.arange(targets, dtype=target_offsets.dtype, device=z.device)
    places = torch.searchsorted(target_offsets.contiguous(), rows, right=True)
    lengths = pad(seq_lens.int(), (1, 1))[places]
    return RaggedRows(*lengths[:, None].expand(targets, heads).flatten().sort(stable=True))


def _rows(x: Tensor, ragged) -> Tensor:
    """[T, H, r] -> [T·H, r] in the kernels' order."""
    rows = x.flatten(0, 1)
    return rows.contiguous() if ragged is None else rows[ragged.order]


def compress_fwd(behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None, item_ids: Tensor | None) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_fwd

    return launch_lrea_compress_fwd(behaviors, w_comp, _contiguous(seq_lens), item_ids)


def compress_bwd_behaviors(dcompressed: Tensor, w_comp: Tensor, seq_lens: Tensor | None, length: int) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_bwd_behaviors

    tensors = (dcompressed.contiguous(), w_comp.contiguous(), _contiguous(seq_lens))
    return launch_lrea_compress_bwd_behaviors(*tensors, length)


def compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None) -> Tensor:
    from recattn.triton_kernels.lrea.compress import launch_lrea_compress_bwd_w_comp

    return launch_lrea_compress_bwd_w_comp(dcompressed.contiguous(), behaviors, _contiguous(seq_lens))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()

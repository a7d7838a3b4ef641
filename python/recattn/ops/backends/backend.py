"""What a backend is: an unbiased attention that returns its log-sum-exp.

    s_ij = scale · q_i·k_j        lse_i = log Σ_j exp(s_ij)        O_i = Σ_j exp(s_ij - lse_i) v_j

The sum runs over the keys j that query i sees: j <= i if causal, those of its own sequence if packed. Each backward
takes P_ij = exp(s_ij - lse_i) and dO_i·O_i from the O and lse that it is given. Given corrected ones, it returns the
gradients of the corrected attention. A row with lse = +inf has P = 0 and adds nothing.

Callers have the heads first: q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], lse [B, Hq, N]; packed q [T, Hq, D],
lse [T, Hq]. The adapters (`fwd`, `bwd`) have the tokens first: q [B, N, Hq, D], lse [B, Hq, N]; packed q [T, Hq, D],
lse [Hq, T].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.ops._support import token_major

# Limit of a grid's second and third axis, on which these attentions put the heads and the batch.
_MAX_GRID_AXIS = 65535


class Call(NamedTuple):
    """What a backend must support. All of it is known on the host."""

    dtype: torch.dtype
    capability: tuple[int, int]  # of the device
    head_dim: int
    value_dim: int
    q_heads: int
    kv_heads: int
    batch: int
    max_seqlen: int | None  # N; if packed, an upper bound on the lengths, None where only the device knows them
    packed: bool
    scale: float
    deterministic: bool  # the backward must give the same bits every time

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, scale: float, cu_seqlens=None, max_seqlen=None) -> "Call":
        packed = cu_seqlens is not None
        return cls(
            dtype=q.dtype,
            capability=torch.cuda.get_device_capability(q.device),
            head_dim=q.shape[-1],
            value_dim=v.shape[-1],
            q_heads=q.shape[1],
            kv_heads=k.shape[1],
            batch=cu_seqlens.shape[0] - 1 if packed else q.shape[0],
            max_seqlen=max_seqlen if packed else q.shape[2],
            packed=packed,
            scale=scale,
            deterministic=deterministic(),
        )


class BackendOptions(NamedTuple):
    """What an adapter takes besides its tensors."""

    causal: bool
    scale: float
    cu_seqlens: Tensor | None  # [B + 1] int32
    max_seqlen: int


@dataclass(frozen=True)
class AttentionBackend:
    """One unbiased attention.

    `own_unsupported_reason` says why it cannot serve a call (None: it can). `fwd` and `bwd` are its adapters.
    `deterministic`: the backward gives the same bits every time under torch.use_deterministic_algorithms(True); no
    backend does without.
    """

    name: str
    own_unsupported_reason: Callable[[Call], str | None]
    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    deterministic: bool

    def unsupported_reason(self, call: Call) -> str | None:
        """Why this backend cannot serve the call (None: it can)."""
        return unsupported_reason(
            # Some backends scale after masking, some take the maximum before scaling: both assume scale > 0.
            (call.scale > 0, "a positive scale", call.scale),
            (call.batch <= _MAX_GRID_AXIS, f"at most {_MAX_GRID_AXIS} sequences", call.batch),
            (call.q_heads <= _MAX_GRID_AXIS, f"at most {_MAX_GRID_AXIS} heads", call.q_heads),
            # The number of tokens is a bound too, but grids and buffers are sized for `batch` sequences that long.
            (call.max_seqlen is not None, "max_seqlen, a bound on the packed lengths", None),
            (self.deterministic or not call.deterministic, "torch.use_deterministic_algorithms(False)", True),
        ) or self.own_unsupported_reason(call)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), new tensors laid out as by `empty_forward`, to be corrected in place. q must hold tokens."""
        options = _backend_options(q, causal, scale, cu_seqlens, max_seqlen)
        out, lse = self.fwd(*(_aligned(swap_heads(x)) for x in (q, k, v)), options)
        return _laid_out_like(q, swap_heads(out)), _swap_lse(lse.contiguous())

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the attention that gave `out` and `lse`, laid out as by `empty_backward`."""
        options = _backend_options(q, causal, scale, cu_seqlens, max_seqlen)
        tensors = (_aligned(swap_heads(x)) for x in (dout, q, k, v, out))
        dq, dk, dv = map(swap_heads, self.bwd(*tensors, _swap_lse(lse).contiguous(), options))
        return _laid_out_like(q, dq), _laid_out_like(k, dk), _laid_out_like(v, dv)


# --- Helpers of the adapters ---


def unsupported_reason(*requirements: tuple[bool, str, object]) -> str | None:
    """The first requirement that does not hold (None: all hold). Each is (holds, what it needs, what came)."""
    return next((f"it needs {wanted}, got {got}" for holds, wanted, got in requirements if not holds), None)


def flash_unsupported_reason(call: Call) -> str | None:
    """The requirements that all flash attentions share."""
    # Their backward does not fit the shared memory of the smaller chips.
    small = (8, 6) <= call.capability <= (8, 9) or call.capability >= (12, 0)
    return unsupported_reason(
        (call.dtype in (torch.float16, torch.bfloat16), "float16 or bfloat16", call.dtype),
        (call.capability >= (8, 0), "compute capability 8.0 or newer", format_version(call.capability)),
        (call.value_dim == call.head_dim, "one head dim for q, k and v", f"{call.head_dim} and {call.value_dim}"),
        (call.head_dim % 8 == 0, "a head dim divisible by 8", call.head_dim),
        (call.head_dim <= 256, "a head dim up to 256", call.head_dim),
        (not (small and 192 < call.head_dim <= 224), "no head dim above 192 and up to 224 here", call.head_dim),
    )


def format_version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def deterministic() -> bool:
    """Whether PyTorch must give the same bits every time."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


# --- Layouts ---


def empty_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse) as `forward` returns them: out has q's order of tokens and heads, lse is float32."""
    out = _empty_like(q, v.shape[-1])
    if q.dim() == 4:
        return out, q.new_empty(q.shape[:3], dtype=torch.float32)
    tokens, heads = q.shape[:2]
    return out, q.new_empty_strided((tokens, heads), (1, tokens), dtype=torch.float32)


def empty_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (dq, dk, dv) as `backward` returns them: each has the order of its input."""
    return _empty_like(q, q.shape[-1]), _empty_like(k, k.shape[-1]), _empty_like(v, v.shape[-1])


def _heads_inside_tokens(x: Tensor) -> bool:
    """Whether [B, H, N, ...] steps less from head to head than from token to token; it need not be contiguous."""
    return x.dim() == 4 and x.stride(1) < x.stride(2)


def _laid_out_like(like: Tensor, x: Tensor) -> Tensor:
    """x, contiguous in the order of `like`; a copy only if it is not."""
    return token_major(x) if _heads_inside_tokens(like) else x.contiguous()


def _empty_like(like: Tensor, width: int) -> Tensor:
    if width == like.shape[-1] and like.stride(-1) == 1:
        return torch.empty_like(like)  # dense, in the order of `like`
    shape = (*like.shape[:-1], width)
    if _heads_inside_tokens(like):
        return like.new_empty(shape[0], shape[2], shape[1], width).transpose(1, 2)
    return like.new_empty(shape)


def swap_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] <-> [B, N, H, D]; packed [T, H, D] unchanged."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def _swap_lse(lse: Tensor) -> Tensor:
    """[T, H] <-> [H, T]; dense [B, H, N] unchanged."""
    return lse.t() if lse.dim() == 2 else lse


def _aligned(x: Tensor) -> Tensor:
    """x, copied unless 16-byte loads can read every row."""
    per_load = 16 // x.element_size()
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(step > 0 and step % per_load == 0 for step in steps) and x.storage_offset() % per_load == 0
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _backend_options(
    q: Tensor, causal: bool, scale: float, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> BackendOptions:
    if cu_seqlens is None:
        return BackendOptions(causal, scale, None, q.shape[2])
    # With max_seqlen = 1 the flash attentions assume that every sequence has a token.
    return BackendOptions(causal, scale, cu_seqlens.to(torch.int32).contiguous(), max(max_seqlen or 0, 2))

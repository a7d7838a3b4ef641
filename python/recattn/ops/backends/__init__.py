"""Unbiased attentions on CUDA that return their log-sum-exp and take one back: what the correction path stands on.

    s_ij = scale · q_i·k_j        lse_i = log Σ_j exp(s_ij)        O_i = Σ_j exp(s_ij - lse_i) v_j

over the keys j that query i sees (j <= i where causal, and those of its own sequence where packed). Every backward here
takes P_ij = exp(s_ij - lse_i) and dO_i·O_i from the O and lse that it is handed: handed corrected ones, it returns the
gradients of the corrected attention. A row whose lse is +inf has P = 0, and is left out.

Callers see the heads first: q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], lse [B, Hq, N]; packed q [T, Hq, D],
lse [T, Hq]. The adapters below see the tokens first: q [B, N, Hq, D], lse [B, Hq, N]; packed q [T, Hq, D], lse [Hq, T].
"""

import functools
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# The second and third axis of a grid end here, and these attentions put the heads and the batch there.
_LONGEST_GRID_AXIS = 65535
# The memory-efficient attention pads lse to a multiple of this.
_LSE_ALIGNMENT = 32


class Call(NamedTuple):
    """What a base is asked to serve, all of it known on the host."""

    dtype: torch.dtype
    capability: tuple[int, int]  # of the device
    head_dim: int
    value_dim: int
    q_heads: int
    kv_heads: int
    batch: int
    max_seqlen: int | None  # N; packed, a bound on the lengths, None where only the device knows them
    packed: bool
    scale: float
    deterministic: bool  # the backward must repeat to the bit

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
            deterministic=_deterministic(),
        )


class _Settings(NamedTuple):
    """What an adapter is called with besides its tensors."""

    causal: bool
    scale: float
    cu_seqlens: Tensor | None  # [B + 1] int32
    max_seqlen: int


@dataclass(frozen=True)
class BaseAttention:
    """One unbiased attention.

    `limits` says why it cannot serve a call (None: it can). `fwd` and `bwd` are its adapters. `deterministic` says
    whether the backward repeats to the bit under torch.use_deterministic_algorithms(True); none does without.
    """

    name: str
    limits: Callable[[Call], str | None]
    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    deterministic: bool

    def refusal(self, call: Call) -> str | None:
        """Why this attention cannot serve the call (None: it can)."""
        return _unmet(
            # Some scale after they mask, some take the maximum before they scale.
            (call.scale > 0, "a positive scale", call.scale),
            (call.batch <= _LONGEST_GRID_AXIS, f"at most {_LONGEST_GRID_AXIS} sequences", call.batch),
            (call.q_heads <= _LONGEST_GRID_AXIS, f"at most {_LONGEST_GRID_AXIS} heads", call.q_heads),
            # The number of tokens is a bound too, but would launch a grid, or fill memory, for `batch` such sequences.
            (call.max_seqlen is not None, "max_seqlen, a bound on the packed lengths", None),
            (self.deterministic or not call.deterministic, "torch.use_deterministic_algorithms(False)", True),
        ) or self.limits(call)

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
        """(out, lse), new and laid out as `empty_forward` says: to be corrected in place. q holds tokens."""
        settings = _settings(q, causal, scale, cu_seqlens, max_seqlen)
        out, lse = self.fwd(*(_loadable(_swap_heads(x)) for x in (q, k, v)), settings)
        return _laid_out_like(q, _swap_heads(out)), _swap_lse(lse.contiguous())

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
        """(dq, dk, dv) of the attention that `out` and `lse` come from, laid out as `empty_backward` says."""
        settings = _settings(q, causal, scale, cu_seqlens, max_seqlen)
        tensors = (_loadable(_swap_heads(x)) for x in (dout, q, k, v, out))
        dq, dk, dv = map(_swap_heads, self.bwd(*tensors, _swap_lse(lse).contiguous(), settings))
        return _laid_out_like(q, dq), _laid_out_like(k, dk), _laid_out_like(v, dv)


# --- Layouts ---


def empty_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `forward` returns, uninitialised: out follows q, token by token or head by head; lse is float32."""
    rows = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])
    return _empty_like(q, v.shape[-1]), _swap_lse(q.new_empty(rows, dtype=torch.float32))


def empty_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `backward` returns, uninitialised: each gradient follows its input."""
    return _empty_like(q, q.shape[-1]), _empty_like(k, k.shape[-1]), _empty_like(v, v.shape[-1])


def token_major(x: Tensor) -> Tensor:
    """[B, H, N, ...] laid out as [B, N, H, ...]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _is_token_major(x: Tensor) -> bool:
    return x.dim() == 4 and x.stride(1) < x.stride(2)


def _laid_out_like(like: Tensor, x: Tensor) -> Tensor:
    """x token by token or head by head, as `like` is; a copy only if it is not."""
    return token_major(x) if _is_token_major(like) else x.contiguous()


def _empty_like(like: Tensor, width: int) -> Tensor:
    shape = (*like.shape[:-1], width)
    if _is_token_major(like):
        return like.new_empty(shape[0], shape[2], shape[1], width).transpose(1, 2)
    return like.new_empty(shape)


def _swap_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] <-> [B, N, H, D]; packed [T, H, D] as it is."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def _swap_lse(lse: Tensor) -> Tensor:
    """[T, H] <-> [H, T]; dense [B, H, N] as it is."""
    return lse.t() if lse.dim() == 2 else lse


def _loadable(x: Tensor) -> Tensor:
    """x, copied unless every row of it can be loaded 16 bytes at a time."""
    per_load = 16 // x.element_size()
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(step > 0 and step % per_load == 0 for step in steps) and x.storage_offset() % per_load == 0
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _settings(q: Tensor, causal: bool, scale: float, cu_seqlens: Tensor | None, max_seqlen: int | None) -> _Settings:
    if cu_seqlens is None:
        return _Settings(causal, scale, None, q.shape[2])
    # At 1, the flash attentions take every sequence to have a token.
    return _Settings(causal, scale, cu_seqlens.to(torch.int32).contiguous(), max(max_seqlen, 2))


# --- What a call needs ---


def _unmet(*needs: tuple[bool, str, object]) -> str | None:
    """The first need that does not hold, of (holds, what it needs, what came)."""
    return next((f"it needs {wanted}, got {got}" for holds, wanted, got in needs if not holds), None)


def _flash_limits(call: Call) -> str | None:
    """What all flash attentions share."""
    # Their backward does not fit the shared memory of the smaller chips.
    small = (8, 6) <= call.capability <= (8, 9) or call.capability >= (12, 0)
    return _unmet(
        (call.dtype in (torch.float16, torch.bfloat16), "float16 or bfloat16", call.dtype),
        (call.capability >= (8, 0), "compute capability 8.0 or newer", _version(call.capability)),
        (call.value_dim == call.head_dim, "one head dim for q, k and v", f"{call.head_dim} and {call.value_dim}"),
        (call.head_dim % 8 == 0, "a head dim divisible by 8", call.head_dim),
        (call.head_dim <= 256, "a head dim up to 256", call.head_dim),
        (not (small and 192 < call.head_dim <= 224), "no head dim above 192 and up to 224 here", call.head_dim),
    )


@functools.cache
def _unusable(package: Callable[[], object], function: str, parameter: str, since: str) -> str | None:
    """Why an optional package cannot be called: it does not import, or is older than the one whose `function` has
    that optional parameter."""
    try:
        parameters = _optional_parameters(getattr(package(), function))
    except Exception as error:  # a package built for another torch raises all sorts
        return f"it does not import: {error}"
    return None if parameter in parameters else f"it needs {since} or newer: its {function} has no such {parameter}"


def _optional_parameters(function: Callable) -> set[str]:
    operator = getattr(function, "_opoverload", None) or getattr(function, "default", None)
    if operator is not None:
        return {argument.name for argument in operator._schema.arguments if argument.has_default_value()}
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is not parameter.empty}


def _version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _random_state(q: Tensor) -> Tensor:
    """Stands where an operator of PyTorch wants the state of its dropout, which without dropout is never read."""
    return q.new_empty(0, dtype=torch.int64)


# --- FlashAttention 2 in PyTorch ---


def _flash_in_torch_limits(call: Call) -> str | None:
    enabled = torch.backends.cuda.flash_sdp_enabled()
    return _unmet((enabled, "torch.backends.cuda.enable_flash_sdp(True)", enabled)) or _flash_limits(call)


def _flash_fwd(q: Tensor, k: Tensor, v: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    lengths = (s.cu_seqlens, s.cu_seqlens, s.max_seqlen, s.max_seqlen)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, s.causal, False, scale=s.scale)
    return out, lse


def _flash_bwd(dout, q, k, v, out, lse, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (s.cu_seqlens, s.cu_seqlens, s.max_seqlen, s.max_seqlen)
    unread = _random_state(q)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *lengths, 0.0, s.causal, unread, unread, scale=s.scale
    )


# --- cuDNN ---

# No dropout, in other bytes than the 0.0 of PyTorch's own calls. PyTorch finds the plan of a backward by the bytes of a
# key that has the strides of q, k and v, but not those of out and dout. Under the same key a call of its own with other
# strides there would leave a plan that reads our dout wrongly.
_NO_DROPOUT_OF_OURS = -0.0


def _cudnn_limits(call: Call) -> str | None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    version = torch.backends.cudnn.version() or 0
    served = range(8, (256 if call.capability == (9, 0) and version >= 91000 else 128) + 1, 8)
    # This changes how it wants lse laid out.
    ragged = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"
    return _unmet(
        (enabled, "torch.backends.cuda.enable_cudnn_sdp(True)", enabled),
        (version >= 90501, "cuDNN 9.5.1 or newer", version),
        (not ragged, "TORCH_CUDNN_SDPA_AVOID_RECOMPILE unset", 1),
        # PyTorch builds a new plan for every packed call, and its versions disagree on the layout of a packed lse.
        (not call.packed, "a dense batch", "a packed one"),
        (call.dtype in (torch.float16, torch.bfloat16), "float16 or bfloat16", call.dtype),
        (call.capability >= (8, 0), "compute capability 8.0 or newer", _version(call.capability)),
        (call.head_dim in served, f"a multiple of 8 up to {served[-1]} for D", call.head_dim),
        (call.value_dim in served, f"a multiple of 8 up to {served[-1]} for Dv", call.value_dim),
        (call.max_seqlen != 1, "sequences longer than 1", call.max_seqlen),
    )


def _cudnn_fwd(q: Tensor, k: Tensor, v: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    q, k, v = map(_swap_heads, (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, s.causal, False, scale=s.scale
    )
    return _swap_heads(out), lse.squeeze(-1)


def _cudnn_bwd(dout, q, k, v, out, lse, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, dout = map(_swap_heads, (q, k, v, out, dout))
    strides = _output_strides(q, v.shape[-1])
    out, dout, lse = _with_strides(out, strides), _with_strides(dout, strides), lse.unsqueeze(-1)
    unread = _random_state(q)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        unread,
        unread,
        None,
        None,
        None,
        s.max_seqlen,
        s.max_seqlen,
        _NO_DROPOUT_OF_OURS,
        s.causal,
        scale=s.scale,
    )
    return tuple(map(_swap_heads, grads))


def _output_strides(q: Tensor, width: int) -> tuple[int, ...]:
    """Those of an output of this width as PyTorch lays it out: dense, its axes in the order of q's. Its newer versions
    take dout to have them too."""
    if width == q.shape[-1]:
        return torch.empty_like(q, device="meta").stride()
    strides, step = [0] * q.dim(), 1
    for axis in sorted(range(q.dim()), key=q.stride):
        strides[axis], step = step, step * (width if axis == q.dim() - 1 else q.shape[axis])
    return tuple(strides)


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


# --- Memory-efficient attention in PyTorch ---


def _efficient_limits(call: Call) -> str | None:
    enabled = torch.backends.cuda.mem_efficient_sdp_enabled()
    dtypes = (torch.float32, torch.float16) + ((torch.bfloat16,) if call.capability >= (8, 0) else ())
    multiple = 4 if call.dtype == torch.float32 else 8
    heads = f"{call.q_heads} and {call.kv_heads}"
    return _unmet(
        (enabled, "torch.backends.cuda.enable_mem_efficient_sdp(True)", enabled),
        (call.dtype in dtypes, " or ".join(map(str, dtypes)), call.dtype),
        (call.capability >= (5, 0), "compute capability 5.0 or newer", _version(call.capability)),
        (call.q_heads == call.kv_heads, "as many key heads as query heads", heads),
        (call.head_dim % multiple == 0, f"a multiple of {multiple} for D", call.head_dim),
        (call.value_dim % multiple == 0, f"a multiple of {multiple} for Dv", call.value_dim),
    )


def _efficient_fwd(q: Tensor, k: Tensor, v: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    q, k, v = (x.view(-1, *x.shape[-3:]) for x in (q, k, v))  # packed, a batch of one
    longest = min(s.max_seqlen, q.shape[1])
    lengths = (s.cu_seqlens, s.cu_seqlens, longest, longest)
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, *lengths, 0.0, int(s.causal), True, scale=s.scale
    )
    if s.cu_seqlens is None:
        return out, lse[..., : q.shape[1]]
    return out.squeeze(0), _pack_lse(lse, s.cu_seqlens, q.shape[1])


def _efficient_bwd(dout, q, k, v, out, lse, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (q.shape, k.shape, v.shape)
    dout, q, k, v, out = (x.view(-1, *x.shape[-3:]) for x in (dout, q, k, v, out))
    longest = min(s.max_seqlen, q.shape[1])
    padded = math.ceil(longest / _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    if s.cu_seqlens is None:
        lse = F.pad(lse, (0, padded - longest), value=math.inf)
    else:
        lse = _unpack_lse(lse, s.cu_seqlens, padded)
    unread = _random_state(q)
    lengths = (s.cu_seqlens, s.cu_seqlens, longest, longest)
    *grads, _ = torch.ops.aten._efficient_attention_backward(
        # It takes the tokens of `out` to lie one after the other.
        *(dout, q, k, v, None, out.contiguous()),
        *lengths,
        *(lse, 0.0, unread, unread, int(s.causal), False),
        scale=s.scale,
    )
    return tuple(grad.view(shape) for grad, shape in zip(grads, shapes, strict=True))


def _pack_lse(lse: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[B, H, L] of padded sequences -> [H, T]."""
    token = torch.arange(tokens, device=lse.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    return lse[sequence, :, token - cu_seqlens[sequence]].t()


def _unpack_lse(lse: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """[H, T] -> [B, H, L] of sequences padded with +inf."""
    position = torch.arange(length, device=lse.device, dtype=torch.int32)
    token = cu_seqlens[:-1, None] + position  # [B, L]
    padding = token >= cu_seqlens[1:, None]
    lse = lse[:, token.clamp(max=lse.shape[1] - 1)].masked_fill(padding, math.inf)
    return lse.transpose(0, 1).contiguous()


# --- Dao's packages ---


def _flash_attn_2():
    import flash_attn.flash_attn_interface

    return flash_attn.flash_attn_interface


def _flash_attn_2_limits(call: Call) -> str | None:
    return _flash_limits(call) or _unusable(
        _flash_attn_2, "_flash_attn_varlen_forward", "window_size_left", "flash_attn 2.7"
    )


def _flash_attn_2_fwd(q: Tensor, k: Tensor, v: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    forward, lengths = _flash_attn_2()._flash_attn_forward, {}
    if s.cu_seqlens is not None:
        forward, lengths = _flash_attn_2()._flash_attn_varlen_forward, _lengths(s)
    out, lse, *_ = forward(q=q, k=k, v=v, **lengths, **_flash_attn_2_options(s), return_softmax=False)
    return out, lse


def _flash_attn_2_bwd(dout, q, k, v, out, lse, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    backward, lengths = _flash_attn_2()._flash_attn_backward, {}
    if s.cu_seqlens is not None:
        backward, lengths = _flash_attn_2()._flash_attn_varlen_backward, _lengths(s)
    saved = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    backward(**saved, dq=dq, dk=dk, dv=dv, **lengths, **_flash_attn_2_options(s), deterministic=_deterministic())
    return dq, dk, dv


def _flash_attn_2_options(s: _Settings) -> dict[str, object]:
    everywhere = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
    return {"dropout_p": 0.0, "softmax_scale": s.scale, "causal": s.causal, **everywhere}


def _lengths(s: _Settings) -> dict[str, object]:
    return {
        "cu_seqlens_q": s.cu_seqlens,
        "cu_seqlens_k": s.cu_seqlens,
        "max_seqlen_q": s.max_seqlen,
        "max_seqlen_k": s.max_seqlen,
    }


def _flash_attn_3():
    import flash_attn_3._C  # noqa: F401  (registers its operators)

    return torch.ops.flash_attn_3


def _flash_attn_3_limits(call: Call) -> str | None:
    narrow = call.head_dim <= 192 or not call.deterministic
    return (
        _flash_limits(call)
        or _unmet(
            (call.capability == (9, 0), "compute capability 9.0", _version(call.capability)),
            (narrow, "a head dim up to 192 to be deterministic", call.head_dim),
        )
        or _unusable(_flash_attn_3, "bwd", "cu_seqlens_q", "flash_attn_3 of September 2025")
    )


def _flash_attn_3_fwd(q: Tensor, k: Tensor, v: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    options = {"softmax_scale": s.scale, "is_causal": s.causal, "num_splits": 1}
    _, lse, *_ = _flash_attn_3().fwd(q=q, k=k, v=v, out=out, **_lengths(s), **options)
    return out, lse


def _flash_attn_3_bwd(dout, q, k, v, out, lse, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    saved = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    options = {"softmax_scale": s.scale, "is_causal": s.causal, "deterministic": _deterministic()}
    _flash_attn_3().bwd(**saved, dq=dq, dk=dk, dv=dv, **_lengths(s), **options)
    return dq, dk, dv


def _flash_attn_4():
    import flash_attn.cute.interface

    return flash_attn.cute.interface


def _flash_attn_4_limits(call: Call) -> str | None:
    return (
        _flash_limits(call)
        or _unmet(
            (call.capability[0] in (9, 10), "compute capability 9.x or 10.x", _version(call.capability)),
            (call.head_dim <= 128, "a head dim up to 128", call.head_dim),
        )
        # Before that its backward took no packed batch, and was not deterministic, on Hopper.
        or _unusable(_flash_attn_4, "_flash_attn_bwd", "dlse", "flash-attn-4 4.0.0b5")
    )


def _flash_attn_4_fwd(q: Tensor, k: Tensor, v: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    options = {"softmax_scale": s.scale, "causal": s.causal, "return_lse": True}
    out, lse, *_ = _flash_attn_4()._flash_attn_fwd(q, k, v, out=torch.empty_like(q), **_lengths(s), **options)
    return out, lse


def _flash_attn_4_bwd(dout, q, k, v, out, lse, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    options = {"softmax_scale": s.scale, "causal": s.causal, "deterministic": _deterministic()}
    dq, dk, dv, *_ = _flash_attn_4()._flash_attn_bwd(q, k, v, out, dout, lse, **_lengths(s), **options)
    return dq, dk, dv


# --- Registry ---

BASES: dict[str, BaseAttention] = {}


def register(base: BaseAttention) -> BaseAttention:
    if base.name in BASES:
        raise ValueError(f"name must be new to the registry, which has {', '.join(BASES)}, got {base.name}")
    BASES[base.name] = base
    return base


def supporting(call: Call) -> list[BaseAttention]:
    """The attentions that can serve the call, in the order in which they are registered."""
    return [base for base in BASES.values() if base.refusal(call) is None]


# Fastest first, by their published figures for Hopper.
register(BaseAttention("flash_attn_3", _flash_attn_3_limits, _flash_attn_3_fwd, _flash_attn_3_bwd, deterministic=True))
register(BaseAttention("flash_attn_4", _flash_attn_4_limits, _flash_attn_4_fwd, _flash_attn_4_bwd, deterministic=True))
register(BaseAttention("cudnn", _cudnn_limits, _cudnn_fwd, _cudnn_bwd, deterministic=False))
register(BaseAttention("flash", _flash_in_torch_limits, _flash_fwd, _flash_bwd, deterministic=True))
register(BaseAttention("flash_attn_2", _flash_attn_2_limits, _flash_attn_2_fwd, _flash_attn_2_bwd, deterministic=True))
register(BaseAttention("efficient", _efficient_limits, _efficient_fwd, _efficient_bwd, deterministic=True))

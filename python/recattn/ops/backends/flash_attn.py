"""The flash_attn packages 2, 3 and 4, where installed."""

import functools
import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from recattn.ops.backends.backend import (
    AttentionBackend,
    BackendOptions,
    Call,
    deterministic,
    flash_unsupported_reason,
    format_version,
    unsupported_reason,
)


@functools.cache
def package_unsupported_reason(package: Callable[[], object], function: str, parameter: str, since: str) -> str | None:
    """Why an optional package cannot be used (None: it can).

    Either it does not import, or it is older than `since`, the first version whose `function` has the optional
    `parameter`.
    """
    try:
        parameters = _optional_parameters(getattr(package(), function))
    except Exception as error:  # a package built for another torch may raise anything
        return f"it does not import: {error}"
    return None if parameter in parameters else f"it needs {since} or newer: its {function} has no such {parameter}"


def _optional_parameters(function: Callable) -> set[str]:
    operator = getattr(function, "_opoverload", None) or getattr(function, "default", None)
    if operator is not None:
        return {argument.name for argument in operator._schema.arguments if argument.has_default_value()}
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is not parameter.empty}


# --- FlashAttention 2 ---


def _flash_attn_2():
    return importlib.import_module("flash_attn.flash_attn_interface")


def _flash_attn_2_unsupported_reason(call: Call) -> str | None:
    return flash_unsupported_reason(call) or package_unsupported_reason(
        _flash_attn_2, "_flash_attn_varlen_forward", "window_size_left", "flash_attn 2.7"
    )


def _flash_attn_2_fwd(q: Tensor, k: Tensor, v: Tensor, options: BackendOptions) -> tuple[Tensor, Tensor]:
    forward, lengths = _flash_attn_2()._flash_attn_forward, {}
    if options.cu_seqlens is not None:
        forward, lengths = _flash_attn_2()._flash_attn_varlen_forward, _lengths(options)
    out, lse, *_ = forward(q=q, k=k, v=v, **lengths, **_flash_attn_2_keywords(options), return_softmax=False)
    return out, lse


def _flash_attn_2_bwd(dout, q, k, v, out, lse, options: BackendOptions) -> tuple[Tensor, Tensor, Tensor]:
    backward, lengths = _flash_attn_2()._flash_attn_backward, {}
    if options.cu_seqlens is not None:
        backward, lengths = _flash_attn_2()._flash_attn_varlen_backward, _lengths(options)
    saved = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    backward(**saved, dq=dq, dk=dk, dv=dv, **lengths, **_flash_attn_2_keywords(options), deterministic=deterministic())
    return dq, dk, dv


def _flash_attn_2_keywords(options: BackendOptions) -> dict[str, object]:
    every_call = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
    return {"dropout_p": 0.0, "softmax_scale": options.scale, "causal": options.causal, **every_call}


def _lengths(options: BackendOptions) -> dict[str, object]:
    return {
        "cu_seqlens_q": options.cu_seqlens,
        "cu_seqlens_k": options.cu_seqlens,
        "max_seqlen_q": options.max_seqlen,
        "max_seqlen_k": options.max_seqlen,
    }


# --- FlashAttention 3 ---


def _flash_attn_3():
    importlib.import_module("flash_attn_3._C")  # registers its operators
    return torch.ops.flash_attn_3


def _flash_attn_3_unsupported_reason(call: Call) -> str | None:
    narrow = call.head_dim <= 192 or not call.deterministic
    return (
        flash_unsupported_reason(call)
        or unsupported_reason(
            (call.capability == (9, 0), "compute capability 9.0", format_version(call.capability)),
            (narrow, "a head dim up to 192 to be deterministic", call.head_dim),
        )
        or package_unsupported_reason(_flash_attn_3, "bwd", "cu_seqlens_q", "flash_attn_3 of September 2025")
    )


def _flash_attn_3_fwd(q: Tensor, k: Tensor, v: Tensor, options: BackendOptions) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    keywords = {"softmax_scale": options.scale, "is_causal": options.causal, "num_splits": 1}
    _, lse, *_ = _flash_attn_3().fwd(q=q, k=k, v=v, out=out, **_lengths(options), **keywords)
    return out, lse


def _flash_attn_3_bwd(dout, q, k, v, out, lse, options: BackendOptions) -> tuple[Tensor, Tensor, Tensor]:
    saved = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    keywords = {"softmax_scale": options.scale, "is_causal": options.causal, "deterministic": deterministic()}
    _flash_attn_3().bwd(**saved, dq=dq, dk=dk, dv=dv, **_lengths(options), **keywords)
    return dq, dk, dv


# --- FlashAttention 4 ---


def _flash_attn_4():
    return importlib.import_module("flash_attn.cute.interface")


def _flash_attn_4_unsupported_reason(call: Call) -> str | None:
    return (
        flash_unsupported_reason(call)
        or unsupported_reason(
            (call.capability[0] in (9, 10), "compute capability 9.x or 10.x", format_version(call.capability)),
            (call.head_dim <= 128, "a head dim up to 128", call.head_dim),
        )
        # In older versions the backward on Hopper takes no packed batch and is not deterministic.
        or package_unsupported_reason(_flash_attn_4, "_flash_attn_bwd", "dlse", "flash-attn-4 4.0.0b5")
    )


def _flash_attn_4_fwd(q: Tensor, k: Tensor, v: Tensor, options: BackendOptions) -> tuple[Tensor, Tensor]:
    keywords = {"softmax_scale": options.scale, "causal": options.causal, "return_lse": True}
    out, lse, *_ = _flash_attn_4()._flash_attn_fwd(q, k, v, out=torch.empty_like(q), **_lengths(options), **keywords)
    return out, lse


def _flash_attn_4_bwd(dout, q, k, v, out, lse, options: BackendOptions) -> tuple[Tensor, Tensor, Tensor]:
    keywords = {"softmax_scale": options.scale, "causal": options.causal, "deterministic": deterministic()}
    dq, dk, dv, *_ = _flash_attn_4()._flash_attn_bwd(q, k, v, out, dout, lse, **_lengths(options), **keywords)
    return dq, dk, dv


FLASH_ATTN_2 = AttentionBackend(
    "flash_attn_2", _flash_attn_2_unsupported_reason, _flash_attn_2_fwd, _flash_attn_2_bwd, deterministic=True
)
FLASH_ATTN_3 = AttentionBackend(
    "flash_attn_3", _flash_attn_3_unsupported_reason, _flash_attn_3_fwd, _flash_attn_3_bwd, deterministic=True
)
FLASH_ATTN_4 = AttentionBackend(
    "flash_attn_4", _flash_attn_4_unsupported_reason, _flash_attn_4_fwd, _flash_attn_4_bwd, deterministic=True
)

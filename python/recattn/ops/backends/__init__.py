"""Backends of sink_attention's correction: unbiased attentions on CUDA that return their log-sum-exp and accept one.

`backend.py` says what a backend is, `aten.py` holds PyTorch's own, `flash_attn.py` the flash_attn packages.
"""

from recattn.ops.backends.aten import CUDNN, EFFICIENT, FLASH
from recattn.ops.backends.backend import AttentionBackend, Call, empty_backward, empty_forward
from recattn.ops.backends.flash_attn import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4

__all__ = ["BACKENDS", "AttentionBackend", "Call", "empty_backward", "empty_forward", "register"]

BACKENDS: dict[str, AttentionBackend] = {}


def register(backend: AttentionBackend) -> AttentionBackend:
    if backend.name in BACKENDS:
        raise ValueError(f"name must be new to the registry, which has {', '.join(BACKENDS)}, got {backend.name}")
    BACKENDS[backend.name] = backend
    return backend


# Fastest first, by their published figures for Hopper.
for _backend in (FLASH_ATTN_3, FLASH_ATTN_4, CUDNN, FLASH, FLASH_ATTN_2, EFFICIENT):
    register(_backend)

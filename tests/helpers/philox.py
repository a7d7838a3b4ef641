"""Philox in NumPy: the dropout masks of the kernels, written another way."""

import numpy as np
import torch
from torch import Tensor

LOW = np.uint64(0xFFFFFFFF)


def philox(seed: int, counters: list[np.ndarray]) -> list[np.ndarray]:
    """Philox-4x32-10: four random 32-bit numbers for each counter (a, b, c, d)."""
    a, b, c, d = (x.astype(np.uint64) for x in counters)
    keys = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint64)
    for _ in range(10):
        from_a, from_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (from_c >> np.uint64(32)) ^ b ^ keys[0], from_c & LOW
        c, d = (from_a >> np.uint64(32)) ^ d ^ keys[1], from_a & LOW
        keys = (keys + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & LOW
    return [a, b, c, d]


def dropout_weights(seed: int, bh: int, stream: int, rows: int, columns: int, dropout_p: float) -> Tensor:
    """[rows, columns] in float64: 0 where a weight is dropped, else 1 / (1 - dropout_p), in steps of 1/65536."""
    groups, index = np.meshgrid(np.arange(-(-columns // 8)), np.arange(rows))
    a, b, c, d = philox(seed, [groups, index, groups * 0 + bh, groups * 0 + stream])
    words = np.stack([a, c, b, d], axis=-1)  # [rows, columns / 8, 4]
    bits = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1).reshape(rows, groups.shape[1] * 8)
    threshold = min(round(dropout_p * 65536), 65535)
    return torch.from_numpy(np.where(bits[:, :columns] < threshold, 0, 65536 / (65536 - threshold)))

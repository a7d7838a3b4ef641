"""The problems that every operator is checked on: a small odd shape, ragged ones, and a real one.

Inputs are drawn on the CPU, so that every device gets the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu
from torch.nn.utils.rnn import pad_sequence

import recattn
from recattn import reference
from recattn._dispatch import format_implementation
from recattn.ops import UNSUPPORTED_REASONS
from recattn.ops.backends import BACKENDS

Inputs = dict[str, Any]
REAL = "real"  # the case that --quick leaves out


@dataclass(frozen=True)
class Case:
    """Arguments of a public function. `hints` are arguments that the reference does not have."""

    name: str
    draw: Callable[[torch.dtype], Inputs]
    grads: Sequence[str] = ()
    hints: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operator:
    """A public function, its specification, and the problems to try it on.

    `implementations` maps a device type to {implementation: why it cannot run there (None: it can)}; `cases` gives the
    problems for a device type and dtype.
    """

    name: str
    function: Callable
    reference: Callable
    implementations: Callable[[str], Mapping[str, str | None]]
    cases: Callable[[str, torch.dtype], list[Case]]


def implementations(op: str, device: str) -> dict[str, str | None]:
    """All implementations but the reference, which is what they are compared with; the correction once per backend."""
    reasons = {impl: why for impl, why in UNSUPPORTED_REASONS[op](device).items() if impl != "reference"}
    if op == "sink_attention" and device == "cuda":
        why = reasons.pop("correction")
        reasons |= {format_implementation("correction", backend): why for backend in BACKENDS}
    return reasons


def _normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape)).to(dtype)


def _offsets(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


# --- sink_attention, inter_sink_bias ---

_QKV = ("q", "k", "v", "inter_sink_bias")


def sink_attention_cases(device: str, _dtype: torch.dtype) -> list[Case]:
    real = (2, 8, 8, 1024, 64, 102) if device == "cuda" else (1, 2, 2, 384, 64, 38)

    def odd(dtype) -> Inputs:
        return _dense(dtype, 2, 4, 2, 129, 40, 13, bias_heads=4) | {"sink_logits": torch.randn(4), "causal": True}

    def windows(dtype) -> Inputs:
        lengths, starts = (100, 0, 63), (0, 40, 21)
        padding = {"seq_lens": torch.tensor(lengths), "seq_starts": torch.tensor(starts)}
        return _dense(dtype, 3, 2, 2, 100, 64, 11, lengths=lengths, starts=starts) | padding

    def suppressed(dtype):  # a negative bias makes the kernels recompute rows
        inputs = _packed(dtype, (100, 0, 63, 1), 2, 64, 11)
        return inputs | {"inter_sink_bias": inputs["inter_sink_bias"] * 5 - 5, "causal": True}

    return [
        Case("odd", odd, (*_QKV, "sink_logits")),
        Case("ragged", windows, _QKV),
        Case("packed", suppressed, _QKV, {"max_seqlen": 100}),
        Case(REAL, lambda dtype: _dense(dtype, *real) | {"causal": True}, _QKV),
    ]


def _dense(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    dim: int,
    sinks: int,
    *,
    bias_heads: int = 1,
    lengths: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
) -> Inputs:
    return {
        "q": _normal(batch, heads, length, dim, dtype=dtype),
        "k": _normal(batch, kv_heads, length, dim, dtype=dtype),
        "v": _normal(batch, kv_heads, length, dim, dtype=dtype),
        "sink_positions": _sinks(starts or (0,) * batch, lengths or (length,) * batch, sinks),
        "inter_sink_bias": torch.randn(batch, bias_heads, sinks, sinks),
    }


def _packed(dtype: torch.dtype, lengths: Sequence[int], heads: int, dim: int, sinks: int) -> Inputs:
    return {
        **{name: _normal(sum(lengths), heads, dim, dtype=dtype) for name in ("q", "k", "v")},
        "sink_positions": _sinks([0] * len(lengths), lengths, sinks),
        "inter_sink_bias": torch.randn(len(lengths), 1, sinks, sinks),
        "cu_seqlens": _offsets(lengths),
    }


def _sinks(starts: Sequence[int], lengths: Sequence[int], most: int) -> Tensor:
    """[B, most]: random tokens of each sequence in ascending order, padded with -1."""
    found = [start + torch.randperm(n)[:most].sort().values for start, n in zip(starts, lengths, strict=True)]
    room = torch.zeros(most, dtype=torch.int64)
    return pad_sequence([*found, room], batch_first=True, padding_value=-1)[:-1]


def inter_sink_bias_cases(_device: str, _dtype: torch.dtype) -> list[Case]:
    def draw(dtype, batch, heads, sinks, dim) -> Inputs:
        sink_mask = torch.arange(sinks) < torch.randint(sinks + 1, (batch, 1))
        sink_mask[0] = False
        tensors = {name: _normal(batch, heads, sinks, dim, dtype=dtype) for name in ("q_s", "k_s")}
        return {**tensors, "sink_mask": sink_mask, "bias_scale": torch.tensor(10.0)}

    grads = ("q_s", "k_s", "bias_scale")
    return [
        Case("odd", lambda dtype: draw(dtype, 3, 3, 13, 20) | {"causal": True}, grads),
        Case("ragged", lambda dtype: draw(dtype, 3, 2, 65, 32), grads),
        Case(REAL, lambda dtype: draw(dtype, 4, 12, 100, 64), grads),
    ]


# --- refined_attention, wasserstein_attention ---


def refined_attention_cases(_device: str, _dtype: torch.dtype) -> list[Case]:
    def draw(dtype, batch, length, dim, rank, value_dim=None, w_v=False, **options) -> Inputs:
        inputs = {name: _normal(batch, 2, length, dim, dtype=dtype) for name in ("q", "k")}
        inputs["v"] = _normal(batch, 2, length, value_dim or dim, dtype=dtype)
        widths = {"w_q": rank, "w_k": rank} | ({"w_v": length} if w_v else {})
        weights = {name: _normal(length, n, dtype=dtype, std=length**-0.5 / 2) for name, n in widths.items()}
        return inputs | weights | {"causal": True} | options

    def draw_packed(dtype, lengths, dim, rank) -> Inputs:
        inputs = draw(dtype, 1, sum(lengths), dim, rank)
        tokens = {name: inputs[name][0].transpose(0, 1).contiguous() for name in ("q", "k", "v")}
        return inputs | tokens | {"cu_seqlens": _offsets(lengths)}

    left: Inputs = {"seq_lens": torch.tensor([32, 0, 17]), "padding_side": "left"}
    right: Inputs = {"seq_lens": torch.tensor([100, 1, 64]), "causal": False}
    of_weights: Inputs = {"source": "weights"}
    plain, with_values = ("q", "k", "v", "w_q", "w_k"), ("q", "k", "v", "w_q", "w_k", "w_v")
    return [
        Case("odd", lambda dtype: draw(dtype, 3, 33, 40, 20, value_dim=24), plain),
        Case(
            "ragged value",
            lambda dtype: draw(dtype, 3, 32, 64, 32, w_v=True, mechanism="value", **of_weights, **left),
            with_values,
        ),
        Case(
            "ragged additive",
            lambda dtype: draw(dtype, 3, 100, 32, 40, w_v=True, mechanism="additive", **right),
            with_values,
        ),
        Case("stochastic", lambda dtype: draw(dtype, 2, 40, 32, 40, mechanism="stochastic", **of_weights), plain),
        Case("long", lambda dtype: draw(dtype, 1, 300, 64, 64), plain),
        Case("packed", lambda dtype: draw_packed(dtype, [50, 0, 7, 33], 64, 40), plain),
        Case(REAL, lambda dtype: draw(dtype, 16, 50, 64, 50), plain),
    ]


def wasserstein_attention_cases(_device: str, _dtype: torch.dtype) -> list[Case]:
    plain = ("mean_q", "cov_q", "mean_k", "cov_k", "mean_v", "cov_v")

    def draw(dtype, batch, heads, length, dim, value_dim, rank=None, **options) -> Inputs:
        """Distances, also refined ones, stay around 1. If they were larger, one key would get all the weight."""
        widths = {name: dim for name in plain} | {"mean_v": value_dim, "cov_v": value_dim}
        inputs = {name: torch.randn(batch, heads, length, width) / 2 for name, width in widths.items()}
        inputs = {name: elu(x) + 1 if name.startswith("cov") else x for name, x in inputs.items()}
        if rank is not None:
            squares = 1 if options.get("source") == "weights" else length * dim
            inputs |= {w: torch.randn(length, 2 * rank) * (rank**0.5 * squares) ** -0.5 for w in ("w_q", "w_k")}
        return {name: x.to(dtype) for name, x in inputs.items()} | {"causal": True} | options

    left: Inputs = {"seq_lens": torch.tensor([50, 0, 17]), "padding_side": "left"}
    refined = (*plain, "w_q", "w_k")
    return [
        Case("odd", lambda dtype: draw(dtype, 2, 2, 33, 12, 10), plain),
        Case(
            "ragged, refined", lambda dtype: draw(dtype, 3, 2, 50, 16, 16, rank=20, source="weights", **left), refined
        ),
        Case("refined", lambda dtype: draw(dtype, 2, 2, 40, 16, 16, rank=16), refined),
        Case(REAL, lambda dtype: draw(dtype, 8, 4, 100, 16, 16), plain),
    ]


# --- LREA ---


def lrea_compress_cases(_device: str, _dtype: torch.dtype) -> list[Case]:
    def weights(dtype, length, rank) -> Inputs:
        return {"w_comp": _normal(length, rank, dtype=dtype, std=length**-0.5)}

    def draw(dtype, users, length, dim, rank, seq_lens=None) -> Inputs:
        behaviors = _normal(users, length, dim, dtype=dtype)
        return {"behaviors": behaviors, **weights(dtype, length, rank), "seq_lens": seq_lens}

    def by_item(dtype) -> Inputs:
        item_ids, lengths = torch.randint(200, (3, 101)), torch.tensor([101, 0, 40])
        table = {"behaviors": _normal(200, 32, dtype=dtype), **weights(dtype, 101, 16)}
        return {**table, "item_ids": item_ids, "seq_lens": lengths}

    def packed(dtype) -> Inputs:
        tensors = {"behaviors": _normal(141, 32, dtype=dtype), **weights(dtype, 101, 16)}
        return {**tensors, "cu_seqlens": torch.tensor([0, 101, 101, 141])}

    grads = ("behaviors", "w_comp")
    return [
        Case("odd", lambda dtype: draw(dtype, 3, 101, 17, 5), grads),
        Case("ragged", lambda dtype: draw(dtype, 3, 101, 32, 16, torch.tensor([101, 0, 40])), grads),
        Case("packed", packed, grads),
        Case("by item id", by_item),
        Case(REAL, lambda dtype: draw(dtype, 16, 1024, 64, 32, torch.randint(1025, (16,))), grads),
    ]


def lrea_attention_cases(device: str, _dtype: torch.dtype) -> list[Case]:
    def draw(dtype, counts, heads, length, rank, dim, value_dim, seq_lens=None) -> Inputs:
        users = len(counts)
        return {
            "targets": _normal(sum(counts), heads, dim, dtype=dtype),
            "keys": _normal(users, heads, rank, dim, dtype=dtype),
            "values": _normal(users, heads, rank, value_dim, dtype=dtype),
            "w_decomp": _normal(rank, length, dtype=dtype, std=rank**-0.5),
            "target_offsets": _offsets(counts),
            "seq_lens": seq_lens,
        }

    grads = ("targets", "keys", "values", "w_decomp")
    ragged = torch.tensor([100, 0, 1, 40])
    cases = [
        Case("odd", lambda dtype: draw(dtype, (3, 0, 1, 63), 2, 101, 7, 20, 12), grads),
        Case("ragged", lambda dtype: draw(dtype, (3, 0, 1, 63), 2, 100, 16, 32, 32, ragged), grads),
        Case(REAL, lambda dtype: draw(dtype, (50,) * 8, 1, 1024, 32, 64, 64), grads),
    ]
    if device == "cuda":  # whose kernels sort users where much is multiplied, and split histories for few targets
        lengths = torch.randint(2049, (64,))
        cases += [
            Case("long", lambda dtype: draw(dtype, (100, 0, 3, 197), 1, 16384, 64, 64, 64, 163 * ragged), grads),
            Case("sorted", lambda dtype: draw(dtype, (132,) * 64, 1, 2048, 32, 64, 64, lengths), grads),
        ]
    return cases


def lrea_absorbed_attention_cases(device: str, dtype: torch.dtype) -> list[Case]:
    def draw(dtype, counts, heads, rank, dim, value_dim) -> Inputs:
        users = len(counts)
        return {
            "targets": _normal(sum(counts), heads, dim, dtype=dtype),
            "state_keys": _normal(users + 3, heads, rank, dim, dtype=dtype, std=dim**-0.5),
            "state_values": _normal(users + 3, heads, rank, value_dim, dtype=dtype),
            "slots": torch.randperm(users + 3)[:users],
            "target_offsets": _offsets(counts),
        }

    def by_item(dtype) -> Inputs:
        inputs = draw(dtype, (1, 0, 2, 129, 40), 2, 32, 64, 64)
        item_ids = torch.randint(50, (len(inputs["targets"]),))
        return inputs | {"targets": inputs["targets"][:50], "item_ids": item_ids}

    def int8(dtype) -> Inputs:
        inputs = by_item(dtype)
        for which in ("key", "value"):
            state, scales = recattn.lrea_quantize(inputs[f"state_{which}s"])
            inputs |= {f"state_{which}s": state, f"{which}_scales": scales}
        return inputs

    cases = [
        Case("odd", lambda dtype: draw(dtype, (1, 0, 2, 129, 40), 2, 7, 21, 13)),
        Case("by item id", by_item),
        Case("int8", int8),
        Case(REAL, lambda dtype: draw(dtype, (100,) * 64, 1, 32, 64, 64)),
    ]
    # With VNNI a CPU rounds float32 and float16 targets to 16-bit integers, on purpose.
    if device == "cpu" and dtype != torch.bfloat16:
        del cases[2]
    return cases


OPERATORS = {
    name: Operator(name, getattr(recattn, name), getattr(reference, name), partial(implementations, name), cases)
    for name, cases in {
        "sink_attention": sink_attention_cases,
        "inter_sink_bias": inter_sink_bias_cases,
        "refined_attention": refined_attention_cases,
        "wasserstein_attention": wasserstein_attention_cases,
        "lrea_compress": lrea_compress_cases,
        "lrea_attention": lrea_attention_cases,
        "lrea_absorbed_attention": lrea_absorbed_attention_cases,
    }.items()
}

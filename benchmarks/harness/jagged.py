"""Contestants without padding: padded inputs as packed ones, and packed ones as nested tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.harness.registry import Inputs, Operator
from recattn.reference.sink_attention import valid_tokens, window_starts

PACKED, NESTED = "recattn, cu_seqlens", "recattn, nested"


def add_recattn(operator: Operator, function: Callable, reference: Callable, names: Sequence[str]) -> None:
    """Register the function by packed and by nested tensors, of workloads of histories. Two results are concatenated.

    `reference` takes packed tensors, the inputs called `names`.
    """
    options = {
        "prepare": pack(names),
        "restore": unpack(names[0]),
        "reference": packed_reference(reference, names),
        "applies": lambda workload: workload.histories,
        "ours": True,
    }
    operator.implementation(PACKED, **options)(lambda **inputs: _as_one(function(**inputs)))
    operator.implementation(NESTED, **options)(nested(function, names))


def pack(names: Sequence[str]) -> Callable[[Inputs], Inputs]:
    """Padded [B, H, N, D] and [B, N, d] to packed [T, H, D] and [T, d], with cu_seqlens and max_seqlen."""

    def prepare(inputs: Inputs) -> Inputs:
        valid, lengths = _valid(inputs, names[0]), inputs["seq_lens"]
        others = {name: x for name, x in inputs.items() if name not in ("seq_lens", "padding_side")}
        packed = {name: _tokens_first(inputs[name])[valid] for name in names}
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        return {**others, **packed, "cu_seqlens": offsets, "max_seqlen": int(lengths.max())}

    return prepare


def unpack(name: str) -> Callable[[Tensor, Inputs], Tensor]:
    """Packed [T, H, D] to [B, H, N, D], padded with zeros as the input called `name` is."""

    def restore(output: Tensor, inputs: Inputs) -> Tensor:
        if inputs[name].dim() == 3:  # a compressed history
            return output
        valid = _valid(inputs, name)
        padded = output.new_zeros(*valid.shape, *output.shape[1:])
        return padded.index_put((valid,), output).transpose(1, 2)

    return restore


def packed_reference(reference: Callable, names: Sequence[str]) -> Callable:
    """The reference of padded inputs as if they were packed: positions count from a sequence's first token."""

    def of_packed(**inputs) -> Tensor:
        packed = pack(names)(inputs)
        packed.pop("max_seqlen")
        return unpack(names[0])(_as_one(reference(**packed)), inputs)

    return of_packed


def nested(function: Callable, names: Sequence[str]) -> Callable:
    """The function on nested tensors, which each call makes from packed ones; packed results."""

    def run(*, cu_seqlens: Tensor, max_seqlen: int, **inputs) -> Tensor:
        def nest(x: Tensor) -> Tensor:
            tokens, axis = (x.transpose(0, 1), 2) if x.dim() == 3 else (x, 1)
            return torch.nested.nested_tensor_from_jagged(tokens, cu_seqlens, jagged_dim=axis, max_seqlen=max_seqlen)

        out = function(**{name: nest(x) if name in names else x for name, x in inputs.items()})
        outs = out if isinstance(out, tuple) else (out,)
        return _as_one(tuple(x.values().transpose(0, 1) if x.is_nested else x for x in outs))

    return run


def _as_one(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat(out, dim=-1)


def _valid(inputs: Inputs, name: str) -> Tensor:
    """[B, N], True at tokens."""
    lengths, n = inputs["seq_lens"], inputs[name].shape[-2]
    starts = window_starts(inputs.get("padding_side", "right"), n, lengths)
    return valid_tokens(len(lengths), n, lengths, starts, lengths.device)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2) if x.dim() == 4 else x

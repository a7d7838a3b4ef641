"""Contestants without padding: padded inputs as packed ones, and packed ones as nested tensors."""

import functools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.goals import TimeGoal
from benchmarks.harness.registry import FORWARD, TRAINING, Inputs, Operator, Outputs
from benchmarks.harness.workloads import CPU, Workload, offsets
from recattn.reference.sink_attention import valid_tokens, window_starts

PACKED, NESTED = "recattn, cu_seqlens", "recattn, nested"
PACKED_COMPILED, NESTED_COMPILED = f"{PACKED}, torch.compile", f"{NESTED}, torch.compile"


def add_recattn(operator: Operator, function: Callable, reference: Callable, names: Sequence[str]) -> None:
    """Register the function by packed and by nested tensors, of workloads of padded histories.

    `reference` takes packed tensors, the inputs called `names`.
    """
    to_packed, restore = partial(pack, names), partial(unpack, names[0])
    own_reference = packed_reference(reference, names)
    operator.implementation(
        PACKED, prepare=to_packed, restore=restore, reference=own_reference, applies=of_histories, ours=True
    )(function)
    add_nested(operator, function, names, to_packed, restore, own_reference)


def add_nested(
    operator: Operator,
    function: Callable,
    names: Sequence[str],
    to_packed: Callable[[Inputs], Inputs],
    restore: Callable[[Outputs, Inputs], Tensor] = lambda output, inputs: output,
    reference: Callable | None = None,
) -> None:
    """Register the function by nested tensors, and both layouts compiled: there the graph makes the nested tensors."""
    options = {"reference": reference, "applies": of_histories, "ours": True}
    operator.implementation(
        NESTED,
        prepare=lambda inputs: nest(names, _with_shared_offsets(to_packed(inputs))),
        restore=lambda output, inputs: restore(unnest(output), inputs),
        **options,
    )(function)

    def nested(**packed) -> Outputs:
        return unnest(function(**nest(names, packed)))

    for name, run in ((PACKED_COMPILED, function), (NESTED_COMPILED, nested)):
        operator.add_compiled(name, run, prepare=to_packed, restore=restore, devices=CPU, **options)


def of_histories(workload: Workload) -> bool:
    """One or two workloads of an operator: the layouts cost alike in the others."""
    return workload.histories and workload.tier == "default"


def goals(workloads: Sequence[Workload]) -> tuple[TimeGoal, ...]:
    """In compiled code nested tensors cost what cu_seqlens cost. Eager mode adds PyTorch's host time to make them."""
    return tuple(
        TimeGoal(
            workload=workload.name,
            direction=direction,
            implementation=NESTED_COMPILED,
            against=(PACKED_COMPILED,),
            time_ratio=1.1,
        )
        for workload in workloads
        if of_histories(workload) and "cpu" in workload.devices
        for direction in (FORWARD, TRAINING)
    )


def pack(names: Sequence[str], inputs: Inputs) -> Inputs:
    """Padded [B, H, N, D] and [B, N, d] to packed [T, H, D] and [T, d], with cu_seqlens and max_seqlen."""
    valid, lengths = _valid(inputs, names[0]), inputs["seq_lens"]
    others = {name: x for name, x in inputs.items() if name not in ("seq_lens", "padding_side")}
    packed = {name: _tokens_first(inputs[name])[valid] for name in names}
    return {**others, **packed, "cu_seqlens": offsets(lengths), "max_seqlen": int(lengths.max())}


def unpack(name: str, output: Outputs, inputs: Inputs) -> Tensor:
    """Packed [T, H, D] to [B, H, N, D], padded with zeros as the input called `name` is. Two outputs side by side."""
    packed = _as_one(output)
    if inputs[name].dim() == 3:  # a compressed history
        return packed
    valid = _valid(inputs, name)
    padded = packed.new_zeros(*valid.shape, *packed.shape[1:])
    return padded.index_put((valid,), packed).transpose(1, 2)


def packed_reference(reference: Callable, names: Sequence[str]) -> Callable:
    """The reference of padded inputs as if they were packed: positions count from a sequence's first token."""

    def of_packed(**inputs) -> Tensor:
        packed = pack(names, inputs)
        packed.pop("max_seqlen")
        return unpack(names[0], reference(**packed), inputs)

    return of_packed


def nest(names: Sequence[str], inputs: Inputs) -> Inputs:
    """Packed [T, H, D] and [T, d] to nested [B, H, j, D] and [B, j, d]."""
    others = {name: x for name, x in inputs.items() if name not in ("cu_seqlens", "max_seqlen")}
    cu_seqlens, longest = inputs["cu_seqlens"], inputs["max_seqlen"]

    def nested(x: Tensor) -> Tensor:
        tokens, axis = (x.transpose(0, 1), 2) if x.dim() == 3 else (x, 1)
        return torch.nested.nested_tensor_from_jagged(tokens, cu_seqlens, jagged_dim=axis, max_seqlen=longest)

    return {**others, **{name: nested(inputs[name]) for name in names}}


def _with_shared_offsets(inputs: Inputs) -> Inputs:
    """With one offsets tensor for all sets of inputs: nested tensors of different offsets have different shapes."""
    cu_seqlens = inputs["cu_seqlens"]
    return {**inputs, "cu_seqlens": _shared(tuple(cu_seqlens.tolist()), cu_seqlens.device)}


@functools.cache
def _shared(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def unnest(output: Outputs) -> Outputs:
    """Nested [B, H, j, D] to packed [T, H, D]; a dense tensor stays as it is."""
    if isinstance(output, tuple):
        return tuple(map(unnest, output))
    return output.values().transpose(0, 1) if output.is_nested else output


def _as_one(out: Outputs) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat(out, dim=-1)


def _valid(inputs: Inputs, name: str) -> Tensor:
    """[B, N], True at tokens."""
    lengths, n = inputs["seq_lens"], inputs[name].shape[-2]
    starts = window_starts(inputs.get("padding_side", "right"), n, lengths)
    return valid_tokens(len(lengths), n, lengths, starts, lengths.device)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2) if x.dim() == 4 else x

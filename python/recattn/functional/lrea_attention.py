"""Target attention over a long history compressed to rank r (LREA, arXiv 2503.02542)."""

import math

import torch
from torch import Tensor

from recattn import _check as check
from recattn import reference
from recattn._dispatch import select
from recattn._options import LreaAttentionOptions
from recattn._typing import LossReduction, LreaAbsorbedImpl, LreaImpl, Orientation
from recattn._warnings import warn_of_change
from recattn.functional._keywords import explain_keywords
from recattn.functional.lrea_compress import add_lack_of_gradient, path_of
from recattn.functional.validation import Indices, checked_indices, values_are_checked
from recattn.ops import lrea_attention as ops
from recattn.ops._library import apply, distinct

INT8_MAX = 127
# The tensors of a call; what does not fit is checked by `_validate_attention`, which says why.
_RESTORED = check.Layouts(
    targets=(check.FLOATING, "T H d"),
    keys=(check.SAME, "U H r d"),
    values=(check.SAME, "U H r dv"),
    w_decomp=(check.SAME, "r Lmax"),
    target_offsets=(check.INTEGER, "U+1"),
    seq_lens=(check.INTEGER, "U?"),
)


@explain_keywords
def lrea_attention(
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    w_decomp: Tensor,
    target_offsets: Tensor,
    *,
    seq_lens: Tensor | None = None,
    negative_slope: float = 0.01,
    scale: float | None = None,
    impl: LreaImpl | None = None,
) -> Tensor:
    """Attention of each target over its user's restored history, for training:

        K̂ = W_decompᵀ keys_u,  V̂ = W_decompᵀ values_u        over the first seq_lens[u] columns of W_decomp
        h = φ(scale · q K̂ᵀ) V̂                                φ leaky ReLU; no softmax

    The restored history is never in memory: h = φ(scale · q keysᵀ W_decomp) W_decompᵀ values, computed in tiles of the
    hidden layer, in time O(T·H·r·L).

    Source: LREA (arXiv 2503.02542). Its method section could not be recovered: compression, restoration and the leaky
    ReLU are the paper's, the rest is our reading. keys and values are the compressed history times W_K and W_V.

    Args:
        targets: q [T, H, d], float64, float32, bfloat16 or float16; user u owns rows target_offsets[u] up to
            target_offsets[u + 1].
        keys: [U, H, r, d], targets' dtype.
        values: [U, H, r, dv], targets' dtype.
        w_decomp: [r, Lmax], targets' dtype.
        target_offsets: [U + 1] integer, ascending from 0 to T.
        seq_lens: [U] integer, the length of each user's history, Lmax by default. A user of length 0 gets zeros and
            gives no gradient, whatever its keys and values are.
        negative_slope: of φ.
        scale: of the scores, 1/√d by default.
        impl: None chooses; "cpu", "triton" or "reference" selects.

    Returns:
        [T, H, dv] in targets' dtype, differentiable in targets, keys, values and w_decomp.

        Second derivatives (`create_graph=True`) and forward-mode ones (`torch.func.jvp`) run the reference, in its time
        and memory.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; on a CPU also offsets that do not ascend from 0 to T,
            or lengths out of range. On a GPU the kernels give zeros to targets outside the offsets and clamp lengths to
            0 .. Lmax; `recattn.validate`, or RECATTN_CHECK=1, reports them.
        NotImplementedError: the selected `impl` does not support the call.
    """
    if not _attention_fits(targets, keys, values, w_decomp, target_offsets, seq_lens):
        _validate_attention(targets, keys, values, w_decomp, target_offsets, seq_lens)
    check.expect_numbers(negative_slope=negative_slope, scale=scale)

    path = path_of(impl)
    reasons = ops.unsupported_reasons(targets.device.type, "lrea_attention", targets.dtype, w_decomp.shape[0])
    chosen = select("lrea_attention", impl, reasons)
    if chosen != "cpu":  # the C++ operator checks what it reads
        indices = checked_indices(
            targets.device,
            target_offsets=target_offsets,
            num_targets=targets.shape[0],
            seq_lens=seq_lens,
            seq_len=w_decomp.shape[1],
        )
        target_offsets, seq_lens = indices.target_offsets, indices.seq_lens
    if chosen == "reference":
        return reference.lrea_attention(
            targets,
            keys,
            values,
            w_decomp,
            target_offsets,
            seq_lens=seq_lens,
            negative_slope=negative_slope,
            scale=scale,
        )
    options = LreaAttentionOptions(float(negative_slope), None if scale is None else float(scale), path)
    if torch.compiler.is_compiling():
        keys, values = distinct(keys, values)
    return apply(ops.LreaAttentionFunction, targets, keys, values, w_decomp, target_offsets, seq_lens, options)


@explain_keywords
def lrea_absorb(
    keys: Tensor,
    values: Tensor,
    w_decomp: Tensor,
    *,
    seq_lens: Tensor | None = None,
    scale: float | None = None,
    orientation: Orientation = "scores",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Precompute each user's state for `lrea_absorbed_attention`, so that serving costs O(r), not O(L):

        state_keys = scale · keys        state_values = G_u values,   W the first seq_lens[u] columns of W_decomp
        orientation="scores"             G_u = W Wᵀ                   φ(z W) ≈ φ(z) W
        orientation="weights"            G_u = φ(W) Wᵀ                φ(z W) ≈ z φ(W)

    z are a target's scores against state_keys, α is φ's slope. Both orientations are exact for α = 1. With W ≥ 0:

    - "scores" is exact where the scores z of a target share a sign. Else a score is too large by
      (1 − α)·min(Σ w z⁺, Σ w z⁻).
    - "weights" has applied φ already, to W: **serve it with `lrea_absorbed_attention(..., negative_slope=1.0)`**. A
      score φ(y) is off by (1 − α)·|y| where y < 0.

    Source: LREA (arXiv 2503.02542). The paper's method section could not be recovered. The paper chooses φ so that
    φ(AB) ≈ A φ(B); which factor is A is not known, hence `orientation`.

    Args:
        keys: [U, H, r, d], float64, float32, bfloat16 or float16.
        values: [U, H, r, dv], keys' dtype.
        w_decomp: [r, Lmax], keys' dtype.
        seq_lens: [U] integer, the length of each user's history, Lmax by default.
        scale: of the scores, 1/√d by default.
        orientation: "scores" or "weights".
        negative_slope: α of φ; only "weights" applies φ here.

    Returns:
        state_keys [U, H, r, d], state_values [U, H, r, dv] in keys' dtype, differentiable. Memory is O(U·r²), not
        O(U·L).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; on a CPU also lengths out of range.
    """
    check.expect_choice("orientation", orientation, ("scores", "weights"))
    check.expect_tensors(keys=keys, values=values, w_decomp=w_decomp)
    sizes: dict[str, int] = {}
    check.expect_shape(sizes, "keys", keys, "U H r d")
    check.expect(sizes["d"] > 0, "d of keys", "at least 1", 0)
    check.expect_shape(sizes, "values", values, "U H r dv")
    check.expect_shape(sizes, "w_decomp", w_decomp, "r Lmax")
    check.expect_dtype("keys", keys, check.FLOATING)
    check.expect_same_dtype("keys", keys, values=values, w_decomp=w_decomp)
    if seq_lens is not None:
        check.expect_index(sizes, "seq_lens", seq_lens, "U")
    check.expect_same_device("keys", keys, values=values, w_decomp=w_decomp, seq_lens=seq_lens)
    check.expect_numbers(negative_slope=negative_slope, scale=scale)

    seq_lens = checked_indices(keys.device, seq_lens=seq_lens, seq_len=sizes["Lmax"]).seq_lens
    scale = 1 / math.sqrt(sizes["d"]) if scale is None else float(scale)
    state_values = ops.absorb_values(values, w_decomp, seq_lens, negative_slope if orientation == "weights" else 1.0)
    return scale * keys, state_values


def lrea_quantize(state: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize state rows to int8 with a scale each, for `lrea_absorbed_attention`:

        row ≈ scale · int8,    scale = max |row| / 127

    The error of an entry is at most scale / 2. A row of zeros has scale 0. A row with NaN or an infinity, or too large
    for a float32 scale, has scale NaN or inf, and attention to it gives NaN: raising here would synchronise the device.

    Source: our own.

    Args:
        state: [..., r, d] state_keys or state_values, float64, float32, bfloat16 or float16.

    Returns:
        int8 [..., r, d], and the scales, float32 [..., r].

    Raises:
        ValueError: state is not floating, has no axis, or has d = 0.
    """
    check.expect_tensors(state=state)
    has_rows = state.dim() > 0 and state.shape[-1] > 0
    check.expect(has_rows, "state", "[..., r, d] with d of at least 1", list(state.shape))
    check.expect_dtype("state", state, check.FLOATING)
    rows = state.detach().to(torch.promote_types(state.dtype, torch.float32))
    scales = (rows.abs().amax(-1) / INT8_MAX).float()
    steps = scales.where(scales > 0, 1.0)[..., None]
    return (rows / steps).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


@explain_keywords
def lrea_absorbed_attention(
    targets: Tensor,
    state_keys: Tensor,
    state_values: Tensor,
    slots: Tensor,
    target_offsets: Tensor,
    *,
    item_ids: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    negative_slope: float = 0.01,
    invalid: Tensor | None = None,
    impl: LreaAbsorbedImpl | None = None,
) -> Tensor:
    """Attention of each target over its user's absorbed state, for serving:

        h = φ(q state_keys[s]ᵀ) state_values[s]        s = slots[u] for user u, φ leaky ReLU

    The states (from `lrea_absorb`, or any of their shape) are read in place in the tables, without a gathered copy.
    With `item_ids` so are the targets: q = targets[item_ids[t]]. Row k of an int8 state is scales[s, h, k] · row.

    Pass `invalid` in a service, where one bad index must not fail a batch, or on CUDA the process. The number of
    indices out of range is then added to it, and only their own targets are zeros: those of a user whose slot is not a
    row of the tables, those whose item id is not a row, and those before the first offset or behind the last. Where
    offsets descend, two users own the same targets, and one of the two is served; on CUDA each number of such an output
    is of one of the two. The call does not wait for the count: read it now and then, and let `recattn.validate` name
    the index.

    Source: LREA (arXiv 2503.02542), which stores two tensors a user; what they hold is our reading, see `lrea_absorb`.

    Args:
        targets: q [T, H, d], float64, float32, bfloat16 or float16; user u owns rows target_offsets[u] up to
            target_offsets[u + 1]. With `item_ids` a table [I, H, d]. The head axis may be expanded.
        state_keys: table [S, H, r, d], targets' dtype or int8, beside float32 targets also bfloat16 or float16; the
            scale of the scores is folded in.
        state_values: table [S, H, r, dv], state_keys' dtype.
        slots: [U] integer, the row of each user in the tables; users may share a row.
        target_offsets: [U + 1] integer, ascending from 0 to T.
        item_ids: [T] integer, the row of each target in the table.
        key_scales, value_scales: [S, H, r] float32, of int8 states (`lrea_quantize`).
        negative_slope: of φ; 1.0 for states of orientation="weights".
        invalid: [1] int64 on targets' device. Indices out of range are counted there instead of raised.
        impl: None chooses; "cpu" (compiled), "cuda" (compiled) or "reference" selects. "cpu" and "cuda" have no
            gradient, so None takes the reference where a gradient is needed.

    Returns:
        [T, H, dv] in targets' dtype. Sums are float32 inside (float64 for float64). On tensor cores only where targets
        are in half precision: cast a table of float32 items once, not at each call. Int8 rows are exact, but a CPU with
        VNNI rounds float32 and float16 targets, and their scores, to 16 bits: 1/258 of an int8 row's step.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on a CPU also slots or item ids out of range, or offsets that
            do not ascend from 0 to T, unless `invalid` counts them. On CUDA these stop the kernel, and the process must
            be restarted, as after any index out of range in PyTorch; `recattn.validate`, or RECATTN_CHECK=1, reports
            them before.
        NotImplementedError: the selected `impl` does not support the call.
    """
    check.expect_tensors(targets=targets)
    check.expect_numbers(negative_slope=negative_slope)
    reasons = ops.unsupported_reasons(targets.device.type, "lrea_absorbed_attention")
    reasons = add_lack_of_gradient(reasons, targets, state_keys, state_values, key_scales, value_scales)
    chosen = select("lrea_absorbed_attention", impl, reasons)
    # The C++ operators check their arguments, with the same words: checks here would take longer than the call.
    if chosen == "reference" or (targets.is_cuda and values_are_checked(targets.device)):
        tensors = (targets, state_keys, state_values, slots, target_offsets)
        indices = _checked_absorbed(*tensors, item_ids, key_scales, value_scales, invalid)
        slots, target_offsets, item_ids = indices.slots, indices.target_offsets, indices.item_ids
    tensors = (targets, state_keys, state_values, slots, target_offsets)
    if chosen != "reference":
        arguments = (*tensors, negative_slope, item_ids, key_scales, value_scales)
        # What torch.compile records is the operator itself: that raises where it fails.
        falls_back = chosen == "cuda" and not torch.compiler.is_compiling()
        attend = ops.absorbed_attention_or_reference if falls_back else ops.absorbed_attention
        try:
            return attend(*arguments) if invalid is None else attend(*arguments, invalid)
        except NotImplementedError:  # PyTorch's error for a tensor that is not dense does not name the argument
            names = {"state_keys": state_keys, "state_values": state_values, "slots": slots}
            names |= {"target_offsets": target_offsets, "item_ids": item_ids, "key_scales": key_scales}
            names |= {"value_scales": value_scales, "invalid": invalid}
            check.expect_tensors(**{name: x for name, x in names.items() if x is not None})
            raise
    return reference.lrea_absorbed_attention(
        *tensors,
        item_ids=item_ids,
        key_scales=key_scales,
        value_scales=value_scales,
        negative_slope=float(negative_slope),
        invalid=invalid,
    )


def _checked_absorbed(
    targets: Tensor,
    state_keys: Tensor,
    state_values: Tensor,
    slots: Tensor,
    target_offsets: Tensor,
    item_ids: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    invalid: Tensor | None,
) -> Indices:
    check.expect_tensors(state_keys=state_keys, state_values=state_values, slots=slots)
    sizes: dict[str, int] = {}
    if invalid is not None:
        check.expect_tensors(invalid=invalid)
        check.expect_shape(sizes, "invalid", invalid, "1")
        check.expect_dtype("invalid", invalid, (torch.int64,))
    check.expect_shape(sizes, "targets", targets, "T H d" if item_ids is None else "I H d")
    if item_ids is not None:
        check.expect_index(sizes, "item_ids", item_ids, "T")
    check.expect_shape(sizes, "state_keys", state_keys, "S H r d")
    check.expect_shape(sizes, "state_values", state_values, "S H r dv")
    check.expect_dtype("targets", targets, check.FLOATING)
    quantized = state_keys.dtype == torch.int8
    if not (quantized or (targets.dtype == torch.float32 and state_keys.dtype in (torch.bfloat16, torch.float16))):
        check.expect_same_dtype("targets", targets, state_keys=state_keys)
    check.expect_same_dtype("state_keys", state_keys, state_values=state_values)
    scales = {name: x for name, x in (("key_scales", key_scales), ("value_scales", value_scales)) if x is not None}
    check.expect(
        len(scales) == (2 if quantized else 0),
        "key_scales and value_scales",
        "both given with int8 states, neither with others",
        f"{str(state_keys.dtype).removeprefix('torch.')} states and {len(scales)} of them",
    )
    for name, given in scales.items():
        check.expect_shape(sizes, name, given, "S H r")
        check.expect_dtype(name, given, (torch.float32,))
    check.expect_index(sizes, "slots", slots, "U")
    _expect_offsets(sizes, target_offsets)
    check.expect_same_device(
        "targets",
        targets,
        state_keys=state_keys,
        state_values=state_values,
        slots=slots,
        target_offsets=target_offsets,
        item_ids=item_ids,
        invalid=invalid,
        **scales,
    )
    if sizes["U"] == 0 and sizes["T"] > 0:
        raise ValueError(f"target_offsets must be offsets from 0 to {sizes['T']}, got offsets of no user")
    if invalid is not None:
        return Indices(slots=slots, target_offsets=target_offsets, item_ids=item_ids)
    return checked_indices(
        targets.device,
        target_offsets=target_offsets,
        num_targets=sizes["T"],
        slots=slots,
        num_slots=sizes["S"],
        item_ids=item_ids,
        num_items=None if item_ids is None else sizes["I"],
    )


@explain_keywords
def lrea_nonnegativity_loss(w_decomp: Tensor, compressed: Tensor, *, reduction: LossReduction | None = None) -> Tensor:
    """A regularizer: where it is zero, W_decomp and C are nonnegative, and absorption is exact.

        reduction="mean"    ‖max(0, −W_decomp)‖² + mean over users u of ‖max(0, −C_u)‖²        C_u = W_compᵀ E_u
        reduction="sum"     ‖max(0, −W_decomp)‖² + sum over users u of ‖max(0, −C_u)‖²

    Start with a weight of 0.01 beside a binary cross-entropy. On MovieLens-100k that took the relative error of
    absorption from 0.05–0.56 to at most 0.003 at the same AUC; a weight of 10 cost AUC (docs/lrea_attention.md).

    Source: LREA (arXiv 2503.02542), whose reviews confirm both terms.

    Args:
        w_decomp: [r, Lmax], float64, float32, bfloat16 or float16.
        compressed: C [U, r, d] of `lrea_compress`, w_decomp's dtype.
        reduction: "mean" or "sum" over the users. None is "mean" and warns, in this release, that it was "sum".

    Returns:
        A scalar, differentiable. With "mean" it does not grow with the batch.

    Raises:
        ValueError: shapes, dtypes, devices or the reduction do not fit.
    """
    if reduction is None:
        warn_of_change(
            "the nonnegativity loss of LREA is now the mean over users; it was their sum. Pass reduction='mean' or "
            "reduction='sum' to silence this warning"
        )
        reduction = "mean"
    check.expect_choice("reduction", reduction, ("mean", "sum"))
    check.expect_tensors(w_decomp=w_decomp, compressed=compressed)
    sizes: dict[str, int] = {}
    check.expect_shape(sizes, "w_decomp", w_decomp, "r Lmax")
    check.expect_shape(sizes, "compressed", compressed, "U r d")
    check.expect_dtype("w_decomp", w_decomp, check.FLOATING)
    check.expect_same_dtype("w_decomp", w_decomp, compressed=compressed)
    check.expect_same_device("w_decomp", w_decomp, compressed=compressed)
    return reference.lrea_nonnegativity_loss(w_decomp, compressed, reduction=reduction)


def _attention_fits(targets, keys, values, w_decomp, target_offsets, seq_lens) -> bool:
    """Whether the tensors are right. False: ask `_validate_attention` what is wrong."""
    sizes = _RESTORED.sizes(targets, keys, values, w_decomp, target_offsets, seq_lens)
    return sizes is not None and sizes[2] > 0  # d


def _validate_attention(targets, keys, values, w_decomp, target_offsets, seq_lens) -> None:
    check.expect_tensors(targets=targets, keys=keys, values=values, w_decomp=w_decomp)
    sizes: dict[str, int] = {}
    check.expect_shape(sizes, "targets", targets, "T H d")
    check.expect(sizes["d"] > 0, "d of targets and keys", "at least 1", 0)
    check.expect_shape(sizes, "keys", keys, "U H r d")
    check.expect_shape(sizes, "values", values, "U H r dv")
    check.expect_shape(sizes, "w_decomp", w_decomp, "r Lmax")
    check.expect_dtype("targets", targets, check.FLOATING)
    check.expect_same_dtype("targets", targets, keys=keys, values=values, w_decomp=w_decomp)
    _expect_offsets(sizes, target_offsets)
    if seq_lens is not None:
        check.expect_index(sizes, "seq_lens", seq_lens, "U")
    check.expect_same_device(
        "targets",
        targets,
        keys=keys,
        values=values,
        w_decomp=w_decomp,
        target_offsets=target_offsets,
        seq_lens=seq_lens,
    )


def _expect_offsets(sizes: dict[str, int], target_offsets: Tensor) -> None:
    sizes["U+1"] = sizes["U"] + 1
    check.expect_index(sizes, "target_offsets", target_offsets, "U+1")

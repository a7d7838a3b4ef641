"""Target attention over a long history compressed to rank r (LREA, arXiv 2503.02542)."""

import math

import torch
from torch import Tensor

from recattn import reference
from recattn._check import (
    FLOATING,
    expect,
    expect_choice,
    expect_dtype,
    expect_finite,
    expect_index,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    expect_tensors,
)
from recattn._dispatch import select
from recattn.functional.validation import validate_values
from recattn.ops import lrea_attention as ops
from recattn.ops._library import distinct


def lrea_compress(
    behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """A history of L behaviours compressed to r rows:

        C_u = W_compᵀ E_u        over the first seq_lens[u] behaviours of user u

    Source: LREA (arXiv 2503.02542), whose reviews confirm this step; what it does to padding is our reading: nothing
    of it is read.

    Args:
        behaviors: E [U, L, d], float64, float32, bfloat16 or float16.
        w_comp: [Lmax, r], Lmax ≥ L, behaviors' dtype; its first L rows are used.
        seq_lens: [U] integer, how many behaviours of each user count; the rest is padding.
        impl: None chooses; "cpu" (compiled) or "reference" insists.

    Returns:
        [U, r, d] in behaviors' dtype, differentiable; sums are float32 inside (float64 for float64). impl="cpu" reads
        each behaviour once; its backward allocates dE and, for dW_comp, a few MB of products at a time.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU also lengths out of range.
        NotImplementedError: an explicit `impl` that cannot serve the call.
    """
    expect_tensors(behaviors=behaviors, w_comp=w_comp)
    sizes: dict[str, int] = {}
    expect_shape(sizes, "behaviors", behaviors, "U L d")
    expect_shape(sizes, "w_comp", w_comp, "Lmax r")
    if sizes["Lmax"] < sizes["L"]:  # a message made beforehand would fix the sizes in a compiled graph
        raise ValueError(f"Lmax of w_comp must be at least L = {sizes['L']}, got {sizes['Lmax']}")
    expect_dtype("behaviors", behaviors, FLOATING)
    expect_same_dtype("behaviors", behaviors, w_comp=w_comp)
    if seq_lens is not None:
        expect_index(sizes, "seq_lens", seq_lens, "U")
    expect_same_device("behaviors", behaviors, w_comp=w_comp, seq_lens=seq_lens)

    impl = select("lrea_compress", impl, ops.availability(behaviors.device.type, "lrea_compress"))
    if impl == "reference":
        validate_values(behaviors.device, seq_lens=seq_lens, seq_len=sizes["L"])
        return reference.lrea_compress(behaviors, w_comp, seq_lens)
    return ops.LreaCompress.apply(behaviors, w_comp, seq_lens)


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
    impl: str | None = None,
) -> Tensor:
    """Attention of each target over its user's restored history, the form to train:

        K̂ = W_decompᵀ keys_u,  V̂ = W_decompᵀ values_u        over the first seq_lens[u] columns of W_decomp
        h = φ(scale · q K̂ᵀ) V̂                                φ leaky ReLU; no softmax

    The restored history is never in memory: with z = scale · q keysᵀ, h = φ(z W_decomp) W_decompᵀ values, and the
    middle factor is computed in tiles, in time O(T·H·r·L).

    Source: LREA (arXiv 2503.02542). Its method section could not be recovered: compression, restoration and the leaky
    ReLU are the paper's, the rest is our reading. keys and values are the compressed history times W_K and W_V.

    Args:
        targets: q [T, H, d], float64, float32, bfloat16 or float16; user u owns rows target_offsets[u] up to
            target_offsets[u + 1].
        keys: [U, H, r, d], targets' dtype.
        values: [U, H, r, dv], targets' dtype.
        w_decomp: [r, Lmax], targets' dtype.
        target_offsets: [U + 1] integer, from 0 to T, never descending.
        seq_lens: [U] integer, the length of each user's history, Lmax by default. A user of length 0 gets zeros.
        negative_slope: of φ.
        scale: of the scores, 1/√d by default.
        impl: None chooses; "cpu" or "reference" insists.

    Returns:
        [T, H, dv] in targets' dtype, differentiable in targets, keys, values and w_decomp.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; on a CPU also offsets that do not ascend from 0
            to T and lengths out of range (elsewhere `recattn.validate` checks them, or RECATTN_CHECK=1).
        NotImplementedError: an explicit `impl` that cannot serve the call.
    """
    expect_tensors(targets=targets, keys=keys, values=values, w_decomp=w_decomp)
    sizes: dict[str, int] = {}
    expect_shape(sizes, "targets", targets, "T H d")
    expect(sizes["d"] > 0, "d of targets and keys", "at least 1", 0)
    expect_shape(sizes, "keys", keys, "U H r d")
    expect_shape(sizes, "values", values, "U H r dv")
    expect_shape(sizes, "w_decomp", w_decomp, "r Lmax")
    expect_dtype("targets", targets, FLOATING)
    expect_same_dtype("targets", targets, keys=keys, values=values, w_decomp=w_decomp)
    _expect_offsets(sizes, target_offsets)
    if seq_lens is not None:
        expect_index(sizes, "seq_lens", seq_lens, "U")
    expect_same_device(
        "targets",
        targets,
        keys=keys,
        values=values,
        w_decomp=w_decomp,
        target_offsets=target_offsets,
        seq_lens=seq_lens,
    )
    expect_finite(negative_slope=negative_slope, scale=scale)

    impl = select("lrea_attention", impl, ops.availability(targets.device.type, "lrea_attention"))
    scale = 1 / math.sqrt(sizes["d"]) if scale is None else scale
    if impl == "reference":
        validate_values(
            targets.device,
            target_offsets=target_offsets,
            num_targets=sizes["T"],
            seq_lens=seq_lens,
            seq_len=sizes["Lmax"],
        )
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
    return ops.LreaAttention.apply(
        targets, *distinct(keys, values), w_decomp, target_offsets, seq_lens, float(negative_slope), float(scale)
    )


def lrea_absorb(
    keys: Tensor,
    values: Tensor,
    w_decomp: Tensor,
    *,
    seq_lens: Tensor | None = None,
    scale: float | None = None,
    orientation: str = "scores",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The state of each user that `lrea_absorbed_attention` reads, so that serving costs O(r), not O(L):

        state_keys = scale · keys        state_values = G_u values,   W the first seq_lens[u] columns of W_decomp
        orientation="scores"             G_u = W Wᵀ                   φ(z W) ≈ φ(z) W
        orientation="weights"            G_u = φ(W) Wᵀ                φ(z W) ≈ z φ(W)

    "scores" is exact where W ≥ 0 and the scores z of a target share a sign; with W ≥ 0 the approximation of a score
    exceeds it by (1 − α)·min(Σ w z⁺, Σ w z⁻), α the slope. "weights" puts φ on W, so that nothing is left for z:
    **serve it with `lrea_absorbed_attention(..., negative_slope=1.0)`**; with W ≥ 0 a score φ(y) is off by (1 − α)·|y|
    where y < 0. Both are exact for α = 1.

    Source: LREA (arXiv 2503.02542). The paper's method section could not be recovered: that φ is chosen so that
    φ(AB) ≈ A φ(B) is the paper's, which factor is A is not known, so it is a switch.

    Args:
        keys: [U, H, r, d], float64, float32, bfloat16 or float16.
        values: [U, H, r, dv], keys' dtype.
        w_decomp: [r, Lmax], keys' dtype.
        seq_lens: [U] integer, the length of each user's history, Lmax by default.
        scale: of the scores, 1/√d by default.
        orientation: "scores" or "weights".
        negative_slope: α of φ; only "weights" applies φ here.

    Returns:
        state_keys [U, H, r, d], state_values [U, H, r, dv] in keys' dtype, differentiable. Takes memory O(U·r²), not
        O(U·L).

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; on a CPU also lengths out of range.
    """
    expect_choice("orientation", orientation, ("scores", "weights"))
    expect_tensors(keys=keys, values=values, w_decomp=w_decomp)
    sizes: dict[str, int] = {}
    expect_shape(sizes, "keys", keys, "U H r d")
    expect(sizes["d"] > 0, "d of keys", "at least 1", 0)
    expect_shape(sizes, "values", values, "U H r dv")
    expect_shape(sizes, "w_decomp", w_decomp, "r Lmax")
    expect_dtype("keys", keys, FLOATING)
    expect_same_dtype("keys", keys, values=values, w_decomp=w_decomp)
    if seq_lens is not None:
        expect_index(sizes, "seq_lens", seq_lens, "U")
    expect_same_device("keys", keys, values=values, w_decomp=w_decomp, seq_lens=seq_lens)
    expect_finite(negative_slope=negative_slope, scale=scale)

    validate_values(keys.device, seq_lens=seq_lens, seq_len=sizes["Lmax"])
    scale = 1 / math.sqrt(sizes["d"]) if scale is None else scale
    state_values = ops.absorb_values(values, w_decomp, seq_lens, negative_slope if orientation == "weights" else 1.0)
    return scale * keys, state_values


def lrea_absorbed_attention(
    targets: Tensor,
    state_keys: Tensor,
    state_values: Tensor,
    slots: Tensor,
    target_offsets: Tensor,
    *,
    negative_slope: float = 0.01,
    impl: str | None = None,
) -> Tensor:
    """Attention of each target over its user's absorbed state, the form to serve:

        h = φ(q state_keys[s]ᵀ) state_values[s]        s = slots[u] for user u, φ leaky ReLU

    The states (from `lrea_absorb`, or any of their shape) are read where they lie in the tables: no gathered copy.

    Source: LREA (arXiv 2503.02542), which stores two tensors a user; what they hold is our reading, see `lrea_absorb`.

    Args:
        targets: q [T, H, d], float64, float32, bfloat16 or float16; user u owns rows target_offsets[u] up to
            target_offsets[u + 1].
        state_keys: table [S, H, r, d], targets' dtype; the scale is folded in.
        state_values: table [S, H, r, dv], targets' dtype.
        slots: [U] integer, the row of each user in the tables; users may share one.
        target_offsets: [U + 1] integer, from 0 to T, never descending.
        negative_slope: of φ; 1.0 for states of orientation="weights".
        impl: None chooses; "cpu" (compiled), "cuda" (compiled) or "reference" insists. "cpu" and "cuda" have no
            gradient, so None takes the reference where one is needed.

    Returns:
        [T, H, dv] in targets' dtype; sums are float32 inside (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU also slots out of range and offsets that do not
            ascend from 0 to T (elsewhere `recattn.validate` checks them, or RECATTN_CHECK=1).
        NotImplementedError: an explicit `impl` that cannot serve the call.
    """
    expect_tensors(targets=targets, state_keys=state_keys, state_values=state_values, slots=slots)
    sizes: dict[str, int] = {}
    expect_shape(sizes, "targets", targets, "T H d")
    expect_shape(sizes, "state_keys", state_keys, "S H r d")
    expect_shape(sizes, "state_values", state_values, "S H r dv")
    expect_dtype("targets", targets, FLOATING)
    expect_same_dtype("targets", targets, state_keys=state_keys, state_values=state_values)
    expect_index(sizes, "slots", slots, "U")
    _expect_offsets(sizes, target_offsets)
    expect_same_device(
        "targets",
        targets,
        state_keys=state_keys,
        state_values=state_values,
        slots=slots,
        target_offsets=target_offsets,
    )
    expect_finite(negative_slope=negative_slope)

    refusals = ops.availability(targets.device.type, "lrea_absorbed_attention")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (targets, state_keys, state_values)):
        no_gradient = 'it has no gradient; call it under torch.no_grad(), or take impl="reference"'
        refusals |= {compiled: refusals[compiled] or no_gradient for compiled in ("cpu", "cuda")}
    impl = select("lrea_absorbed_attention", impl, refusals)
    if impl == "reference":
        validate_values(
            targets.device,
            target_offsets=target_offsets,
            num_targets=sizes["T"],
            slots=slots,
            num_slots=sizes["S"],
        )
        return reference.lrea_absorbed_attention(
            targets, state_keys, state_values, slots, target_offsets, negative_slope=negative_slope
        )
    return torch.ops.recattn.lrea_absorbed_attention(
        targets, state_keys, state_values, slots, target_offsets, float(negative_slope)
    )


def lrea_nonnegativity_loss(w_decomp: Tensor, compressed: Tensor) -> Tensor:
    """The loss that makes absorption exact where it reaches zero:

        ‖max(0, −W_decomp)‖² + ‖max(0, −C)‖²        C = W_compᵀ E

    Source: LREA (arXiv 2503.02542), whose reviews confirm both terms.

    Args:
        w_decomp: [r, Lmax], float64, float32, bfloat16 or float16.
        compressed: C [U, r, d] of `lrea_compress`, w_decomp's dtype.

    Returns:
        A scalar, summed over all entries, differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    expect_tensors(w_decomp=w_decomp, compressed=compressed)
    sizes: dict[str, int] = {}
    expect_shape(sizes, "w_decomp", w_decomp, "r Lmax")
    expect_shape(sizes, "compressed", compressed, "U r d")
    expect_dtype("w_decomp", w_decomp, FLOATING)
    expect_same_dtype("w_decomp", w_decomp, compressed=compressed)
    expect_same_device("w_decomp", w_decomp, compressed=compressed)
    return reference.lrea_nonnegativity_loss(w_decomp, compressed)


def _expect_offsets(sizes: dict[str, int], target_offsets: Tensor) -> None:
    sizes["U+1"] = sizes["U"] + 1
    expect_index(sizes, "target_offsets", target_offsets, "U+1")

"""Attention between Gaussians (STOSA, WWW 2022), and its refinement (AWRSR, arXiv 2410.21048)."""

from typing import cast

import torch
from torch import Tensor

from recattn import _check as check
from recattn import reference
from recattn._dispatch import select
from recattn._options import WassersteinAttentionOptions
from recattn._typing import PaddingSide, Source, WassersteinAttentionImpl
from recattn._warnings import causal_or_old_default
from recattn.functional._autocast import autocast_inputs, autocast_may_be_on
from recattn.functional._nested import Packed, accepts_nested, nest_heads
from recattn.functional._sequences import (
    checked_sequences,
    expect_cu_seqlens,
    expect_windows,
    validate_layout,
    window_starts,
)
from recattn.ops import wasserstein_attention as ops
from recattn.ops._library import distinct
from recattn.ops._support import draw_dropout_seed

_GAUSSIANS = ("mean_q", "cov_q", "mean_k", "cov_k", "mean_v", "cov_v")
_LENGTHS = ("seq_lens", "seq_starts", "cu_seqlens")


def _layouts(tokens: str, lengths: dict[str, tuple[object, str]]) -> check.Layouts:
    return check.Layouts(
        mean_q=(check.FLOATING, f"{tokens} D"),
        **{name: (check.SAME, f"{tokens} D") for name in _GAUSSIANS[1:4]},
        **{name: (check.SAME, f"{tokens} Dv") for name in _GAUSSIANS[4:]},
        **{name: (check.SAME, "[H] Nmax 2R?") for name in ("w_q", "w_k")},
        **lengths,
    )


# The tensors of a padded and of a packed call. What does not fit is checked by `_validated`, which says why.
_PADDED = _layouts("B H N", {name: (check.INTEGER, "B?") for name in _LENGTHS[:2]})
_PACKED = _layouts("T H", {"cu_seqlens": (check.INTEGER, "B+1")})


def _nest_both(packed: Packed, outs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return nest_heads(packed, outs[0]), nest_heads(packed, outs[1])


@accepts_nested(*_GAUSSIANS, ragged_axis=2, nest=_nest_both)
def wasserstein_attention(
    mean_q: Tensor,
    cov_q: Tensor,
    mean_k: Tensor,
    cov_k: Tensor,
    mean_v: Tensor,
    cov_v: Tensor,
    *,
    w_q: Tensor | None = None,
    w_k: Tensor | None = None,
    source: Source = "logits",
    causal: bool | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    padding_side: PaddingSide = "right",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    impl: WassersteinAttentionImpl | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention between Gaussians with diagonal covariances:

        W²(i, j) = ‖μ_i − μ_j‖² + ‖√Σ_i − √Σ_j‖²
        P = softmax(mask(−scale · W²))        mean = P μ_v        covariance = (P∘P) Σ_v

    where mask hides the future (`causal`) and padding. With w_q and w_k, each [W^μ | W^Σ], P is refined:

        A = −scale · W², or softmax(mask(−scale · W²)) with source="weights"; 0 at future and padded entries
        query i: μ = A_i W_q^μ, Σ = elu(A_i W_q^Σ) + 1        key j: μ = A_j W_k^μ, Σ = elu(A_j W_k^Σ) + 1
        M = −W² of these / √R        P = softmax(mask(M))

    Source: STOSA (Fan et al., Sequential Recommendation via Stochastic Self-Attention, WWW 2022), whose code has these
    formulas: it calls the squared distance the 2-Wasserstein distance and uses it without the root, and drops weights
    of P before both products. The refinement is our reading of AWRSR (arXiv 2410.21048), whose method section could
    not be recovered; it is that of `recattn.refined_attention` with mechanism="stochastic".

    Args:
        mean_q, cov_q, mean_k, cov_k: [B, H, N, D], float64, float32, bfloat16 or float16, the same for all; autocast
            casts them. A covariance is given by its diagonal, which is not negative. Entries below the smallest normal
            number (of float32 for half precision) count as that number and get no gradient. Packed: [T, H, D].
        mean_v, cov_v: [B, H, N, Dv], packed [T, H, Dv], the same dtype.
        w_q, w_k: [Nmax, 2R], or [H, Nmax, 2R] for matrices per head, the same dtype. A row is a position: on the N
            axis, wherever the padding is, so that Nmax ≥ N; packed, from the sequence's own start, so that Nmax ≥ every
            length.
        source: "logits" or "weights".
        causal: query i sees the keys j ≤ i. The default is True in this release, with a warning, and False from the
            next on, as everywhere else.
        seq_lens: [B] integer, the number of valid tokens per sequence; the padding is on `padding_side`.
        seq_starts: [B] integer, where the valid tokens of each sequence begin on the N axis, instead of `padding_side`.
        padding_side: "right" or "left".
        cu_seqlens: [B + 1] integer, offsets of packed sequences; excludes `seq_lens`.
        max_seqlen: upper bound on the lengths of packed sequences, known on the host. Half precision on a GPU is faster
            with it where it is at most 128; without it the bound is T, with w_q at most Nmax.
        dropout_p: probability of dropping each of the weights P, in steps of 1/65536.
        scale: of the distances, 1/√D by default.
        impl: None chooses; or "cpu" (C++; no float64), "triton" (on CUDA devices; no float64; 2D, 2Dv and 2R up to 256,
            with w_q 2D up to 252) or "reference". If it does not support the call, you get an error.

    The six Gaussians may also be nested tensors (layout=torch.jagged) [B, H, j, D] instead of `cu_seqlens`.

    Returns:
        Mean and covariance, [B, H, N, Dv], packed [T, H, Dv], nested as the Gaussians are; zero at padding. No N × N
        tensor is held in memory, but by the reference, which computes float64 on a CPU. Arithmetic is float32; a CPU
        saves only the inputs for the backward.

        Second derivatives (`create_graph=True`) and forward-mode ones (`torch.func.jvp`) run the reference, in its time
        and memory.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; on a CPU also lengths or offsets out of range
            (on a GPU `recattn.validate` checks them, or RECATTN_CHECK=1 at every call).
        NotImplementedError: an explicit `impl` that does not support the call; `create_graph=True` after dropout in a
            kernel.
    """
    causal = causal_or_old_default("wasserstein_attention", causal)
    check.expect_choice("source", source, ("logits", "weights"))
    check.expect_numbers(scale=scale)
    check.expect_probability("dropout_p", dropout_p)
    if padding_side != "right" or seq_starts is not None or cu_seqlens is not None or max_seqlen is not None:
        validate_layout(padding_side, seq_lens, seq_starts, cu_seqlens, max_seqlen)
    gaussians = (mean_q, cov_q, mean_k, cov_k, mean_v, cov_v)
    lengths = (seq_lens, seq_starts, cu_seqlens)
    if autocast_may_be_on() or not _fits(gaussians, w_q, w_k, lengths):
        tensors = _validated(gaussians, w_q, w_k, lengths)
        gaussians = tensors[:6]
        w_q, w_k = tensors[6:] or (None, None)
    mean_q = gaussians[0]
    if padding_side == "left":
        lengths = (seq_lens, window_starts(padding_side, mean_q.shape[2], seq_lens), None)
    reasons = ops.unsupported_reasons(mean_q.device.type, mean_q, gaussians[4], w_q)
    chosen = select("wasserstein_attention", impl, reasons)
    if chosen != "cpu" and (seq_lens is not None or cu_seqlens is not None):  # C++ checks them itself
        lengths = checked_sequences(mean_q, lengths, w_q, max_seqlen)
    if chosen == "reference":
        return reference.wasserstein_attention(
            *gaussians,
            w_q=w_q,
            w_k=w_k,
            source=source,
            causal=causal,
            seq_lens=lengths[0],
            seq_starts=lengths[1],
            cu_seqlens=lengths[2],
            dropout_p=dropout_p,
            scale=scale,
        )
    scale = None if scale is None else float(scale)
    options = WassersteinAttentionOptions(source, causal, scale, dropout_p, max_seqlen, chosen)
    seed = draw_dropout_seed(dropout_p, mean_q.device)
    if torch.compiler.is_compiling():
        gaussians = distinct(*gaussians)
    return ops.wasserstein_attention(gaussians, w_q, w_k, lengths, seed, options)


def _fits(gaussians: tuple[Tensor, ...], w_q, w_k, lengths: tuple[Tensor | None, ...]) -> bool:
    """Whether the tensors are right. False: ask `_validated` what is wrong."""
    seq_lens, seq_starts, cu_seqlens = lengths
    if (w_q is None) != (w_k is None):
        return False
    if cu_seqlens is None:
        sizes = _PADDED.sizes(*gaussians, w_q, w_k, seq_lens, seq_starts)
        if sizes is None:
            return False
        _, _, N, D, _, n_max, columns = sizes
    else:
        sizes = _PACKED.sizes(*gaussians, w_q, w_k, cu_seqlens)
        if sizes is None:
            return False
        _, _, D, _, n_max, columns, _ = sizes
        N = 0
    return D > 0 and (w_q is None or (n_max >= N and columns > 0 and columns % 2 == 0))


def _validated(gaussians: tuple[Tensor, ...], w_q, w_k, lengths: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The tensors, cast by autocast; w_q and w_k if there are any."""
    tensors = dict(zip(_GAUSSIANS, gaussians, strict=True))
    if w_q is not None or w_k is not None:
        tensors |= cast("dict[str, Tensor]", {"w_q": w_q, "w_k": w_k})
    check.expect_tensors(**tensors)
    sizes: dict[str, int] = {}
    seq_lens, seq_starts, cu_seqlens = lengths
    if cu_seqlens is not None:
        expect_cu_seqlens(sizes, cu_seqlens)
    for name, x in tensors.items():
        check.expect_shape(sizes, name, x, _layout(name, x, "B H N" if cu_seqlens is None else "T H"))
        check.expect_dtype(name, x, check.FLOATING)
    check.expect(sizes["D"] > 0, "D of mean_q and mean_k", "at least 1", 0)
    if "w_q" in tensors:
        if cu_seqlens is None and sizes["Nmax"] < sizes["N"]:  # torch.compile specializes on a size that is formatted
            check.expect(False, "Nmax of w_q and w_k", f"at least N = {sizes['N']}", sizes["Nmax"])
        check.expect(sizes["2R"] > 0 and sizes["2R"] % 2 == 0, "2R of w_q and w_k", "even and at least 2", sizes["2R"])
    expect_windows(sizes, seq_lens, seq_starts)
    check.expect_same_device("mean_q", tensors["mean_q"], **tensors, **dict(zip(_LENGTHS, lengths, strict=True)))
    autocast = autocast_inputs(*tensors.values())
    check.expect_same_dtype("mean_q", autocast[0], **dict(zip(tensors, autocast, strict=True)))
    return autocast


def _layout(name: str, x: Tensor, tokens: str) -> str:
    if name in ("w_q", "w_k"):
        return "H Nmax 2R" if x.dim() == 3 else "Nmax 2R"
    return f"{tokens} Dv" if name.endswith("v") else f"{tokens} D"

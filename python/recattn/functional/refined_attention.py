"""Attention whose weight matrix is refined by a second attention over it (AWRSR, arXiv 2410.21048)."""

from torch import Tensor

from recattn import _check as check
from recattn import reference
from recattn._dispatch import select
from recattn._options import RefinedAttentionOptions
from recattn._typing import Mechanism, PaddingSide, RefinedAttentionImpl, Source
from recattn._warnings import causal_or_old_default
from recattn.functional._autocast import autocast_inputs, autocast_may_be_on
from recattn.functional._nested import accepts_nested, nest_heads
from recattn.functional._sequences import (
    checked_sequences,
    expect_qkv,
    expect_windows,
    validate_layout,
    window_starts,
)
from recattn.ops import refined_attention as ops
from recattn.ops._support import draw_dropout_seed

_MECHANISMS = ("simple", "value", "additive", "stochastic")
# The tensors of a padded and of a packed call; what does not fit is checked by `_validate`, which says why.
_MATRICES = {
    "w_q": (check.SAME, "[H] Nmax R"),
    "w_k": (check.SAME, "[H] Nmax R"),
    "w_v": (check.SAME, "[H] Nmax Nmax?"),
}
_PADDED = check.Layouts(
    q=(check.FLOATING, "B H N D"),
    k=(check.SAME, "B H N D"),
    v=(check.SAME, "B H N Dv"),
    **_MATRICES,
    seq_lens=(check.INTEGER, "B?"),
    seq_starts=(check.INTEGER, "B?"),
)
_PACKED = check.Layouts(
    q=(check.FLOATING, "T H D"),
    k=(check.SAME, "T H D"),
    v=(check.SAME, "T H Dv"),
    **_MATRICES,
    cu_seqlens=(check.INTEGER, "B+1"),
)


@accepts_nested("q", "k", "v", ragged_axis=2, nest=nest_heads)
def refined_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor | None = None,
    *,
    mechanism: Mechanism = "simple",
    source: Source = "logits",
    causal: bool | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    padding_side: PaddingSide = "right",
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    max_seqlen: int | None = None,
    impl: RefinedAttentionImpl | None = None,
) -> Tensor:
    """Attention whose weight matrix A is refined into M by a second attention over it:

        L = scale · Q Kᵀ        A = L, or softmax(mask(L)) with source="weights"; 0 at future and padded entries
        Q' = A W_q              K' = A W_k
        simple                  M = Q' K'ᵀ / √R
        value                   M = softmax(mask(Q' K'ᵀ / √R)) (A W_v)
        additive                M = A + (M of value)
        stochastic              M_ij = −(‖μ_i − μ_j‖² + ‖√Σ_i − √Σ_j‖²) / √R
        O = softmax(mask(M)) V

    where mask hides the future (`causal`) and padding. For "stochastic" w_q is [W^μ | W^Σ], each R wide: query i is the
    Gaussian with mean μ_i = A_i W^μ and diagonal covariance Σ_i = elu(A_i W^Σ) + 1. Likewise w_k gives key j.

    Source: AWRSR (arXiv 2410.21048). Its method section could not be recovered. The names of the mechanisms, the
    learnable matrices and the two backbones are the paper's; the formulas are our reading. `source` is an option
    because the paper may mean either. The distance is scaled as in STOSA, whose code calls this squared form the
    2-Wasserstein distance. To refine STOSA's own attention see `recattn.wasserstein_attention`.

    Args:
        q, k: [B, H, N, D], float64, float32, bfloat16 or float16; packed: [T, H, D]; or nested (torch.jagged)
            [B, H, j, D], which is computed packed.
        v: [B, H, N, Dv], packed [T, H, Dv], or nested; q's dtype.
        w_q, w_k: [Nmax, R], or [H, Nmax, R] for matrices per head, Nmax ≥ N, q's dtype ("stochastic": [.., Nmax, 2R]).
            The first N rows are used: a row is a position on the N axis, wherever the padding is. Packed or nested, a
            row is a position in its sequence, counted from its start, and no sequence is longer than Nmax.
        w_v: [Nmax, Nmax] or [H, Nmax, Nmax], of which the first N rows and columns are used; for "value" and
            "additive", None for the others.
        mechanism: "simple", "value", "additive" or "stochastic".
        source: "logits" or "weights".
        causal: query i sees the keys j ≤ i. The default is True in this release, with a warning, and False from the
            next on, as everywhere else.
        seq_lens: [B] integer, the number of valid tokens per sequence; the padding is on `padding_side`.
        seq_starts: [B] integer, with `seq_lens`: where on the N axis each sequence begins, instead of `padding_side`.
        padding_side: "right" or "left".
        cu_seqlens: [B + 1] integer, offsets of packed sequences; excludes `seq_lens`.
        dropout_p: probability of dropping each of the final weights, in kernels in steps of 1/65536. On a CPU float64
            with dropout runs the reference.
        scale: of the logits, 1/√D by default.
        max_seqlen: upper bound on the lengths of packed sequences, known on the host; min(T, Nmax) without it. On a GPU
            it chooses the kernels and their tiles.
        impl: None chooses; or "cpu", "triton", "chunked" (PyTorch matmuls, on a GPU or without C++) or "reference". If
            it does not support the call, you get an error.

    Returns:
        [B, H, N, Dv] in q's dtype, packed [T, H, Dv], nested [B, H, j, Dv]; zero at padding.

        On a CPU arithmetic is float32 (float64 for float64). Up to N = 256, and for any N with dropout, a thread holds
        about twelve N × N matrices of one batch and head; for "stochastic" up to N = 1024, or with source="weights" or
        dropout of any length, four times 128 × N numbers. Longer "simple" with R < N, with dropout too, takes memory
        linear in N: A W_q, A W_k, the output and two numbers per row are saved. Elsewhere only the inputs are saved for
        the backward. Other longer sequences and float64 are computed a few batch-heads at a time: each needs
        N (D + Dv + R) numbers beyond inputs, output and gradients. "value" and "additive" also hold A W_v, N × N. Where
        R ≥ N (the paper's default), all but "stochastic" also hold A, N × N.

        On a GPU Triton kernels compute N ≤ 128 (64 below Hopper, 32 in float32) in one program per batch and head, and
        save the inputs and W_q W_kᵀ. Longer "simple" and "stochastic" with up to 256 columns in w_q take memory linear
        in N: A W_q, A W_k, the output and one number per row are saved. Everything else runs as chunked PyTorch matmuls
        in float32, in chunks of 2^25 elements or of the N × N matrices of one batch and head. Where sequences are
        packed or nested, N is the longest, and chunked matmuls compute one sequence after another.

        Second derivatives (`create_graph=True`) and forward-mode ones (`torch.func.jvp`) run the reference, in its time
        and memory.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; on a CPU also lengths out of range (on a GPU
            `recattn.validate` checks them, or RECATTN_CHECK=1 at every call) or beyond Nmax or `max_seqlen`.
        NotImplementedError: an explicit `impl` that does not support the call; `create_graph=True` after dropout in a
            kernel.
    """
    causal = causal_or_old_default("refined_attention", causal)
    _validate_options(mechanism, source, dropout_p, scale)
    if padding_side != "right" or seq_starts is not None or cu_seqlens is not None or max_seqlen is not None:
        validate_layout(padding_side, seq_lens, seq_starts, cu_seqlens, max_seqlen)
    if autocast_may_be_on():
        matrices = {"w_q": w_q, "w_k": w_k} | ({} if w_v is None else {"w_v": w_v})
        check.expect_tensors(q=q, k=k, v=v, **matrices)
        q, k, v, w_q, w_k = autocast_inputs(q, k, v, w_q, w_k)
        w_v = None if w_v is None else autocast_inputs(w_v)[0]
    lengths = (seq_lens, seq_starts, cu_seqlens)
    if not _fits(q, k, v, w_q, w_k, w_v, mechanism, *lengths):
        _validate(q, k, v, w_q, w_k, w_v, mechanism, *lengths)
    if padding_side == "left":
        seq_starts = window_starts(padding_side, q.shape[2], seq_lens)
        lengths = (seq_lens, seq_starts, None)
    reasons = ops.unsupported_reasons(
        q.device.type,
        q,
        v,
        w_q,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        mechanism=mechanism,
        dropout_p=dropout_p,
        impl=impl,
    )
    chosen = select("refined_attention", impl, reasons)
    # The CPU implementation checks them itself.
    if chosen != "cpu" and (seq_lens is not None or cu_seqlens is not None):
        lengths = seq_lens, seq_starts, cu_seqlens = checked_sequences(q, lengths, w_q, max_seqlen)
    if chosen == "reference":
        return reference.refined_attention(
            q,
            k,
            v,
            w_q,
            w_k,
            w_v,
            mechanism=mechanism,
            source=source,
            causal=causal,
            seq_lens=seq_lens,
            seq_starts=seq_starts,
            cu_seqlens=cu_seqlens,
            dropout_p=dropout_p,
            scale=scale,
        )
    options = RefinedAttentionOptions(mechanism, source, causal, scale, dropout_p, max_seqlen, chosen)
    seed = draw_dropout_seed(dropout_p, q.device)
    return ops.refined_attention(q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, seed, options)


def _validate_options(mechanism, source, dropout_p, scale) -> None:
    check.expect_choice("mechanism", mechanism, _MECHANISMS)
    check.expect_choice("source", source, ("logits", "weights"))
    check.expect_numbers(scale=scale)
    check.expect_probability("dropout_p", dropout_p)


def _fits(q, k, v, w_q, w_k, w_v, mechanism, seq_lens, seq_starts, cu_seqlens) -> bool:
    """Whether the tensors are right. False: ask `_validate` what is wrong."""
    if (w_v is not None) != (mechanism in ("value", "additive")):
        return False
    tensors = (q, k, v, w_q, w_k, w_v)
    if cu_seqlens is None:
        sizes = _PADDED.sizes(*tensors, seq_lens, seq_starts)
        if sizes is None:
            return False
        _, _, N, D, _, n_max, columns = sizes
    else:
        sizes = _PACKED.sizes(*tensors, cu_seqlens)
        if sizes is None:
            return False
        _, _, D, _, n_max, columns, offsets = sizes
        if offsets < 1:
            return False
        N = 0  # lengths are checked where they are known
    return D > 0 and n_max >= N and columns > 0 and (mechanism != "stochastic" or columns % 2 == 0)


def _validate(q, k, v, w_q, w_k, w_v, mechanism, seq_lens, seq_starts, cu_seqlens) -> None:
    sizes: dict[str, int] = {}
    expect_qkv(sizes, q, k, v, cu_seqlens, ("H", "H"))
    check.expect_tensors(w_q=w_q, w_k=w_k)
    check.expect(sizes["D"] > 0, "D of q and k", "at least 1", 0)
    columns = "2R" if mechanism == "stochastic" else "R"
    check.expect_shape(sizes, "w_q", w_q, f"{_head_axis(w_q)} Nmax {columns}")
    check.expect_shape(sizes, "w_k", w_k, f"{_head_axis(w_k)} Nmax {columns}")
    if cu_seqlens is None and sizes["Nmax"] < sizes["N"]:  # torch.compile specializes on a size that is formatted
        check.expect(False, "Nmax of w_q and w_k", f"at least N = {sizes['N']}", sizes["Nmax"])
    check.expect(sizes[columns] > 0, f"{columns} of w_q and w_k", "at least 1", 0)
    if mechanism == "stochastic":
        check.expect(sizes["2R"] % 2 == 0, "2R of w_q and w_k", 'even for mechanism="stochastic"', sizes["2R"])
    if mechanism in ("value", "additive"):
        check.expect_tensors(w_v=w_v)
        check.expect_shape(sizes, "w_v", w_v, f"{_head_axis(w_v)} Nmax Nmax")
    else:
        check.expect(w_v is None, "w_v", f"None for mechanism={mechanism!r}", "a tensor")
    check.expect_dtype("q", q, check.FLOATING)
    check.expect_same_dtype("q", q, k=k, v=v, w_q=w_q, w_k=w_k, w_v=w_v)
    expect_windows(sizes, seq_lens, seq_starts)
    lengths = {"seq_lens": seq_lens, "seq_starts": seq_starts, "cu_seqlens": cu_seqlens}
    check.expect_same_device("q", q, k=k, v=v, w_q=w_q, w_k=w_k, w_v=w_v, **lengths)


def _head_axis(w: Tensor) -> str:
    return "H" if w.dim() == 3 else ""

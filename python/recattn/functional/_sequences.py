"""How the sequences of a batch lie, in arguments that the public functions share: windows of N tokens, or packed."""

from torch import Tensor

from recattn import _check as check
from recattn._typing import PaddingSide
from recattn.functional.validation import checked_indices, expect_values, values_are_checked
from recattn.reference.sink_attention import window_starts

__all__ = ["checked_sequences", "expect_cu_seqlens", "expect_qkv", "expect_windows", "validate_layout", "window_starts"]


def validate_layout(
    padding_side: PaddingSide,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Check that the arguments go together."""
    check.expect_choice("padding_side", padding_side, ("right", "left"))
    packed = cu_seqlens is not None
    for name, lengths in (("seq_lens", seq_lens), ("seq_starts", seq_starts)):
        given = lengths is not None and packed
        check.expect(not given, name, "None beside cu_seqlens (packed sequences have no padding)", "both")
    if seq_starts is not None:
        check.expect(seq_lens is not None, "seq_lens", "given with seq_starts", None)
        check.expect(padding_side == "right", "padding_side", "'right', the default, beside seq_starts", padding_side)
    if max_seqlen is not None:
        check.expect(packed, "max_seqlen", "None but with cu_seqlens", max_seqlen)
        check.expect_count("max_seqlen", max_seqlen)


def expect_cu_seqlens(sizes: dict[str, int], cu_seqlens: Tensor) -> None:
    """Check the offsets [B + 1] of a packed batch, and set B."""
    check.expect_index(sizes, "cu_seqlens", cu_seqlens, "B+1")
    check.expect(sizes["B+1"] >= 1, "cu_seqlens", "[B + 1]", "no offset")
    sizes["B"] = sizes["B+1"] - 1


def expect_qkv(
    sizes: dict[str, int], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, heads: tuple[str, str]
) -> None:
    """Check q and k [B, H, N, D] and v [B, H, N, Dv], or packed ones. `heads`: H of q, and of k and v, by name."""
    check.expect_tensors(q=q, k=k, v=v)
    if cu_seqlens is not None:
        expect_cu_seqlens(sizes, cu_seqlens)
    of_q, of_kv = heads
    for name, x, h, dim in (("q", q, of_q, "D"), ("k", k, of_kv, "D"), ("v", v, of_kv, "Dv")):
        check.expect_shape(sizes, name, x, f"B {h} N {dim}" if cu_seqlens is None else f"T {h} {dim}")


def expect_windows(sizes: dict[str, int], seq_lens: Tensor | None, seq_starts: Tensor | None) -> None:
    """Check the lengths [B] and starts [B] of a padded batch, where they are given."""
    for name, lengths in (("seq_lens", seq_lens), ("seq_starts", seq_starts)):
        if lengths is not None:
            check.expect_index(sizes, name, lengths, "B")


def checked_sequences(
    x: Tensor, lengths: tuple[Tensor | None, ...], w: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor | None, ...]:
    """seq_lens, seq_starts and cu_seqlens with their values checked, where that costs no synchronisation.

    x is [B, H, N, D], or packed [T, H, D]. Packed sequences are no longer than `max_seqlen` and than the rows of `w`.
    """
    seq_lens, seq_starts, cu_seqlens = lengths
    if cu_seqlens is None:
        indices = checked_indices(x.device, seq_len=x.shape[2], seq_lens=seq_lens, seq_starts=seq_starts)
        return indices.seq_lens, indices.seq_starts, None
    cu_seqlens = checked_indices(x.device, num_tokens=x.shape[0], cu_seqlens=cu_seqlens).cu_seqlens
    if values_are_checked(x.device):
        _expect_bound("Nmax of w_q and w_k", None if w is None else w.shape[-2], cu_seqlens.diff())
        _expect_bound("max_seqlen", max_seqlen, cu_seqlens.diff())
    return None, None, cu_seqlens


def _expect_bound(name: str, bound: int | None, seq_lens: Tensor) -> None:
    if bound is not None:
        expected = f"{name} must be at least the longest sequence"
        expect_values(seq_lens <= bound, expected, lambda i: f"{bound} and a length of {seq_lens[i]} at index [{i}]")

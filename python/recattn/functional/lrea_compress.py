"""Compression of long histories to rank r (LREA, arXiv 2503.02542)."""

import torch
from torch import Tensor

from recattn import _check as check
from recattn import reference
from recattn._dispatch import is_transformed, select
from recattn._options import LreaCompressOptions
from recattn._typing import LreaImpl
from recattn.functional._nested import accepts_nested
from recattn.functional._sequences import validate_layout
from recattn.functional.validation import checked_indices, expect_values, values_are_checked
from recattn.ops import lrea_attention as ops
from recattn.ops._library import apply

# The tensors of a call; what does not fit is checked by `_validate`, which says why.
_W_COMP = (check.SAME, "Lmax r")
_PADDED = check.Layouts(behaviors=(check.FLOATING, "U L d"), w_comp=_W_COMP, seq_lens=(check.INTEGER, "U?"))
_PADDED_ITEMS = check.Layouts(
    behaviors=(check.FLOATING, "I d"),
    item_ids=(check.INTEGER, "U L"),
    w_comp=_W_COMP,
    seq_lens=(check.INTEGER, "U?"),
)
_PACKED = check.Layouts(behaviors=(check.FLOATING, "T d"), w_comp=_W_COMP, cu_seqlens=(check.INTEGER, "U+1"))
_PACKED_ITEMS = check.Layouts(
    behaviors=(check.FLOATING, "I d"),
    item_ids=(check.INTEGER, "T"),
    w_comp=_W_COMP,
    cu_seqlens=(check.INTEGER, "U+1"),
)


@accepts_nested("behaviors", ragged_axis=1)
def lrea_compress(
    behaviors: Tensor,
    w_comp: Tensor,
    seq_lens: Tensor | None = None,
    *,
    item_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    impl: LreaImpl | None = None,
) -> Tensor:
    """Compress a history of L behaviours to r rows:

        C_u = W_compᵀ E_u        over the first seq_lens[u] behaviours of user u, or with cu_seqlens over all its own

    With `item_ids`, each behaviour is a row of an embedding table by its id. The table is read in place.

    Histories are padded [U, L, d], packed [T, d] with `cu_seqlens`, or nested [U, j, d] (torch.jagged), which is
    computed as packed. Row l of W_comp belongs to the l-th behaviour of a user, counted from its oldest.

    Source: LREA (arXiv 2503.02542), whose reviews confirm this step. How it treats padding is our reading: padding is
    left out of the sum.

    Args:
        behaviors: E [U, L, d], packed [T, d] or nested [U, j, d]; float64, float32, bfloat16 or float16. With
            `item_ids` a table [I, d].
        w_comp: [Lmax, r], behaviors' dtype, with Lmax at least L or the longest history; its first rows are used.
        seq_lens: [U] integer, the number of behaviours of each padded user; the rest is padding. L by default.
        item_ids: [U, L] integer, packed [T] or nested [U, j]: rows of the table; padding may hold any number.
        cu_seqlens: [U + 1] integer, ascending from 0 to T: user u owns rows cu_seqlens[u] up to cu_seqlens[u + 1].
        max_seqlen: with cu_seqlens, an upper bound of the lengths, Lmax by default. On a GPU a low one saves launches
            without work.
        impl: None chooses; "cpu" (compiled), "triton" or "reference" selects. The kernels have no gradient with
            `item_ids`, so None takes the reference where a gradient is needed.

    Returns:
        [U, r, d] in behaviors' dtype, differentiable. Sums are float32 inside (float64 for float64). The kernels read
        each behaviour once. The backward of impl="cpu" allocates dE and for dW_comp up to 16 partial sums of its size.

        Second derivatives (`create_graph=True`) and forward-mode ones (`torch.func.jvp`) run the reference, in its time
        and memory.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on a CPU also lengths, offsets or item ids out of range, or a
            history longer than Lmax. On a GPU the kernels read an item id out of range as zeros and clamp lengths to
            0 .. L, or where packed to max_seqlen and Lmax: what lies behind counts for nothing, and its gradient is not
            written. `recattn.validate`, or RECATTN_CHECK=1, reports them.
        NotImplementedError: the selected `impl` does not support the call.
    """
    if isinstance(item_ids, Tensor) and item_ids.is_nested:
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "impl": impl}
        return _compress_nested_items(behaviors, w_comp, seq_lens, item_ids=item_ids, **options)
    if not _fits(behaviors, w_comp, item_ids, seq_lens, cu_seqlens, max_seqlen):
        _validate(behaviors, w_comp, item_ids, seq_lens, cu_seqlens, max_seqlen)
    reasons = ops.unsupported_reasons(behaviors.device.type, "lrea_compress", behaviors.dtype, w_comp.shape[1])
    if item_ids is not None:
        reasons = add_lack_of_gradient(reasons, behaviors, w_comp)
    chosen = select("lrea_compress", impl, reasons)
    if chosen != "cpu":  # the C++ operator checks what it reads
        histories = behaviors if item_ids is None else item_ids
        indices = checked_indices(
            behaviors.device,
            seq_lens=seq_lens,
            seq_len=None if seq_lens is None else histories.shape[1],
            cu_seqlens=cu_seqlens,
            num_tokens=histories.shape[0],
            item_ids=item_ids,
            num_items=None if item_ids is None else behaviors.shape[0],
        )
        seq_lens, cu_seqlens, item_ids = indices.seq_lens, indices.cu_seqlens, indices.item_ids
        if cu_seqlens is not None and values_are_checked(behaviors.device):
            _expect_lengths(cu_seqlens.diff(), w_comp.shape[0])
    if chosen == "reference":
        return reference.lrea_compress(behaviors, w_comp, seq_lens, item_ids=item_ids, cu_seqlens=cu_seqlens)
    options = LreaCompressOptions(max_seqlen, path_of(impl))
    if item_ids is not None:
        return ops.lrea_compress_items(behaviors, w_comp, seq_lens, cu_seqlens, item_ids, options)
    return apply(ops.LreaCompressFunction, behaviors, w_comp, seq_lens, cu_seqlens, options)


_compress_nested_items = accepts_nested("item_ids", ragged_axis=1)(lrea_compress)


def _fits(behaviors, w_comp, item_ids, seq_lens, cu_seqlens, max_seqlen) -> bool:
    """Whether the arguments are right. False: ask `_validate` what is wrong."""
    if cu_seqlens is not None:
        if seq_lens is not None or max_seqlen is not None:
            return False  # to be checked one by one
        if item_ids is None:
            sizes = _PACKED.sizes(behaviors, w_comp, cu_seqlens)  # T, d, Lmax, r, U
        else:
            sizes = _PACKED_ITEMS.sizes(behaviors, item_ids, w_comp, cu_seqlens)  # I, d, T, Lmax, r, U
        return sizes is not None and sizes[-1] >= 0
    if max_seqlen is not None:
        return False
    if item_ids is None:
        sizes = _PADDED.sizes(behaviors, w_comp, seq_lens)  # U, L, d, Lmax, r
        return sizes is not None and sizes[3] >= sizes[1]
    sizes = _PADDED_ITEMS.sizes(behaviors, item_ids, w_comp, seq_lens)  # I, d, U, L, Lmax, r
    return sizes is not None and sizes[4] >= sizes[3]


def _validate(behaviors, w_comp, item_ids, seq_lens, cu_seqlens, max_seqlen) -> None:
    validate_layout("right", seq_lens, None, cu_seqlens, max_seqlen)
    check.expect_tensors(behaviors=behaviors, w_comp=w_comp)
    sizes: dict[str, int] = {}
    histories = "U L" if cu_seqlens is None else "T"
    if item_ids is None:
        check.expect_shape(sizes, "behaviors", behaviors, f"{histories} d")
    else:
        check.expect_shape(sizes, "behaviors", behaviors, "I d")
        check.expect_index(sizes, "item_ids", item_ids, histories)
    check.expect_shape(sizes, "w_comp", w_comp, "Lmax r")
    if cu_seqlens is None and sizes["Lmax"] < sizes["L"]:  # a message made beforehand would fix the sizes in a graph
        raise ValueError(f"Lmax of w_comp must be at least L = {sizes['L']}, got {sizes['Lmax']}")
    check.expect_dtype("behaviors", behaviors, check.FLOATING)
    check.expect_same_dtype("behaviors", behaviors, w_comp=w_comp)
    if seq_lens is not None:
        check.expect_index(sizes, "seq_lens", seq_lens, "U")
    if cu_seqlens is not None:
        check.expect_index(sizes, "cu_seqlens", cu_seqlens, "U+1")
        check.expect(sizes["U+1"] >= 1, "cu_seqlens", "[U + 1]", "no offset")
    indices = {"seq_lens": seq_lens, "cu_seqlens": cu_seqlens, "item_ids": item_ids}
    check.expect_same_device("behaviors", behaviors, w_comp=w_comp, **indices)


def _expect_lengths(lengths: Tensor, longest: int) -> None:
    def got(user: int) -> str:
        return f"{lengths[user].item()} at index [{user}] and Lmax = {longest}"

    expect_values(lengths <= longest, "cu_seqlens must have at most Lmax of w_comp behaviours per user", got)


def add_lack_of_gradient(reasons: dict[str, str | None], *tensors: Tensor | None) -> dict[str, str | None]:
    """`reasons`, with one more for all but the reference where a tensor needs, or may need, a gradient."""
    if is_transformed():
        no_gradient = 'it has no transforms of torch.func; take impl="reference"'
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        no_gradient = 'it has no gradient; call it under torch.no_grad(), or take impl="reference"'
    else:
        return reasons
    return {impl: reason or (None if impl == "reference" else no_gradient) for impl, reason in reasons.items()}


def path_of(impl: LreaImpl | None) -> str:
    """What the operators are told. On a CPU only an explicit impl="triton" takes Triton's interpreter."""
    return "triton" if impl == "triton" else "auto"

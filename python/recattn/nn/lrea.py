"""Target attention over a long history compressed to rank r (LREA, arXiv 2503.02542), and its serving state."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recattn import functional
from recattn._check import (
    FLOATING,
    checked_lengths,
    checked_offsets,
    expect,
    expect_choice,
    expect_dtype,
    expect_index,
    expect_numbers,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    expect_tensors,
)
from recattn._typing import LossReduction, LreaImpl, Orientation
from recattn.functional._autocast import autocast_inputs, without_autocast
from recattn.functional._nested import accepts_nested
from recattn.nn._constructor_checks import expect_positive
from recattn.nn.lrea_fidelity import Fidelity, Score, are_finite, measure_fidelity


class LREAState(NamedTuple):
    """State of each user. Serving reads keys, values and their scales; `append` also needs compressed and lengths.

    The last two are None in a state that is only served.
    """

    keys: Tensor  # [U, H, r, target_dim], with W_Q and the scale folded in
    values: Tensor  # [U, H, r, head_dim], with W_decomp W_decompᵀ folded in
    key_scales: Tensor | None  # [U, H, r] float32, for int8 keys
    value_scales: Tensor | None  # [U, H, r] float32, for int8 values
    compressed: Tensor = None  # type: ignore[assignment]  # C [U, r, embed_dim], float32 (float64 for a float64 module)
    lengths: Tensor = None  # type: ignore[assignment]  # [U] int64

    def map(self, function: Callable[[Tensor], Tensor]) -> "LREAState":
        """The state with `function` applied to each of its tensors, such as `lambda x: x[users]`."""
        tensors: Any = (None if tensor is None else function(tensor) for tensor in self)
        return LREAState(*tensors)


class LREA(nn.Module):
    """Target attention over a history compressed to r rows: restored to full length in training, absorbed in serving:

        C = W_compᵀ E                                  E [L, embed_dim] the behaviours, oldest first
        K, V = heads of C W_K, C W_V        q = heads of e_t W_Q
        h = φ(q (W_decompᵀ K)ᵀ/√D) (W_decompᵀ V)       restored (`forward`), concatenated over the heads
        h ≈ φ(e_t keysᵀ) values                        absorbed (`attend`)
        keys = K W_Qᵀ/√D,   values = W_decomp W_decompᵀ V   (`export_state`; the first L columns of W_decomp)

    φ is a leaky ReLU. There is no softmax, and there are no biases, as neither would factor. Train with `forward` and
    add `loss`, a regularizer that keeps the absorbed form close to the restored one. It acts on W_decomp and C but not
    on W_Q and W_K, so it guarantees nothing: serve with `attend` and measure the difference with `fidelity`. See
    `recattn.lrea_absorb` for the two orientations and for which parts are our reading of LREA.

    Args:
        embed_dim: width of a behaviour.
        max_len: the longest history. `w_comp` is [max_len, rank] and `w_decomp` [rank, max_len], with one row or column
            per position, counted from the oldest behaviour.
        rank: r, at most max_len.
        num_heads: H. `w_q` is [target_dim, H·D], `w_k` and `w_v` are [embed_dim, H·D].
        target_dim: width of a target, embed_dim by default.
        head_dim: D, embed_dim / H by default.
        negative_slope: slope of φ below 0.
        orientation: "scores" or "weights", where φ is applied in the absorbed form.
        impl: as in the functions: None chooses, "reference" forces the reference.
    """

    def __init__(
        self,
        embed_dim: int,
        max_len: int,
        rank: int,
        num_heads: int = 1,
        *,
        target_dim: int | None = None,
        head_dim: int | None = None,
        negative_slope: float = 0.01,
        orientation: Orientation = "scores",
        impl: LreaImpl | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_choice("orientation", orientation, ("scores", "weights"))
        expect_numbers(negative_slope=negative_slope)
        expect_positive(embed_dim=embed_dim, max_len=max_len)
        expect(0 < rank <= max_len, "rank", f"between 1 and max_len, {max_len}", rank)
        expect_positive(num_heads=num_heads)
        if head_dim is None:
            multiple = f"a multiple of {num_heads} heads where head_dim is not given"
            expect(embed_dim % num_heads == 0, "embed_dim", multiple, embed_dim)
            head_dim = embed_dim // num_heads
        target_dim = embed_dim if target_dim is None else target_dim
        expect_positive(head_dim=head_dim, target_dim=target_dim)
        self.embed_dim, self.max_len, self.rank, self.num_heads = embed_dim, max_len, rank, num_heads
        self.target_dim, self.head_dim = target_dim, head_dim
        self.negative_slope = negative_slope
        self.orientation: Orientation = orientation
        self.impl: Any = impl  # not all operators have it

        options = {"device": device, "dtype": dtype}
        self.w_comp = nn.Parameter(torch.empty(max_len, rank, **options))
        self.w_decomp = nn.Parameter(torch.empty(rank, max_len, **options))
        self.w_q = nn.Parameter(torch.empty(target_dim, num_heads * head_dim, **options))
        self.w_k = nn.Parameter(torch.empty(embed_dim, num_heads * head_dim, **options))
        self.w_v = nn.Parameter(torch.empty(embed_dim, num_heads * head_dim, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_comp and W_decomp from U(0, √(3/(r·max_len))), and W_Q, W_K, W_V by Xavier.

        Without negative entries the first term of `loss` is 0 and φ factors best. With that bound each restored
        behaviour starts as about 3/4 of the mean of max_len behaviours. If the behaviours are independent, the output,
        a sum over them, then has about the size of one behaviour for any max_len and r; if they share a mean, it grows
        with their number. W_comp and W_decomp have the same bound because an optimizer such as Adam takes steps of the
        same size in both.
        """
        for weight in (self.w_comp, self.w_decomp):
            nn.init.uniform_(weight, 0, math.sqrt(3 / (self.rank * self.max_len)))
        for weight in (self.w_q, self.w_k, self.w_v):
            nn.init.xavier_uniform_(weight)

    @accepts_nested("behaviors", ragged_axis=1)
    def compress(
        self,
        behaviors: Tensor,
        seq_lens: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """C = W_compᵀ E: behaviors [U, L, embed_dim] -> [U, r, embed_dim], over the first seq_lens[u] of user u.

        Also of packed behaviors [T, embed_dim] with cu_seqlens [U + 1], or nested [U, j, embed_dim] (torch.jagged), as
        in `recattn.lrea_compress`.

        Raises:
            ValueError: a shape, dtype or device does not match, or L > max_len; on a CPU also lengths or offsets out of
                range.
        """
        self._expect_behaviors(behaviors, cu_seqlens)
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "impl": self.impl}
        return functional.lrea_compress(*autocast_inputs(behaviors, self.w_comp), seq_lens, **options)

    @accepts_nested("behaviors", ragged_axis=1)
    def forward(
        self,
        targets: Tensor,
        behaviors: Tensor | None,
        target_offsets: Tensor | None = None,
        *,
        seq_lens: Tensor | None = None,
        compressed: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The restored form, h = φ(q (W_decompᵀ K)ᵀ/√D) (W_decompᵀ V), differentiable in every input and parameter.

        Args:
            targets: e_t [T, target_dim] with target_offsets; without them [U, target_dim], one per user, or
                [U, n, target_dim]. In the dtype of the parameters, unless autocast casts both.
            behaviors: E [U, L, embed_dim], L ≤ max_len, the oldest first; packed [T, embed_dim] with cu_seqlens, or
                nested [U, j, embed_dim] (torch.jagged).
            target_offsets: [U + 1] integer, from 0 to T, never descending; user u has the rows
                target_offsets[u]:target_offsets[u + 1] of `targets`.
            seq_lens: [U] integer, the number of behaviours per user; the rest is padding. L by default.
            compressed: C [U, r, embed_dim], if `compress` was already called. `behaviors` may then be None; without it
                and without `seq_lens` or `cu_seqlens` every history has max_len behaviours.
            cu_seqlens: [U + 1] integer, of packed behaviors: user u owns rows cu_seqlens[u] up to cu_seqlens[u + 1].
            max_seqlen: with cu_seqlens, an upper bound of the lengths, max_len by default.

        Returns:
            [T, H·D], [U, H·D] or [U, n, H·D]; zeros for a user without behaviours.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU also offsets or lengths out of range.
        """
        if compressed is None:
            if behaviors is None:
                raise ValueError("behaviors must be given where compressed is not, got None")
            compressed = self.compress(behaviors, seq_lens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if cu_seqlens is not None:
            expect(seq_lens is None, "seq_lens", "None beside cu_seqlens (packed sequences have no padding)", "both")
            seq_lens = cu_seqlens.diff()
        w_decomp = self.w_decomp
        # With lengths no column beyond them is read, and slicing would make L static in a compiled graph.
        if behaviors is not None and seq_lens is None:
            w_decomp = w_decomp[:, : behaviors.shape[1]]
        expect_tensors(targets=targets, compressed=compressed)
        sizes = {"rank": self.rank, "embed_dim": self.embed_dim}
        expect_shape(sizes, "compressed", compressed, "U rank embed_dim")
        rows, target_offsets = self._pack_targets(targets, target_offsets, sizes["U"])
        tensors = autocast_inputs(rows, compressed, w_decomp, self.w_q, self.w_k, self.w_v)
        rows, compressed, w_decomp, w_q, w_k, w_v = tensors
        expect_same_dtype("the parameters", w_q, targets=rows, compressed=compressed)
        expect_same_device("the parameters", w_q, targets=rows, compressed=compressed)
        out = functional.lrea_attention(
            (rows @ w_q).unflatten(-1, (self.num_heads, self.head_dim)),
            self._split_heads(compressed @ w_k),
            self._split_heads(compressed @ w_v),
            w_decomp,
            target_offsets,
            seq_lens=seq_lens,
            negative_slope=self.negative_slope,
            impl=self.impl,
        )
        return self._reshape_like(targets, out)

    def loss(self, compressed: Tensor, reduction: LossReduction | None = None) -> Tensor:
        """‖max(0, −W_decomp)‖² + the mean over users of ‖max(0, −C_u)‖², a scalar: C [U, r, embed_dim] of `compress`.

        Start with a weight of 0.01 beside a binary cross-entropy: `recattn.lrea_nonnegativity_loss` says why.

        Args:
            compressed: C [U, r, embed_dim].
            reduction: "mean" or "sum" over the users. None is "mean" and warns, in this release, that it was "sum".
        """
        expect_tensors(compressed=compressed)
        compressed = compressed.to(self.w_decomp.dtype)
        return functional.lrea_nonnegativity_loss(self.w_decomp, compressed, reduction=reduction)

    @accepts_nested("behaviors", ragged_axis=1)
    @accepts_nested("item_ids", ragged_axis=1)
    @torch.no_grad()
    def export_state(
        self,
        behaviors: Tensor,
        seq_lens: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        item_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> LREAState:
        """The state of each user, which `attend` reads and `append` updates:

            keys = K W_Qᵀ/√D        values = G_u V        G_u as in `recattn.lrea_absorb`, over the user's own columns

        `keys` and `values` have H·r·(target_dim + D) entries per user. `compressed` and `lengths`, 4·r·embed_dim + 8
        bytes per user, are needed by `append` but not by serving: you can store them elsewhere or drop them.

        Args:
            behaviors: E [U, L, embed_dim], packed or nested, as in `forward`; with `item_ids` an embedding table
                [I, embed_dim].
            seq_lens: [U] integer, the number of behaviours per user. L by default.
            dtype: dtype of keys and values: bfloat16, float16, float32, float64, or int8 with one scale per row
                (`recattn.lrea_quantize`). By default that of the parameters.
            item_ids: [U, L] integer, packed [T] or nested [U, j]: rows of the table; ids at padding are ignored.
            cu_seqlens, max_seqlen: of packed behaviors or item_ids, as in `forward`.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU also lengths or item ids out of range.
        """
        dtype = self.w_comp.dtype if dtype is None else dtype
        choices = (*FLOATING, torch.int8)
        expect(dtype in choices, "dtype", " or ".join(str(choice) for choice in choices), dtype)
        self._expect_behaviors(behaviors, cu_seqlens, item_ids)
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "impl": self.impl}
        with without_autocast(behaviors):  # the precision of a state is that of its dtype
            compressed = functional.lrea_compress(behaviors, self.w_comp, seq_lens, item_ids=item_ids, **options)
        compressed = compressed.to(torch.promote_types(compressed.dtype, torch.float32))
        if cu_seqlens is None:
            users, length, *_ = behaviors.shape if item_ids is None else item_ids.shape
            lengths = self._lengths(users, length, seq_lens, behaviors.device)
        else:
            lengths = cu_seqlens.long().diff()
        return self._make_state(compressed, lengths, dtype)

    @torch.no_grad()
    def append(self, state: LREAState, behavior: Tensor) -> LREAState:
        """Add one behaviour to each user, a rank-one update: C + w_comp[length] ⊗ e, length + 1. Returns the new state.

        Up to rounding the result equals `export_state` of the longer history, after any number of appends: keys and
        values are recomputed from C. That takes O(H·r·D·(embed_dim + target_dim)) per user and O(r²·max_len) per call
        for W_decomp W_decompᵀ. The histories are not read.

        Args:
            state: a state of this module with one row per row of `behavior`, possibly selected from a larger state.
            behavior: e [U, embed_dim], the newest behaviour of each user.

        Raises:
            ValueError: a shape, dtype or device does not match; lengths out of range, or a history already has max_len
                behaviours (the check reads `lengths`, a synchronisation on a GPU).
        """
        sizes = {"rank": self.rank, "embed_dim": self.embed_dim}
        expect_tensors(**{"state.compressed": state.compressed, "behavior": behavior})
        expect_shape(sizes, "state.compressed", state.compressed, "U rank embed_dim")
        expect_index(sizes, "state.lengths", state.lengths, "U")
        expect_shape(sizes, "behavior", behavior, "U embed_dim")
        expect_dtype("behavior", behavior, FLOATING)
        devices = {"state.lengths": state.lengths, "behavior": behavior}
        expect_same_device("state.compressed", state.compressed, **devices)
        lengths = checked_lengths("state.lengths", state.lengths, self.max_len)
        full = (lengths == self.max_len).nonzero().flatten().tolist()
        if full:
            raise ValueError(
                f"state.lengths must be below max_len, {self.max_len}, got {lengths[full[0]].item()} of user "
                f"{full[0]}: a full history takes no more behaviours, export its newest anew"
            )
        rows = self.w_comp[lengths].to(state.compressed.dtype)  # [U, r]
        compressed = state.compressed + rows[:, :, None] * behavior.to(rows.dtype)[:, None, :]
        return self._make_state(compressed, lengths + 1, state.keys.dtype)

    @property
    def absorbed_negative_slope(self) -> float:
        """Slope of φ in the absorbed form: 1.0 for "weights", where φ is applied to W_decomp, within the values."""
        return 1.0 if self.orientation == "weights" else self.negative_slope

    @torch.no_grad()
    def attend(
        self,
        targets: Tensor,
        state: LREAState,
        slots: Tensor | None = None,
        target_offsets: Tensor | None = None,
    ) -> Tensor:
        """The absorbed form, h = φ(e_t keys[s]ᵀ) values[s] with s = slots[u], in O(r) a target.

        It has no gradient, whatever requires one, so that the compiled kernel runs: train with `forward`.

        Args:
            targets: e_t [T, target_dim] with target_offsets; without them [U, target_dim] or [U, n, target_dim].
            state: from `export_state` or `append`. Targets are cast to the dtype of its keys, unless that is int8.
            slots: [U] integer, the row of each user in the state; by default all rows in order.
            target_offsets: [U + 1] integer, as in `forward`.

        Returns:
            [T, H·D], [U, H·D] or [U, n, H·D] in the dtype of `targets`.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU also slots or offsets out of range.
        """
        expect_tensors(targets=targets)
        if slots is None:
            slots = torch.arange(len(state.keys), device=targets.device)
        expect_tensors(slots=slots)
        sizes = {"H": self.num_heads, "target_dim": self.target_dim, "head_dim": self.head_dim}
        expect_shape(sizes, "state.keys", state.keys, "S H r target_dim")
        expect_shape(sizes, "state.values", state.values, "S H r head_dim")
        expect_shape(sizes, "slots", slots, "U")
        rows, target_offsets = self._pack_targets(targets, target_offsets, sizes["U"])
        if state.keys.dtype != torch.int8:
            rows = rows.to(state.keys.dtype)
        out = functional.lrea_absorbed_attention(
            rows.unsqueeze(1).expand(-1, self.num_heads, -1),
            state.keys,
            state.values,
            slots,
            target_offsets,
            key_scales=state.key_scales,
            value_scales=state.value_scales,
            negative_slope=self.absorbed_negative_slope,
            impl=self.impl,
        )
        return self._reshape_like(targets, out).to(targets.dtype)

    @torch.no_grad()
    def truncated(self, rank: int) -> "LREA":
        """A module of a smaller rank: the best approximation of W_comp W_decomp in the Frobenius norm (truncated SVD).

        The factors are U√Σ and √Σ Vᵀ, with signs such that no row of W_decomp has a negative sum. All but the first row
        have negative entries, so with orientation="scores" a module trained at that rank serves better than a truncated
        one.

        Raises:
            ValueError: a rank out of range; weights that are not finite.
        """
        expect(isinstance(rank, int) and 0 < rank <= self.rank, "rank", f"between 1 and {self.rank}", rank)
        finite = are_finite(self.w_comp, self.w_decomp)
        expect(finite, "w_comp and w_decomp", "finite to be truncated", "NaN or infinite entries")
        options = {"target_dim": self.target_dim, "head_dim": self.head_dim, "impl": self.impl}
        options |= {"negative_slope": self.negative_slope, "orientation": self.orientation}
        options |= {"device": self.w_comp.device, "dtype": self.w_comp.dtype}
        smaller = LREA(self.embed_dim, self.max_len, rank, self.num_heads, **options)
        for name in ("w_q", "w_k", "w_v"):
            getattr(smaller, name).copy_(getattr(self, name))
        # SVD of the product [max_len, max_len] by two QR factorizations and an SVD of [rank, rank].
        dtype = torch.promote_types(self.w_comp.dtype, torch.float32)
        q_comp, r_comp = torch.linalg.qr(self.w_comp.to(dtype))
        q_decomp, r_decomp = torch.linalg.qr(self.w_decomp.to(dtype).T)
        u, sigma, vt = torch.linalg.svd(r_comp @ r_decomp.T, full_matrices=False)
        w_comp, w_decomp = q_comp @ u * sigma.sqrt(), sigma.sqrt()[:, None] * (vt @ q_decomp.T)
        signs = torch.where(w_decomp.sum(1) < 0, -1.0, 1.0).to(dtype)
        smaller.w_comp.copy_((w_comp * signs)[:, :rank])
        smaller.w_decomp.copy_((signs[:, None] * w_decomp)[:rank])
        return smaller

    @accepts_nested("behaviors", ragged_axis=1)
    @torch.no_grad()
    def fidelity(
        self,
        targets: Tensor,
        behaviors: Tensor,
        target_offsets: Tensor | None = None,
        *,
        seq_lens: Tensor | None = None,
        ranks: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        score: Score | None = None,
        rare: Tensor | None = None,
        probes: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> list[Fidelity]:
        """Compare the absorbed form with the restored one on these users, for each rank ρ.

        h_ρ are the restored and ĥ_ρ the absorbed outputs, of this module for ρ = r and else of `truncated(ρ)`:

            relative_error    ‖ĥ_ρ − h_ρ‖ / ‖h_ρ‖, over all targets
            truncation_error  ‖h_ρ − h_r‖ / ‖h_r‖, the error of the smaller rank itself; 0 for r
            rank_correlation  Spearman's correlation of score(ĥ_ρ, targets) and score(h_ρ, targets) over the candidates
                              of a user, ties at their mean rank; the mean over users with two or more candidates. A
                              user whose restored scores are all equal is left out; one whose absorbed scores are all
                              equal, but not the restored ones, counts as 0
            rare_loss         1 − Σ ŝ_i s_i / Σ s_i² over users: the share of the score of a rare behaviour i that is
                              lost by compression, by least squares. s_l = (p W_Q)·(e_l W_K) are the scores of a probe
                              target p for all behaviours, ŝ_l those for the restored behaviours, each list scaled to
                              norm 1
            common_loss       the same for the behaviour most similar (cosine) to the mean of its history

        A loss of 0 keeps the score, 1 loses all of it, above 1 flips its sign, below 0 enlarges it. The lists are
        scaled because nothing keeps W_comp W_decomp at the scale of the identity. Squares are summed over all users
        because the share of a score near 0 is meaningless. Products are summed over heads. Users without behaviours are
        left out.

        A figure is NaN if no user counts for it, or if NaN or infinity enters it from any user. Exception: if h is
        finite and ĥ overflowed (in float16, for example), relative_error is inf.

        Args:
            targets, behaviors, target_offsets, seq_lens, cu_seqlens, max_seqlen: as in `forward`. The targets are the
                candidates. Packed behaviors are padded here.
            ranks: ranks to compare, each at most r; only r by default.
            dtype: dtype of the states, as in `export_state`, to measure bfloat16 or int8 states.
            score: the rest of a model: maps outputs [T, H·D] and targets [T, target_dim] to scores [T]. By default
                h·(e_t W_Q), the component of h along the query.
            rare: [U] integer, the behaviour i of each user (0 for a user without behaviours); by default the behaviour
                least similar (cosine) to the mean of its history.
            probes: p [U, target_dim]; by default behaviour i itself, which needs target_dim = embed_dim: otherwise both
                losses are NaN.

        Raises:
            ValueError: as in `forward` and `export_state`; ranks out of range; `rare` outside the history.
        """
        sizes = {"rank": self.rank, "embed_dim": self.embed_dim, "target_dim": self.target_dim}
        expect_tensors(targets=targets)
        self._expect_behaviors(behaviors, cu_seqlens)
        if cu_seqlens is not None:
            expect(seq_lens is None, "seq_lens", "None beside cu_seqlens (packed sequences have no padding)", "both")
            seq_lens = checked_offsets("cu_seqlens", cu_seqlens, len(behaviors)).diff()
            behaviors = nn.utils.rnn.pad_sequence(list(behaviors.split(seq_lens.tolist())), batch_first=True)
        expect_shape(sizes, "behaviors", behaviors, "U L embed_dim")
        expect(sizes["L"] > 0, "L of behaviors", "at least 1", 0)
        rows, target_offsets = self._pack_targets(targets, target_offsets, sizes["U"])
        if probes is not None:
            expect_tensors(probes=probes)
            expect_shape(sizes, "probes", probes, "U target_dim")
        return measure_fidelity(
            self,
            rows,
            behaviors,
            target_offsets,
            seq_lens,
            lengths=self._lengths(sizes["U"], sizes["L"], seq_lens, behaviors.device),
            ranks=[self.rank] if ranks is None else ranks,
            dtype=dtype,
            score=score or self._along_query,
            rare=rare,
            probes=probes,
        )

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, max_len={self.max_len}, rank={self.rank}, num_heads={self.num_heads}, "
            f"target_dim={self.target_dim}, head_dim={self.head_dim}, negative_slope={self.negative_slope}, "
            f"orientation={self.orientation!r}"
        )

    def _expect_behaviors(self, behaviors: Tensor, cu_seqlens: Tensor | None, item_ids: Tensor | None = None) -> None:
        expect_tensors(behaviors=behaviors)
        layout = "U L embed_dim" if cu_seqlens is None else "T embed_dim"
        layout = layout if item_ids is None else "I embed_dim"
        expect_shape({"embed_dim": self.embed_dim}, "behaviors", behaviors, layout)
        if cu_seqlens is not None:
            expect_index({}, "cu_seqlens", cu_seqlens, "U+1")

    def _pack_targets(self, targets: Tensor, target_offsets: Tensor | None, users: int) -> tuple[Tensor, Tensor]:
        """Targets in any of their shapes as [T, target_dim], with offsets."""
        sizes = {"U": users, "target_dim": self.target_dim}
        if target_offsets is not None:
            expect_shape(sizes, "targets", targets, "T target_dim")
            return targets, target_offsets
        expect_shape(sizes, "targets", targets, "U n target_dim" if targets.dim() == 3 else "U target_dim")
        n = targets.shape[1] if targets.dim() == 3 else 1
        return targets.flatten(0, -2), n * torch.arange(users + 1, device=targets.device)

    def _reshape_like(self, targets: Tensor, out: Tensor) -> Tensor:
        """[T, H, D] -> heads concatenated, in the shape of the targets."""
        return out.reshape(*targets.shape[:-1], self.num_heads * self.head_dim)

    def _split_heads(self, x: Tensor) -> Tensor:
        """[..., n, H·D] -> [..., H, n, D]"""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _make_state(self, compressed: Tensor, lengths: Tensor, dtype: torch.dtype) -> LREAState:
        """The state of C: computed in the dtype of C and rounded once."""
        with without_autocast(compressed):
            weights = (self.w_q, self.w_k, self.w_v, self.w_decomp)
            w_q, w_k, w_v, w_decomp = (weight.to(compressed.dtype) for weight in weights)
            keys, values = functional.lrea_absorb(
                self._split_heads(compressed @ w_k) @ self._split_heads(w_q).mT,  # [U, H, r, target_dim]
                self._split_heads(compressed @ w_v),
                w_decomp,
                seq_lens=lengths,
                scale=self.head_dim**-0.5,
                orientation=self.orientation,
                negative_slope=self.negative_slope,
            )
        if dtype != torch.int8:
            return LREAState(keys.to(dtype), values.to(dtype), None, None, compressed, lengths)
        (keys, key_scales), (values, value_scales) = functional.lrea_quantize(keys), functional.lrea_quantize(values)
        return LREAState(keys, values, key_scales, value_scales, compressed, lengths)

    @staticmethod
    def _lengths(users: int, length: int, seq_lens: Tensor | None, device: torch.device) -> Tensor:
        return torch.full((users,), length, device=device) if seq_lens is None else seq_lens.long()

    def _along_query(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * (targets @ self.w_q)).sum(-1)

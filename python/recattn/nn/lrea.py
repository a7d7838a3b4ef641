"""Target attention over a long history compressed to rank r (LREA, arXiv 2503.02542), and the state it is served by."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recattn._check import (
    FLOATING,
    checked_lengths,
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
from recattn.functional import (
    lrea_absorb,
    lrea_absorbed_attention,
    lrea_attention,
    lrea_compress,
    lrea_nonnegativity_loss,
    lrea_quantize,
)
from recattn.functional._autocast import autocast_inputs, without_autocast
from recattn.nn.lrea_fidelity import Fidelity, Score, are_finite, measure_fidelity


class LREAState(NamedTuple):
    """What is kept of each user. `keys`, `values` and an int8 state's scales are served; the rest `append` needs."""

    keys: Tensor  # [U, H, r, target_dim], W_Q and the scale folded in
    values: Tensor  # [U, H, r, head_dim], W_decomp W_decompᵀ folded in
    key_scales: Tensor | None  # [U, H, r] float32, of int8 keys
    value_scales: Tensor | None  # [U, H, r] float32, of int8 values
    compressed: Tensor  # C [U, r, embed_dim], float32 (float64 of a float64 module)
    lengths: Tensor  # [U] int64


class LREA(nn.Module):
    """Target attention over a history that is compressed to r rows and restored, or served from r rows alone:

        C = W_compᵀ E                                  E [L, embed_dim] the behaviours, oldest first
        K, V = heads of C W_K, C W_V        q = heads of e_t W_Q
        h = φ(q (W_decompᵀ K)ᵀ/√D) (W_decompᵀ V)       restored (`forward`), concatenated over the heads
        h ≈ φ(e_t keysᵀ) values                        absorbed (`attend`)
        keys = K W_Qᵀ/√D,   values = W_decomp W_decompᵀ V             (`export_state`; W the columns of the history)

    φ is a leaky ReLU; there is no softmax and, as they would not factor, no biases. Train with `forward` and add
    `loss`, which draws W_decomp and C towards where the two forms agree; W_Q and W_K stay free, so that is no promise.
    Serve with `attend`, and let `fidelity` tell what that costs. See `recattn.lrea_absorb` for the two orientations,
    and for what of this is our reading of LREA.

    Args:
        embed_dim: of a behaviour.
        max_len: the most behaviours of a history, the rows of `w_comp` [max_len, rank] and the columns of `w_decomp`
            [rank, max_len]: positions, counted from the oldest.
        rank: r, at most max_len.
        num_heads: H. `w_q` is [target_dim, H·D], `w_k` and `w_v` are [embed_dim, H·D].
        target_dim: of a target, embed_dim by default.
        head_dim: D, embed_dim / H by default.
        negative_slope: of φ.
        orientation: "scores" or "weights", of the absorbed form.
        impl: as of the functions; None chooses, "reference" insists.
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
        orientation: str = "scores",
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_choice("orientation", orientation, ("scores", "weights"))
        expect_numbers(negative_slope=negative_slope)
        expect(embed_dim > 0, "embed_dim", "at least 1", embed_dim)
        expect(max_len > 0, "max_len", "at least 1", max_len)
        expect(0 < rank <= max_len, "rank", f"between 1 and max_len, {max_len}", rank)
        expect(num_heads > 0, "num_heads", "at least 1", num_heads)
        if head_dim is None:
            multiple = f"a multiple of {num_heads} heads where head_dim is not given"
            expect(embed_dim % num_heads == 0, "embed_dim", multiple, embed_dim)
            head_dim = embed_dim // num_heads
        target_dim = embed_dim if target_dim is None else target_dim
        expect(head_dim > 0, "head_dim", "at least 1", head_dim)
        expect(target_dim > 0, "target_dim", "at least 1", target_dim)
        self.embed_dim, self.max_len, self.rank, self.num_heads = embed_dim, max_len, rank, num_heads
        self.target_dim, self.head_dim = target_dim, head_dim
        self.negative_slope, self.orientation, self.impl = negative_slope, orientation, impl

        options = {"device": device, "dtype": dtype}
        self.w_comp = nn.Parameter(torch.empty(max_len, rank, **options))
        self.w_decomp = nn.Parameter(torch.empty(rank, max_len, **options))
        self.w_q = nn.Parameter(torch.empty(target_dim, num_heads * head_dim, **options))
        self.w_k = nn.Parameter(torch.empty(embed_dim, num_heads * head_dim, **options))
        self.w_v = nn.Parameter(torch.empty(embed_dim, num_heads * head_dim, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_comp and W_decomp start uniform from 0, where the first term of `loss` is 0 and φ factors best.

        Up to √(3/(r·max_len)): each restored behaviour starts as about 3/4 of the mean of max_len behaviours. Where
        these are independent, φ(q K̂ᵀ/√D) V̂, a sum over them, then has about the size of one, whatever max_len and r
        are; where they share a mean, it grows with their number. Both are of one size, since an optimiser such as Adam
        takes steps of one size in both.
        """
        for weight in (self.w_comp, self.w_decomp):
            nn.init.uniform_(weight, 0, math.sqrt(3 / (self.rank * self.max_len)))
        for weight in (self.w_q, self.w_k, self.w_v):
            nn.init.xavier_uniform_(weight)

    def compress(self, behaviors: Tensor, seq_lens: Tensor | None = None) -> Tensor:
        """C = W_compᵀ E: [U, r, embed_dim] of behaviors [U, L, embed_dim], over the first seq_lens[u] of user u.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit, among them L > max_len; on a CPU also lengths out of
                range.
        """
        expect_tensors(behaviors=behaviors)
        expect_shape({"embed_dim": self.embed_dim}, "behaviors", behaviors, "U L embed_dim")
        return lrea_compress(*autocast_inputs(behaviors, self.w_comp), seq_lens, impl=self.impl)

    def forward(
        self,
        targets: Tensor,
        behaviors: Tensor | None,
        target_offsets: Tensor | None = None,
        *,
        seq_lens: Tensor | None = None,
        compressed: Tensor | None = None,
    ) -> Tensor:
        """The restored form, h = φ(q (W_decompᵀ K)ᵀ/√D) (W_decompᵀ V), differentiable in all it takes.

        Args:
            targets: e_t [T, target_dim] with target_offsets; without, [U, target_dim], one a user, or
                [U, n, target_dim]. In the dtype of the parameters, or autocast's.
            behaviors: E [U, L, embed_dim], L ≤ max_len, the oldest first.
            target_offsets: [U + 1] integer, from 0 to T, never descending; user u owns the rows between two of them.
            seq_lens: [U] integer, how many behaviours of each user count; the rest is padding. L by default.
            compressed: C [U, r, embed_dim] where `compress` was called already. `behaviors` may then be None; the
                histories are of seq_lens, by default of max_len.

        Returns:
            [T, H·D], [U, H·D] or [U, n, H·D]; zeros for a user without behaviours.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; on a CPU also offsets and lengths out of range.
        """
        expect(behaviors is not None or compressed is not None, "behaviors", "given where compressed is not", None)
        if compressed is None:
            compressed = self.compress(behaviors, seq_lens)
        # With lengths no column beyond them is read, and a slice would fix L in a compiled graph.
        cut = behaviors is not None and seq_lens is None
        w_decomp = self.w_decomp[:, : behaviors.shape[1]] if cut else self.w_decomp
        expect_tensors(targets=targets, compressed=compressed)
        sizes = {"rank": self.rank, "embed_dim": self.embed_dim}
        expect_shape(sizes, "compressed", compressed, "U rank embed_dim")
        rows, target_offsets = self._packed(targets, target_offsets, sizes["U"])
        tensors = autocast_inputs(rows, compressed, w_decomp, self.w_q, self.w_k, self.w_v)
        rows, compressed, w_decomp, w_q, w_k, w_v = tensors
        expect_same_dtype("the parameters", w_q, targets=rows, compressed=compressed)
        expect_same_device("the parameters", w_q, targets=rows, compressed=compressed)
        out = lrea_attention(
            (rows @ w_q).unflatten(-1, (self.num_heads, self.head_dim)),
            self._heads(compressed @ w_k),
            self._heads(compressed @ w_v),
            w_decomp,
            target_offsets,
            seq_lens=seq_lens,
            negative_slope=self.negative_slope,
            impl=self.impl,
        )
        return self._shaped_like(targets, out)

    def loss(self, compressed: Tensor) -> Tensor:
        """‖max(0, −W_decomp)‖² + ‖max(0, −C)‖², C [U, r, embed_dim] of `compress`: a scalar, summed over the users."""
        expect_tensors(compressed=compressed)
        return lrea_nonnegativity_loss(self.w_decomp, compressed.to(self.w_decomp.dtype))

    @torch.no_grad()
    def export_state(
        self,
        behaviors: Tensor,
        seq_lens: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        item_ids: Tensor | None = None,
    ) -> LREAState:
        """The state of each user, from which `attend` serves and to which `append` adds behaviours:

            keys = K W_Qᵀ/√D        values = G_u V        G_u as of `recattn.lrea_absorb`, over the user's own columns

        `keys` and `values` take H·r·(target_dim + D) entries a user. `compressed` and `lengths`, 4·r·embed_dim + 8
        bytes, are the master copy that `append` needs and serving does not: keep it elsewhere, or not at all.

        Args:
            behaviors: E [U, L, embed_dim], the oldest first; with `item_ids` an embedding table [I, embed_dim].
            seq_lens: [U] integer, how many behaviours of each user count. L by default.
            dtype: of keys and values: bfloat16, float16, float32, float64, or int8 with a scale a row
                (`recattn.lrea_quantize`); the parameters' by default.
            item_ids: [U, L] integer, the rows of the table; at padding any number may stand.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; on a CPU also lengths and item ids out of range.
        """
        dtype = self.w_comp.dtype if dtype is None else dtype
        choices = (*FLOATING, torch.int8)
        expect(dtype in choices, "dtype", " or ".join(str(choice) for choice in choices), dtype)
        expect_tensors(behaviors=behaviors)
        layout = "U L embed_dim" if item_ids is None else "I embed_dim"
        expect_shape({"embed_dim": self.embed_dim}, "behaviors", behaviors, layout)
        with without_autocast(behaviors):  # a state has the precision that it is exported in
            compressed = lrea_compress(behaviors, self.w_comp, seq_lens, item_ids=item_ids, impl=self.impl)
        compressed = compressed.to(torch.promote_types(compressed.dtype, torch.float32))
        users, length, *_ = behaviors.shape if item_ids is None else item_ids.shape
        return self._state(compressed, self._lengths(users, length, seq_lens, behaviors.device), dtype)

    @torch.no_grad()
    def append(self, state: LREAState, behavior: Tensor) -> LREAState:
        """The state after one more behaviour of each user, a rank-one update: C + w_comp[length] ⊗ e, length + 1.

        Equal to `export_state` of the longer history to rounding, however many are appended: keys and values are made
        from C anew, in time O(H·r·D·(embed_dim + target_dim)) a user, beside O(r²·max_len) a call for W_decomp
        W_decompᵀ. The histories are not read.

        Args:
            state: of this module, its users those of `behavior`; its rows may be selected from a larger one.
            behavior: e [U, embed_dim], the newest of each user.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; lengths out of range, or a history that has max_len
                behaviours already (this reads `lengths`, a synchronisation on a GPU).
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
        return self._state(compressed, lengths + 1, state.keys.dtype)

    def attend(
        self,
        targets: Tensor,
        state: LREAState,
        slots: Tensor | None = None,
        target_offsets: Tensor | None = None,
    ) -> Tensor:
        """The absorbed form, h = φ(e_t keys[s]ᵀ) values[s] with s = slots[u], in O(r) a target.

        Args:
            targets: e_t [T, target_dim] with target_offsets; without, [U, target_dim] or [U, n, target_dim].
            state: of `export_state` or `append`. Targets are cast to the dtype of its keys, but beside int8.
            slots: [U] integer, the row of each user in the state; by default its users in their order.
            target_offsets: [U + 1] integer, as of `forward`.

        Returns:
            [T, H·D], [U, H·D] or [U, n, H·D] in targets' dtype.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; on a CPU also slots and offsets out of range.
        """
        expect_tensors(targets=targets)
        if slots is None:
            slots = torch.arange(len(state.keys), device=targets.device)
        expect_tensors(slots=slots)
        sizes = {"H": self.num_heads, "target_dim": self.target_dim, "head_dim": self.head_dim}
        expect_shape(sizes, "state.keys", state.keys, "S H r target_dim")
        expect_shape(sizes, "state.values", state.values, "S H r head_dim")
        expect_shape(sizes, "slots", slots, "U")
        rows, target_offsets = self._packed(targets, target_offsets, sizes["U"])
        if state.keys.dtype != torch.int8:
            rows = rows.to(state.keys.dtype)
        out = lrea_absorbed_attention(
            rows.unsqueeze(1).expand(-1, self.num_heads, -1),
            state.keys,
            state.values,
            slots,
            target_offsets,
            key_scales=state.key_scales,
            value_scales=state.value_scales,
            # "weights" has φ on W_decomp, inside the values.
            negative_slope=1.0 if self.orientation == "weights" else self.negative_slope,
            impl=self.impl,
        )
        return self._shaped_like(targets, out).to(targets.dtype)

    @torch.no_grad()
    def truncated(self, rank: int) -> "LREA":
        """A module of a smaller rank whose W_comp W_decomp is the nearest to this one's (truncated SVD, Frobenius).

        No other of that rank loses less of this map of max_len behaviours onto their restored ones. The factors are
        U√Σ and √Σ Vᵀ, each pair signed so that its row of W_decomp has no negative sum; beyond the first they are not
        non-negative, so orientation="scores" serves them worse than what was trained at that rank.

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
        # The product is [max_len, max_len]: its SVD through that of the small middle of two QR factorisations.
        dtype = torch.promote_types(self.w_comp.dtype, torch.float32)
        left, left_triangle = torch.linalg.qr(self.w_comp.to(dtype))
        right, right_triangle = torch.linalg.qr(self.w_decomp.to(dtype).T)
        u, sigma, vt = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
        w_comp, w_decomp = left @ u * sigma.sqrt(), sigma.sqrt()[:, None] * (vt @ right.T)
        signs = torch.where(w_decomp.sum(1) < 0, -1.0, 1.0).to(dtype)
        smaller.w_comp.copy_((w_comp * signs)[:, :rank])
        smaller.w_decomp.copy_((signs[:, None] * w_decomp)[:rank])
        return smaller

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
    ) -> list[Fidelity]:
        """How well the absorbed form agrees with the restored one on these users, for each rank, with
        h_ρ the restored and ĥ_ρ the absorbed outputs of the module (ρ = r) or of `truncated(ρ)`:

            relative_error    ‖ĥ_ρ − h_ρ‖ / ‖h_ρ‖, over all targets
            truncation_error  ‖h_ρ − h_r‖ / ‖h_r‖: what the smaller rank itself loses; 0 for r
            rank_correlation  Spearman's ρ of score(ĥ_ρ, targets) and score(h_ρ, targets) over the candidates of a user,
                              ties at their mean rank; the mean over users of at least two candidates. A user whose
                              restored scores are all equal has no ranking and does not count; one whose absorbed scores
                              alone are all equal counts 0
            rare_loss         1 − Σ ŝ_i s_i / Σ s_i² over users: the share of the score of a rare behaviour i that its
                              restoration loses, by least squares. s_l = (p W_Q)·(e_l W_K) are a probe target's scores
                              of all behaviours, ŝ_l those of the restored ones, each list scaled to length 1
            common_loss       the same of the behaviour most like the mean of its history (cosine)

        A loss of 0 keeps the score, 1 leaves nothing, above 1 turns its sign, below 0 enlarges it. Scaled to length 1
        since nothing holds W_comp W_decomp to the scale of the identity; pooled by squares, for a share of a score near
        0 says nothing. Products are summed over the heads. A user without behaviours does not count.

        A figure that nothing counts for is NaN. So is one that anything NaN or infinite goes into, of whatever user;
        only where finite outputs h meet a ĥ that overflowed (in float16, say) relative_error is inf.

        Args:
            targets, behaviors, target_offsets, seq_lens: as of `forward`. The targets are the candidates.
            ranks: at most r; r alone by default.
            dtype: of the states, as of `export_state`: how a bfloat16 or int8 state agrees.
            score: maps outputs [T, H·D] and targets [T, target_dim] to scores [T], the rest of a model; by default
                h·(e_t W_Q), how far what was found lies along the query.
            rare: [U] integer, i of each user (0 of one without behaviours); by default the behaviour least like the
                mean of its history (cosine).
            probes: p [U, target_dim]; by default behaviour i itself, which takes target_dim = embed_dim: otherwise both
                losses are NaN.

        Raises:
            ValueError: as of `forward` and `export_state`; ranks out of range; `rare` outside the history.
        """
        sizes = {"rank": self.rank, "embed_dim": self.embed_dim, "target_dim": self.target_dim}
        expect_tensors(targets=targets, behaviors=behaviors)
        expect_shape(sizes, "behaviors", behaviors, "U L embed_dim")
        expect(sizes["L"] > 0, "L of behaviors", "at least 1", 0)
        rows, target_offsets = self._packed(targets, target_offsets, sizes["U"])
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

    def _packed(self, targets: Tensor, target_offsets: Tensor | None, users: int) -> tuple[Tensor, Tensor]:
        """[T, target_dim] and the offsets, of targets in any of their forms."""
        sizes = {"U": users, "target_dim": self.target_dim}
        if target_offsets is not None:
            expect_shape(sizes, "targets", targets, "T target_dim")
            return targets, target_offsets
        expect_shape(sizes, "targets", targets, "U n target_dim" if targets.dim() == 3 else "U target_dim")
        n = targets.shape[1] if targets.dim() == 3 else 1
        return targets.flatten(0, -2), n * torch.arange(users + 1, device=targets.device)

    def _shaped_like(self, targets: Tensor, out: Tensor) -> Tensor:
        """[T, H, D], the heads side by side, in the form of the targets."""
        return out.reshape(*targets.shape[:-1], self.num_heads * self.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        """[..., n, H·D] -> [..., H, n, D]"""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _state(self, compressed: Tensor, lengths: Tensor, dtype: torch.dtype) -> LREAState:
        """The absorbed C: computed in C's dtype and rounded once."""
        with without_autocast(compressed):
            weights = (self.w_q, self.w_k, self.w_v, self.w_decomp)
            w_q, w_k, w_v, w_decomp = (weight.to(compressed.dtype) for weight in weights)
            keys, values = lrea_absorb(
                self._heads(compressed @ w_k) @ self._heads(w_q).mT,  # [U, H, r, target_dim]
                self._heads(compressed @ w_v),
                w_decomp,
                seq_lens=lengths,
                scale=self.head_dim**-0.5,
                orientation=self.orientation,
                negative_slope=self.negative_slope,
            )
        if dtype != torch.int8:
            return LREAState(keys.to(dtype), values.to(dtype), None, None, compressed, lengths)
        (keys, key_scales), (values, value_scales) = lrea_quantize(keys), lrea_quantize(values)
        return LREAState(keys, values, key_scales, value_scales, compressed, lengths)

    @staticmethod
    def _lengths(users: int, length: int, seq_lens: Tensor | None, device: torch.device) -> Tensor:
        return torch.full((users,), length, device=device) if seq_lens is None else seq_lens.long()

    def _along_query(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * (targets @ self.w_q)).sum(-1)

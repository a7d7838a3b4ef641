"""Changes of a call that change no result, or change it in a known way."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.calls import Call
from tests.fuzz.draws import WAYS
from tests.fuzz.runs import incoming_of, run, using
from tests.helpers.strategies import seeds

BY_USER = ("seq_lens", "seq_starts", "sink_positions", "sink_mask", "slots")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def assert_same_bits(call: Call, actual: Tensor, expected: Tensor, name: str) -> None:
    if rounds_by_sizes(call, name):
        return close(call, {name: actual}, {name: expected})
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{name} differs by {far(actual, expected)}"


def rounds_by_sizes(call: Call, name: str = "") -> bool:
    """Whether its products are PyTorch's, or have rows of many users and are NumPy's, as the interpreter's are, or its
    sums, or the one of this name, are of blocks of sequences or heads, as large as the batch allows, or W_q W_kᵀ is one
    product where no sequence of the batch is longer than it has columns.
    """
    if call.operator == "sink_attention":
        return call.impl == "cpu" and (call.sequences.n > 128 or "inter_sink_bias" in name)
    if call.operator != "refined_attention":
        tiled = call.impl == "triton" and call.operator in ("lrea_attention", "wasserstein_attention")
        return call.operator == "lrea_absorb" or tiled
    shortest, longest = min(call.sequences.lengths, default=0), call.sequences.n
    folds_or_not = shortest <= call.recipes["w_q"].shape[-1] < longest or longest > 256
    return call.impl != "cpu" or call.dtype == torch.float64 or (folds_or_not and not between_gaussians(call))


def between_gaussians(call: Call) -> bool:
    return call.operator == "wasserstein_attention" or call.options.get("mechanism") == "stochastic"


def far(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item()


def is_packed(call: Call) -> bool:
    return call.sequences is not None and call.sequences.how == "packed"


# --- Any users make a batch ---


def segments(x: Tensor, lengths: Sequence[int], users: Sequence[int]) -> Tensor:
    parts = x.split(list(lengths))
    return torch.cat([parts[user] for user in users]) if users else x[:0]


def take(call: Call, name: str, x: Tensor, users: Sequence[int]) -> Tensor:
    """The rows of a tensor that are those of `users`."""
    if name == "target_offsets":
        return torch.tensor([0, *itertools.accumulate(call.counts[user] for user in users)])
    if name == "cu_seqlens":
        return torch.tensor([0, *itertools.accumulate(call.sequences.lengths[user] for user in users)])
    if name == "targets" or (name == "item_ids" and call.counts):
        return segments(x, call.counts, users)
    if is_packed(call) and (name == "item_ids" or (name in call.own and name != "inter_sink_bias")):
        return segments(x, call.sequences.lengths, users)
    return x[list(users)] if name in call.own or name in BY_USER or name == "item_ids" else x


def take_out(call: Call, x: Tensor, users: Sequence[int]) -> Tensor:
    if call.counts:
        return segments(x, call.counts, users)
    if is_packed(call) and call.operator != "lrea_compress":
        return segments(x, call.sequences.lengths, users)
    return x[list(users)]


def users_in(call: Call) -> int:
    if call.sequences is not None:
        return len(call.sequences.lengths)
    return len(call.counts) or (call.recipes[call.own[0]].shape[0] if call.own else 0)


def any_users_make_a_batch(data: st.DataObject, call: Call) -> None:
    """Each user has the same bits in any batch: in another order, beside others, twice or alone."""
    count = users_in(call)
    assume(count > 0)
    users = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
    by_item = call.counts and "item_ids" in call.options
    tensors = call.inputs(data.draw(seeds))

    def taken(named: dict) -> dict:
        whole = ("targets",) if by_item else ()  # a table of items
        return {
            name: take(call, name, x, users) if isinstance(x, Tensor) and name not in whole else x
            for name, x in named.items()
        }

    outs, gradients = run(call, tensors, call.options)
    incoming = [take_out(call, x, users) for x in incoming_of(outs)]
    outs_taken, gradients_taken = run(call, taken(tensors), taken(call.options), incoming)
    for i, (actual, expected) in enumerate(zip(outs_taken, outs, strict=True)):
        assert_same_bits(call, actual, take_out(call, expected, users), f"output {i} of users {users}")
    for name in set(call.own) & gradients.keys():
        expected = take(call, name, gradients[name], users)
        assert_same_bits(call, gradients_taken[name], expected, f"the gradient of {name} of users {users}")


def heads_in_any_order(data: st.DataObject, call: Call) -> None:
    """Each head has the same bits in any order of the heads."""
    assume(call.heads)
    name, axis = next(iter(call.heads.items()))
    count = call.recipes[name].shape[axis]
    order = data.draw(st.permutations(range(count)))
    tensors = call.inputs(data.draw(seeds))

    def ordered(named: dict[str, Tensor]) -> dict[str, Tensor]:
        def of(name: str, x: Tensor) -> Tensor:
            axis = call.heads.get(name)
            return x if axis is None or x.shape[axis] != count else x.index_select(axis, torch.tensor(order))

        return {name: of(name, x) for name, x in named.items()}

    outs, gradients = run(call, tensors, call.options)
    has_heads = call.operator != "inter_sink_bias"  # that takes their mean
    incoming = [x[:, order] if has_heads else x for x in incoming_of(outs)]
    outs_ordered, gradients_ordered = run(call, ordered(tensors), call.options, incoming)
    if not has_heads:
        return close(call, {"output": outs_ordered[0], **gradients_ordered}, {"output": outs[0], **ordered(gradients)})
    for actual, expected in zip(outs_ordered, outs, strict=True):
        assert_same_bits(call, actual, expected[:, order], f"the output of heads {order}")
    for name, expected in ordered(gradients).items():
        if name in call.own and name in call.heads and call.recipes[name].shape[call.heads[name]] == count:
            assert_same_bits(call, gradients_ordered[name], expected, f"the gradient of {name} of heads {order}")


def some_inputs_need_gradients(data: st.DataObject, call: Call) -> None:
    """A gradient has the same bits whichever other inputs need one, and outputs where none does."""
    assume(call.differentiable)
    tensors = call.inputs(data.draw(seeds))
    wanted = sorted(data.draw(st.sets(st.sampled_from(sorted(tensors)))))
    outs, gradients = run(call, tensors, call.options)
    some_outs, some = run(call, tensors, call.options, wanted=wanted)
    for actual, expected in zip(some_outs, outs, strict=True):
        assert_same_bits(call, actual, expected, f"the output with gradients of {wanted}")
    for name in wanted:
        assert_same_bits(call, some[name], gradients[name], f"the gradient of {name} with those of {wanted}")


# --- Layouts of sequences ---


def plain(call: Call) -> Call:
    """The call with numbers of the order of 1, of which two ways to compute agree closely."""
    recipes = {}
    for name, how in call.recipes.items():
        # Of keys that are equal, or nearly so, sums cancel.
        layout = "contiguous" if how.layout in ("expanded", "overlapping") else how.layout
        size = how.size if 0.01 <= how.size <= 1 else 1.0
        recipes[name] = replace(how, kind="normal", size=size, layout=layout)
    return replace(call, recipes=recipes)


def close(call: Call, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        assume(call.dtype != torch.float16 or x.isfinite().all())  # float16 overflows
        largest = x.double().nan_to_num(0).abs().max().item() if x.numel() else 0.0
        off = far(actual[name], x) if x.numel() else 0.0
        assert off <= TOLERANCES[call.dtype] * max(largest, 1e-3), f"{name} differs by {off} of {largest}"


def to_packed(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, H, N, D] or [B, N, D] with right padding, packed [T, ...]."""
    rows = [y[..., :n, :].movedim(-2, 0) for y, n in zip(x, lengths, strict=True)]
    return torch.cat(rows) if rows else x.new_zeros(0, *x.movedim(-2, 1).shape[2:])


def padded_is_packed_is_nested(data: st.DataObject, call: Call) -> None:
    """Right-padded, left-padded, packed and nested sequences have the same outputs and gradients."""
    assume("item_ids" not in call.options)
    call = plain(call)
    where = call.sequences
    assume(where.lengths)
    lengths, tensors = where.lengths, call.inputs(data.draw(seeds))
    tokens = [name for name in call.own if name != "inter_sink_bias"]
    options = {name: x for name, x in call.options.items() if name not in ("seq_lens", "sink_positions")}
    if "sink_positions" in call.options:
        sinks = call.options["sink_positions"].long()
        # In padding they are ignored; packed they would be out of range.
        sinks = sinks.masked_fill(sinks >= torch.tensor(lengths)[:, None], -1)
        options["sink_positions"] = sinks
    outs, gradients = run(call, tensors, call.options)
    per_token = call.operator != "lrea_compress"  # whose output is of a user

    def pack_all(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: to_packed(x, lengths) if name in tokens else x for name, x in named.items()}

    incoming = [to_packed(x, lengths) if per_token else x for x in incoming_of(outs)]
    packed = {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])}
    packed_outs, packed_gradients = run(call, pack_all(tensors), options | packed, incoming)
    named = {f"packed output {i}": to_packed(x, lengths) if per_token else x for i, x in enumerate(outs)}
    close(call, dict(zip(named, packed_outs, strict=True)), named)
    close(call, packed_gradients, pack_all(gradients))

    def nest(x: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(x, packed["cu_seqlens"])
        return nested.transpose(1, 2) if x.dim() == 3 else nested

    leaves = {name: x.requires_grad_() for name, x in pack_all(tensors).items()}
    nested = {name: nest(x) if name in tokens else x for name, x in leaves.items()}
    nested_outs = using(call.function, [])(**nested, **options)
    values = [x.transpose(1, 2).values() if x.is_nested else x for x in nested_outs]
    for actual, expected in zip(values, packed_outs, strict=True):
        assert_same_bits(call, actual, expected, "the nested output")
    for name, gradient in zip(leaves, torch.autograd.grad(values, list(leaves.values()), incoming), strict=True):
        assert_same_bits(call, gradient, packed_gradients[name], f"the nested gradient of {name}")
    if call.operator in ("sink_attention", "wasserstein_attention") and "w_q" not in tensors:
        left_padded(call, tensors, options, outs, gradients)


def left_padded(call: Call, tensors, options, outs, gradients) -> None:
    lengths, n = call.sequences.lengths, call.sequences.n

    def moved(x: Tensor) -> Tensor:
        rows = [y.roll(n - length, -2) for y, length in zip(x, lengths, strict=True)]
        return torch.stack(rows)

    names = [name for name in call.own if name != "inter_sink_bias"]
    moved_tensors = {name: moved(x) if name in names else x for name, x in tensors.items()}
    options = dict(options, seq_lens=torch.tensor(lengths), padding_side="left")
    if "sink_positions" in options:
        sinks = options["sink_positions"]
        options["sink_positions"] = sinks.where(sinks < 0, sinks + (n - torch.tensor(lengths))[:, None])
    left_outs, left_gradients = run(call, moved_tensors, options, [moved(x) for x in incoming_of(outs)])
    named = {f"left output {i}": moved(x) for i, x in enumerate(outs)}
    close(call, dict(zip(named, left_outs, strict=True)), named)
    close(call, left_gradients, {name: moved(x) if name in names else x for name, x in gradients.items()})


def a_sequence_alone_is_as_in_a_batch(data: st.DataObject, call: Call) -> None:
    """A sequence alone, cut to its length, has the outputs and gradients that it has in a padded batch."""
    call = plain(call)
    tensors = call.inputs(data.draw(seeds))
    outs, gradients = run(call, tensors, call.options)
    for user, length in enumerate(call.sequences.lengths):
        own = {name: x[user : user + 1] if name in call.own else x for name, x in tensors.items()}
        own = {name: x[:, :, :length] if name in ("q", "k", "v") else x for name, x in own.items()}
        options = {name: x for name, x in call.options.items() if name != "seq_lens"}
        if "sink_positions" in options:
            sinks = options["sink_positions"][user : user + 1].long()
            options["sink_positions"] = sinks.masked_fill(sinks >= length, -1)
        alone, alone_gradients = run(call, own, options, [x[user : user + 1, :, :length] for x in incoming_of(outs)])
        close(call, {"output": alone[0]}, {"output": outs[0][user : user + 1, :, :length]})
        names = ("q", "k", "v")
        close(call, alone_gradients, {name: gradients[name][user : user + 1, :, :length] for name in names})


# --- Equations ---


SCALED: dict[str, dict[str, Callable[[float], float]]] = {
    "sink_attention": {"q": lambda s: s},
    "refined_attention": {"q": lambda s: s},
    "lrea_attention": {"targets": lambda s: s},
    "wasserstein_attention": {
        "mean_q": lambda s: s**0.5,
        "mean_k": lambda s: s**0.5,
        "cov_q": lambda s: s,
        "cov_k": lambda s: s,
    },
}


def scale_folds_into_queries(data: st.DataObject, call: Call) -> None:
    """scale = s is the same as queries times s, to the bit where s is a power of two (distances: four)."""
    call = plain(call)
    tensors = call.inputs(data.draw(seeds))
    scale = data.draw(st.sampled_from((4.0, 0.25, 16.0, 1.0)))
    factors = {name: factor(scale) for name, factor in SCALED[call.operator].items()}
    folded = {name: x * factors.get(name, 1.0) for name, x in tensors.items()}
    # Subnormal numbers lose digits.
    assume(all(torch.equal(folded[name] / by, tensors[name]) for name, by in factors.items() if name in tensors))
    outs, gradients = run(call, tensors, {**call.options, "scale": scale})
    folded_outs, folded_gradients = run(call, folded, {**call.options, "scale": 1.0})
    folded_gradients = {name: x * factors.get(name, 1.0) for name, x in folded_gradients.items()}
    close(call, dict(enumerate(folded_outs)), dict(enumerate(outs)))
    close(call, folded_gradients, gradients)


def a_shift_of_all_biases_changes_nothing(data: st.DataObject, call: Call) -> None:
    """Where every token is a sink, the same number added to every bias leaves the softmax as it was."""
    assume("sink_logits" not in call.recipes)
    call = plain(call)
    tensors = call.inputs(data.draw(seeds))
    batch, n = len(call.sequences.lengths), call.sequences.n
    tensors["inter_sink_bias"] = torch.randn(batch, 1, n, n)
    options = {**call.options, "sink_positions": torch.arange(n).expand(batch, n)}
    outs, gradients = run(call, tensors, options)
    tensors["inter_sink_bias"] = tensors["inter_sink_bias"] + data.draw(st.sampled_from((1.0, -3.0, 20.0)))
    shifted_outs, shifted_gradients = run(call, tensors, options)
    close(call, dict(enumerate(shifted_outs)), dict(enumerate(outs)))
    close(call, shifted_gradients, gradients)


def gradients_are_of_the_weights_that_dropout_kept(data: st.DataObject, call: Call) -> None:
    """With one seed, outputs along a line change as the gradients say: forward and backward drop the same weights."""
    call = plain(call)
    recipes = {name: replace(how, dtype=torch.float32) for name, how in call.recipes.items()}
    tensors = replace(call, recipes=recipes).inputs(data.draw(seeds))
    # Padding may hold NaN and infinity.
    directions = {name: (x * torch.randn_like(x)).nan_to_num(0.0, 0.0, 0.0) for name, x in tensors.items()}
    options = {**call.options, "dropout_p": data.draw(st.sampled_from((0.5, 0.1, 0.9)))}
    seed, step = data.draw(seeds), 1e-3

    def at(moved: float) -> tuple[list[Tensor], dict[str, Tensor]]:
        torch.default_generator.manual_seed(seed)
        return run(call, {name: x + moved * directions[name] for name, x in tensors.items()}, options)

    (ahead, _), (outs, gradients), (behind, _) = at(step), at(0.0), at(-step)
    changes = [(a.double() - b.double()) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    change = sum(((x * dout).sum().item() for x, dout in zip(changes, incoming_of(outs), strict=True)), 0.0)
    parts = torch.cat([(gradients[name].double() * x).flatten() for name, x in directions.items()])
    expected, size = parts.sum().item(), parts.norm().item()
    assert abs(change - expected) <= 0.02 * size + 1e-3, f"outputs change by {change}, gradients say {expected}"


ATTENTION = ("sink_attention", "refined_attention", "wasserstein_attention")
WITH_HEADS = (*ATTENTION, "inter_sink_bias", "lrea_attention", "lrea_absorb")
# Of which operators, and how their sequences lie.
CHANGES: dict[Callable, tuple[tuple[str, ...], tuple[str, ...]]] = {
    any_users_make_a_batch: ((*WITH_HEADS, "lrea_compress", "lrea_absorbed_attention"), WAYS),
    heads_in_any_order: (WITH_HEADS, WAYS),
    some_inputs_need_gradients: ((*WITH_HEADS, "lrea_compress"), WAYS),
    padded_is_packed_is_nested: ((*ATTENTION, "lrea_compress"), ("right",)),
    a_sequence_alone_is_as_in_a_batch: (("sink_attention",), ("right",)),
    scale_folds_into_queries: (tuple(SCALED), WAYS),
    a_shift_of_all_biases_changes_nothing: (("sink_attention",), ("dense",)),
    gradients_are_of_the_weights_that_dropout_kept: ((*ATTENTION, "inter_sink_bias"), WAYS),
}
# What an implementation does not have.
UNSUPPORTED = {(impl, gradients_are_of_the_weights_that_dropout_kept) for impl in ("chunked", "correction:eager")}
UNSUPPORTED_WAYS = {"correction:eager": ("right", "left", "windows")}

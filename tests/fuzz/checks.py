"""What must hold of every call: the bound against float64, NaN and infinities, and what changes no result."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from recattn.testing import Error, Oracle
from tests.fuzz.calls import Call
from tests.fuzz.changes import TOLERANCES, between_gaussians, take, take_out, users_in
from tests.fuzz.draws import Recipe
from tests.fuzz.runs import run, using
from tests.helpers.strategies import seeds

# A value may be over its bound by the luck of one entry, for that of the reference is a part of the bound. So a call
# counts as wrong if it is so for each of these other draws of its numbers, or by this factor for one.
REDRAWS, FAR = 6, 50.0
# Where all keys or all values are equal, or one key has all the weight, gradients are sums that cancel, and the
# reference may err by nothing: they are held to the bound of other keys and values, of the same size, that are not
# equal, and of biases of ordinary size.
ONE_TAKES_ALL = ("inter_sink_bias", "sink_logits")
EQUAL_MAKE_CANCEL = ("k", "mean_k", "cov_k", "k_s", "v", "mean_v", "cov_v")
BAD = (math.nan, math.inf, -math.inf)
# Errors of products that underflow on the way, which depend on the order of the factors.
UNDERFLOW = {torch.float64: 1e-300, torch.float32: 1e-36, torch.bfloat16: 1e-36, torch.float16: 2.0**-23}


def matches_reference(data: st.DataObject, call: Call) -> None:
    """Outputs and gradients are within the project's bound of the reference in float64."""
    names = sorted(call.recipes) if call.differentiable else []
    wanted = sorted(data.draw(st.sets(st.sampled_from(names)))) if names else []
    layout = data.draw(st.sampled_from(("contiguous", "transposed", "unaligned", "every second")))
    seed = data.draw(seeds)

    def errors_of(seed: int) -> list[Error]:
        inputs = {**call.inputs(seed), **call.options}
        oracle = Oracle.of(using(call.reference, wanted, layout), inputs, grads=wanted, seed=seed)
        assume(has_bound(oracle))
        errors = oracle.errors(using(call.function, wanted, layout))
        if call.dtype == torch.float64:
            errors = bounded_by_float32(errors, oracle)
        if within(call, errors) or uncancelled(call) == call:
            return errors
        return bounded_by_uncancelled(call, errors, oracle)

    errors = errors_of(seed)
    if within(call, errors):
        return
    if not far_off(errors) and any(within(call, errors_of(seed + other)) for other in range(1, 1 + REDRAWS)):
        return
    raise AssertionError("\n".join(["error bound exceeded", *map(str, errors)]))


def has_bound(oracle: Oracle) -> bool:
    """Whether the reference is finite: in half precision it overflows where no kernel need do so, and where all do."""
    low, ref64 = oracle.draw
    return all(x.isfinite().all() and (ref64[name].abs() <= torch.finfo(x.dtype).max).all() for name, x in low.items())


def bounded_by_float32(errors: Sequence[Error], oracle: Oracle) -> list[Error]:
    """Errors of a float64 call, whose reference is float64 too: a millionth of the bound that float32 would have."""
    inputs = {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in oracle.inputs.items()
    }
    bounds = Oracle.of(oracle.reference, inputs, grads=oracle.grads, seed=oracle.seed).errors(oracle.reference)
    return [bounded_by(error, of32, 1e-6) for error, of32 in zip(errors, bounds, strict=True)]


def bounded_by(error: Error, other: Error, factor: float = 1.0) -> Error:
    """The error, with bounds of at least the other's times the factor."""
    max_bound, mean_bound = factor * other.max_bound, factor * other.mean_bound
    return replace(error, max_bound=max(error.max_bound, max_bound), mean_bound=max(error.mean_bound, mean_bound))


def uncancelled(call: Call) -> Call:
    """The call with keys and values that differ where they are equal, and biases that leave weight to several keys."""

    def changed(name: str, how: Recipe) -> Recipe:
        if name in EQUAL_MAKE_CANCEL and (how.kind in ("equal rows", "zeros") or how.layout == "expanded"):
            return replace(how, kind="normal", layout="contiguous")
        return replace(how, size=min(how.size, 1.0)) if name in ONE_TAKES_ALL else how

    return replace(call, recipes={name: changed(name, how) for name, how in call.recipes.items()})


def bounded_by_uncancelled(call: Call, errors: Sequence[Error], oracle: Oracle) -> list[Error]:
    """The errors, of which gradients' bounds are at least those of the call where nothing cancels."""
    inputs = {**uncancelled(call).inputs(oracle.seed), **call.options}
    oracle = Oracle.of(oracle.reference, inputs, grads=oracle.grads, seed=oracle.seed)
    others = oracle.errors(oracle.reference)
    if call.dtype == torch.float64:
        others = bounded_by_float32(others, oracle)
    return [
        error if error.name.startswith("output") else bounded_by(error, other)
        for error, other in zip(errors, others, strict=True)
    ]


def within(call: Call, errors: Sequence[Error]) -> bool:
    return all(error.passed or error.max <= UNDERFLOW[call.dtype] for error in errors)


def far_off(errors: Sequence[Error]) -> bool:
    return any(not error.share <= FAR for error in errors)


# --- NaN and infinity ---


def shows_and_stays(data: st.DataObject, call: Call) -> None:
    """NaN or infinity in one entry: rows that the reference leaves as they were keep their bits, the rest shows it.

    So do gradients of other users. Outputs that the reference changes only by 0 · NaN, those of earlier
    rows with causal, may keep their bits. A column of w_decomp, and by Triton a row of w_q, w_k and w_v, may reach all
    users, of which a tile has many.
    """
    names = sorted(name for name, how in call.recipes.items() if 0 not in how.shape)
    assume(names)
    name, value = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(BAD))
    tensors = {key: x.clone() for key, x in call.inputs(data.draw(seeds)).items()}
    entry = data.draw(st.integers(0, tensors[name].numel() - 1))
    of_all_users = name == "w_decomp" or (call.impl == "triton" and name in ("w_q", "w_k", "w_v"))

    def results_with(bad: float | None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        given = {key: x if dtype is None else x.to(dtype) for key, x in tensors.items()}
        if bad is not None:
            where = torch.unravel_index(torch.tensor(entry), given[name].shape)
            given[name] = given[name].index_put(where, torch.tensor(bad).to(given[name]))
        outs, gradients = run(call if dtype is None else replace(call, by_reference=True), given, call.options)
        return {f"output {i}": out for i, out in enumerate(outs)} | gradients

    clean, with_nan, dirty, moved = (results_with(bad, torch.float64) for bad in (None, math.nan, value, 0.7))
    ours_clean, ours = results_with(None), results_with(value)
    outs = [key for key in ours if key.startswith("output")]
    for key in outs:
        kept = close(clean[key], with_nan[key]).all(-1, keepdim=True)  # in a row, NaN may reach masked entries
        depends = ~close(clean[key], moved[key]) & ~dirty[key].isfinite()
        stayed = same(ours_clean[key], ours[key])
        if between_gaussians(call):  # from each key a mean of all is subtracted
            stayed = near(ours_clean[key], ours[key], TOLERANCES[call.dtype])
        changed = (kept & ~stayed).nonzero()
        assert of_all_users or not len(changed), f"{value} of {name} changes {key} at {changed[:3].tolist()}"
        hidden = (depends & ours[key].isfinite()).nonzero()
        if math.isnan(value):
            assert not len(hidden), f"{key} hides {value} of {name} at {hidden[:3].tolist()}"
        else:  # which entries are infinite, which NaN and which zero depends on the order of products
            assert not depends.any() or not ours[key].isfinite().all(), f"{key} hides {value} of {name}"
    for user in range(0 if of_all_users else users_in(call)):
        if not all(
            same(take_out(call, clean[key], [user]), take_out(call, with_nan[key], [user])).all() for key in outs
        ):
            continue
        for key in set(call.own) & ours.keys():
            reference = (take(call, key, results[key], [user]) for results in (clean, with_nan))
            own = (take(call, key, results[key], [user]) for results in (ours_clean, ours))
            unchanged = not same(*reference).all() or same(*own).all()
            assert unchanged, f"{value} of {name} changes the gradient of {key} of user {user}, whose outputs it leaves"


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def close(a: Tensor, b: Tensor) -> Tensor:
    """Equal but for the rounding of float64: the reference subtracts a mean of all keys also from rows before them."""
    return near(a, b, 1e-9)


def near(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    largest = a.nan_to_num(0, 0, 0).abs().max().item() if a.numel() else 0.0
    return torch.isclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)

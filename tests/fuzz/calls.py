"""Calls of every operator, as Hypothesis draws them."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import recattn
from recattn import reference
from recattn._extension import MISSING
from tests.fuzz.draws import (
    HALF,
    KINDS,
    WAYS,
    Recipe,
    Sequences,
    dims,
    indices,
    lengths,
    logit_sizes,
    recipe,
    sequences,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, *HALF
INTERPRETED = (F32, F16)  # Triton's interpreter computes bfloat16 wrongly


@dataclass
class Call:
    """One call but for its numbers, which `inputs` draws."""

    operator: str
    impl: str | None
    recipes: Mapping[str, Recipe]
    options: Mapping
    finish: Callable[[dict[str, Tensor]], object] = field(default=lambda tensors: None, repr=False)  # writes NaN, -inf
    sequences: Sequences | None = field(default=None, repr=False)
    # Of which each batch element, or user, has its own along the first axis
    own: tuple[str, ...] = field(default=(), repr=False)
    heads: Mapping[str, int] = field(default_factory=dict, repr=False)  # the axis of the heads, where there is one
    differentiable: bool = field(default=True, repr=False)
    counts: tuple[int, ...] = field(default=(), repr=False)  # targets of each user
    by_reference: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.recipes.values())).dtype

    def inputs(self, seed: int) -> dict[str, Tensor]:
        """The floating tensors."""
        torch.default_generator.manual_seed(seed)
        tensors = {name: how.make() for name, how in self.recipes.items()}
        self.finish(tensors)
        return tensors

    def function(self, **tensors) -> Tensor | tuple[Tensor, ...]:
        if self.by_reference:
            return self.reference(**tensors)
        options = {} if self.impl is None else {"impl": self.impl}
        # A CPU has chunked matmuls for what C++ does not serve, or where there is none.
        without_cpp = {"cpu": "to run chunked"} if self.impl == "chunked" else {}
        with mock.patch.dict(MISSING, without_cpp):
            return getattr(recattn, self.operator)(**tensors, **options)

    def reference(self, **tensors) -> Tensor | tuple[Tensor, ...]:
        return getattr(reference, self.operator)(**tensors)


def spoil(names, padding: Tensor | None, tensors: dict[str, Tensor]) -> None:
    """Write NaN, infinities and large numbers to the padding [B, N] of [B, H, N, D] or [B, N, D]."""
    if padding is None:
        return
    for name in names:
        x = tensors[name].clone()  # an expanded tensor has no memory of its own for these
        mask = padding[:, None, :, None] if x.dim() == 4 else padding[:, :, None]
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4])[torch.randint(4, x.shape)].to(x)
        tensors[name] = bad.where(mask, x)


def spoiled(draw, names, where: Sequences) -> Callable[[dict], object]:
    padding = where.padding() if draw(st.booleans()) else None
    return functools.partial(spoil, names, padding)


# --- Attention ---


def sink_attention(draw, impl, dtype, longest, widest, ways) -> Call:
    where = sequences(draw, longest, ways)
    groups, kv_heads = draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (3, 1), (2, 2))))
    heads, dim, value_dim = groups * kv_heads, draw(dims(widest)), draw(dims(widest))
    # Where the bias or the sink is all of a large score, the reference rounds nothing: there is no bound.
    large = draw(st.sampled_from((1.0, 1.0, 1e-8, 100.0, 1e9)))
    of_scores = {"kinds": ("normal",)} if large > 1 else {"kinds": KINDS}
    q = recipe(draw, where.shape(heads, dim), dtype, sizes=(1.0,) if large > 1 else logit_sizes(dtype), **of_scores)
    if q.size > 100:  # nor beside equal large scores, which round a log-sum-exp
        of_scores = {"kinds": ("normal",)}
    recipes = {
        "q": q,
        "k": recipe(draw, where.shape(kv_heads, dim), dtype, **of_scores),
        "v": recipe(draw, where.shape(kv_heads, value_dim), dtype),
    }
    options = {**where.options, "causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((0.5, -1.0, 1.0) if large > 1 else (0.5, 0.0, -1.0, 1.0)))
    if draw(st.booleans()):
        recipes["sink_logits"] = recipe(draw, (heads,), draw(st.sampled_from((dtype, F32))), sizes=(min(large, 100.0),))
    finish = [spoiled(draw, "qkv", where)]
    if draw(st.sampled_from((True, True, True, False))):
        positions, sinks = sink_positions(draw, where)
        options["sink_positions"] = indices(draw, positions).view(len(where.lengths), sinks)
        shape = (len(where.lengths), draw(st.sampled_from((1, heads))), sinks, sinks)
        of_bias = F32 if large > 1e4 else draw(st.sampled_from((F32, dtype)))
        recipes["inter_sink_bias"] = recipe(draw, shape, of_bias, sizes=(large,))
        finish.append(functools.partial(mask_bias, draw(st.sampled_from((0.0, 0.0, 0.3, 1.0)))))
    return Call(
        "sink_attention",
        impl,
        recipes,
        options,
        functools.partial(in_turn, finish),
        where,
        own=("q", "k", "v", "inter_sink_bias"),
        heads={} if groups > 1 else {"q": 1, "k": 1, "v": 1, "sink_logits": 0, "inter_sink_bias": 1},
    )


def sink_positions(draw, where: Sequences) -> tuple[list[list[int]], int]:
    """Ascending positions for each sequence, padded with -1; some in padding."""
    longest = [n if where.how == "packed" else where.n for n in where.lengths]
    counts = [draw(st.one_of(st.just(n), st.integers(0, n))) for n in longest]
    random = draw(st.randoms(use_true_random=False))
    sinks = max(counts, default=0) + draw(st.integers(0, 1))
    rows = [sorted(random.sample(range(n), count)) for n, count in zip(longest, counts, strict=True)]
    return [row + [-1] * (sinks - len(row)) for row in rows], sinks


def mask_bias(share: float, tensors: dict[str, Tensor]) -> None:
    if share:
        bias = tensors["inter_sink_bias"]
        tensors["inter_sink_bias"] = bias.masked_fill(torch.rand(bias.shape) < share, -torch.inf)


def in_turn(functions, tensors: dict[str, Tensor]) -> None:
    for function in functions:
        function(tensors)


def refined_attention(draw, impl, dtype, longest, widest, ways) -> Call:
    where = sequences(draw, longest, ways)
    heads, dim, value_dim, rank = draw(st.sampled_from((2, 1, 3))), *(draw(dims(widest)) for _ in range(3))
    mechanisms = ("simple", "stochastic", "value", "additive")
    if impl == "triton" and where.n + 3 > 32:  # of the others it holds up to 32 tokens
        mechanisms = mechanisms[:2]
    options = {
        **where.options,
        "mechanism": draw(st.sampled_from(mechanisms)),
        "source": draw(st.sampled_from(("logits", "weights"))),
        "causal": draw(st.booleans()),
    }
    recipes = {name: recipe(draw, where.shape(heads, dim), dtype) for name in "qk"}
    recipes["v"] = recipe(draw, where.shape(heads, value_dim), dtype)
    recipes["q"] = recipe(draw, where.shape(heads, dim), dtype, sizes=(1.0, 1.0, 1e-8, 10.0))
    columns = 2 * rank if options["mechanism"] == "stochastic" else rank
    rows = where.n + draw(st.sampled_from((0, 1, 3)))
    size = 1 / max(where.n, 1) ** 0.5
    names = {"w_q": columns, "w_k": columns} | ({"w_v": rows} if options["mechanism"] in ("value", "additive") else {})
    shapes = {name: (*draw(st.sampled_from(((), (heads,)))), rows, width) for name, width in names.items()}
    recipes |= {name: recipe(draw, shape, dtype, sizes=(size, size, 4 * size)) for name, shape in shapes.items()}
    per_head = {name: 0 for name, shape in shapes.items() if len(shape) == 3}
    finish = spoiled(draw, "qkv", where)
    own = ("q", "k", "v")
    return Call("refined_attention", impl, recipes, options, finish, where, own, dict.fromkeys(own, 1) | per_head)


def wasserstein_attention(draw, impl, dtype, longest, widest, ways) -> Call:
    where = sequences(draw, longest, ways)
    heads, dim, value_dim = draw(st.sampled_from((2, 1, 3))), draw(dims(widest)), draw(dims(widest))
    options = {**where.options, "causal": draw(st.booleans())}
    recipes = {}
    sizes = (1.0, 1.0, 1e-4, 1.0 if dtype == F16 else 10.0)  # squared norms that float16 holds
    for role, width in (("q", dim), ("k", dim), ("v", value_dim)):
        recipes[f"mean_{role}"] = recipe(draw, where.shape(heads, width), dtype, sizes=sizes)
        recipes[f"cov_{role}"] = recipe(draw, where.shape(heads, width), dtype, sizes=(1.0, 1.0, 10.0), positive=True)
    own = tuple(recipes)
    per_head = {}
    if draw(st.booleans()):
        options["source"] = draw(st.sampled_from(("logits", "weights")))
        rows, columns = where.n + draw(st.sampled_from((0, 2))), 2 * draw(dims(widest))
        size = 1 / (max(where.n, 1) * dim) ** 0.5
        shapes = {name: (*draw(st.sampled_from(((), (heads,)))), rows, columns) for name in ("w_q", "w_k")}
        recipes |= {name: recipe(draw, shape, dtype, sizes=(size,)) for name, shape in shapes.items()}
        per_head = {name: 0 for name, shape in shapes.items() if len(shape) == 3}
    elif draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((0.5, 0.0, 2.0)))
    finish = spoiled(draw, own, where)
    return Call("wasserstein_attention", impl, recipes, options, finish, where, own, dict.fromkeys(own, 1) | per_head)


def inter_sink_bias(draw, impl, dtype, longest, widest, ways) -> Call:
    batch, heads, sinks = draw(st.sampled_from((2, 1, 3, 0))), draw(st.integers(1, 4)), draw(lengths(longest))
    dim = draw(dims(widest))
    shape = (batch, heads, sinks, dim)
    recipes = {
        "q_s": recipe(draw, shape, dtype, sizes=logit_sizes(dtype)),
        "k_s": recipe(draw, shape, dtype),
    }
    options = {"causal": draw(st.booleans())}
    finish = []
    if draw(st.booleans()):
        random = draw(st.randoms(use_true_random=False))
        mask = torch.tensor([random.random() < 0.7 for _ in range(batch * sinks)], dtype=torch.bool).view(batch, sinks)
        options["sink_mask"] = mask
        finish.append(functools.partial(spoil, ("q_s", "k_s"), ~mask))
    if draw(st.booleans()):
        recipes["bias_scale"] = Recipe((1,), draw(st.sampled_from((F32, dtype))))
    else:
        options["bias_scale"] = draw(st.sampled_from((1.0, 10.0, 0.0, -2.0)))
    own = ("q_s", "k_s")
    finish = functools.partial(in_turn, finish)
    return Call("inter_sink_bias", impl, recipes, options, finish, own=own, heads=dict.fromkeys(own, 1))


# --- LREA ---


def lrea_compress(draw, impl, dtype, longest, widest, ways) -> Call:
    where = sequences(draw, longest, [how for how in ways if how in ("dense", "right", "packed")])
    dim, rank, items = draw(dims(widest)), draw(dims(widest)), draw(st.sampled_from((9, 1, 40)))
    histories = (sum(where.lengths),) if where.how == "packed" else (len(where.lengths), where.n)
    recipes = {"w_comp": recipe(draw, (where.n + draw(st.sampled_from((0, 3))), rank), dtype, sizes=(1.0, 1e-4, 100.0))}
    options = dict(where.options)
    by_item = draw(st.booleans())
    if by_item:
        random = draw(st.randoms(use_true_random=False))
        ids = [random.randrange(items) for _ in range(torch.Size(histories).numel())]
        options["item_ids"] = indices(draw, ids).view(histories) if ids else torch.zeros(histories, dtype=torch.int64)
        recipes["behaviors"] = recipe(draw, (items, dim), dtype)
        finish = functools.partial(in_turn, [])
    else:
        recipes["behaviors"] = recipe(draw, (*histories, dim), dtype)
        finish = spoiled(draw, ("behaviors",), where)
    own = () if by_item else ("behaviors",)
    return Call("lrea_compress", impl, recipes, options, finish, where, own, differentiable=not by_item)


def users_of(draw) -> list[int]:
    """The number of targets of each user."""
    return draw(st.lists(st.one_of(st.sampled_from((2, 0, 1)), st.integers(0, 40)), min_size=0, max_size=4))


def offsets(draw, counts: list[int]) -> Tensor:
    return indices(draw, [0, *itertools.accumulate(counts)])


def lrea_attention(draw, impl, dtype, longest, widest, ways) -> Call:
    counts, heads = users_of(draw), draw(st.sampled_from((2, 1, 3)))
    dim, value_dim, rank, history = draw(dims(widest)), draw(dims(widest)), draw(dims(widest)), draw(lengths(longest))
    recipes = {
        "targets": recipe(draw, (sum(counts), heads, dim), dtype, sizes=(1.0, 1e-4, 30.0)),
        "keys": recipe(draw, (len(counts), heads, rank, dim), dtype),
        "values": recipe(draw, (len(counts), heads, rank, value_dim), dtype),
        "w_decomp": recipe(draw, (rank, history), dtype, sizes=(1.0, 0.1)),
    }
    options = {
        "target_offsets": offsets(draw, counts),
        "negative_slope": draw(st.sampled_from((0.01, 0.0, 1.0, -0.5, 2.0))),
    }
    if draw(st.booleans()):
        options["seq_lens"] = indices(draw, [draw(st.integers(0, history)) for _ in counts])
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((0.5, 0.0, -1.0)))
    own = ("targets", "keys", "values")
    heads_of = {"targets": 1, "keys": 1, "values": 1}
    return Call("lrea_attention", impl, recipes, options, own=own, heads=heads_of, counts=tuple(counts))


def lrea_absorb(draw, impl, dtype, longest, widest, ways) -> Call:
    users, heads, history = draw(st.integers(0, 3)), draw(st.sampled_from((2, 1, 3))), draw(lengths(longest))
    dim, value_dim, rank = draw(dims(widest)), draw(dims(widest)), draw(dims(widest))
    recipes = {
        "keys": recipe(draw, (users, heads, rank, dim), dtype),
        "values": recipe(draw, (users, heads, rank, value_dim), dtype),
        "w_decomp": recipe(draw, (rank, history), dtype, sizes=(1.0, 0.1)),
    }
    options = {"orientation": draw(st.sampled_from(("scores", "weights")))}
    options["negative_slope"] = draw(st.sampled_from((0.01, 0.0, 1.0, -0.5)))
    if draw(st.booleans()):
        options["seq_lens"] = indices(draw, [draw(st.integers(0, history)) for _ in range(users)])
    own = ("keys", "values")
    return Call("lrea_absorb", impl, recipes, options, own=own, heads=dict.fromkeys(own, 1))


def lrea_absorbed_attention(draw, impl, dtype, longest, widest, ways) -> Call:
    counts, heads, table = users_of(draw), draw(st.sampled_from((2, 1, 3))), draw(st.integers(1, 6))
    dim, value_dim, rank = draw(dims(widest)), draw(dims(widest)), draw(dims(widest))
    of_states = draw(st.sampled_from((dtype, F16, BF16))) if dtype == F32 else dtype
    recipes = {
        "targets": recipe(draw, (sum(counts), heads, dim), dtype, sizes=(1.0, 1e-4, 30.0)),
        "state_keys": recipe(draw, (table, heads, rank, dim), of_states),
        "state_values": recipe(draw, (table, heads, rank, value_dim), of_states),
    }
    options = {
        "slots": indices(draw, [draw(st.integers(0, table - 1)) for _ in counts]),
        "target_offsets": offsets(draw, counts),
        "negative_slope": draw(st.sampled_from((0.01, 0.0, 1.0, -0.5, 2.0))),
    }
    if draw(st.booleans()):
        items = draw(st.sampled_from((9, 1, 40)))
        random = draw(st.randoms(use_true_random=False))
        options["item_ids"] = indices(draw, [random.randrange(items) for _ in range(sum(counts))])
        recipes["targets"] = recipe(draw, (items, heads, dim), dtype)
    return Call("lrea_absorbed_attention", impl, recipes, options, differentiable=False, counts=tuple(counts))


OPERATORS = {
    "sink_attention": sink_attention,
    "refined_attention": refined_attention,
    "wasserstein_attention": wasserstein_attention,
    "inter_sink_bias": inter_sink_bias,
    "lrea_compress": lrea_compress,
    "lrea_attention": lrea_attention,
    "lrea_absorb": lrea_absorb,
    "lrea_absorbed_attention": lrea_absorbed_attention,
}
COMPILED, ALL = (F32, BF16, F16), (F32, BF16, F16, F64)
# The implementations that run on a CPU, and their dtypes. lrea_absorb has only one.
DTYPES = {
    ("sink_attention", "cpu"): COMPILED,
    ("sink_attention", "correction:eager"): INTERPRETED,
    ("refined_attention", "cpu"): ALL,
    ("refined_attention", "chunked"): ALL,
    ("wasserstein_attention", "cpu"): COMPILED,
    ("inter_sink_bias", "cpu"): COMPILED,
    ("lrea_compress", "cpu"): ALL,
    ("lrea_attention", "cpu"): ALL,
    ("lrea_absorb", None): ALL,
    ("lrea_absorbed_attention", "cpu"): ALL,
    **{(name, "triton"): INTERPRETED for name in OPERATORS if name not in ("lrea_absorb", "lrea_absorbed_attention")},
}
# The longest sequence and the widest head or rank. The interpreter takes seconds for what C++ does in milliseconds.
EXTENTS = {"triton": (40, 33), "correction:eager": (40, 33), "cpu": (140, 128), "chunked": (140, 80), None: (140, 80)}
LONG = {("refined_attention", "cpu"): (300, 65)}  # beyond 256 it runs other kernels


@st.composite
def calls(draw, operator: str, impl: str | None, ways: Sequence[str] = WAYS) -> Call:
    dtype = draw(st.sampled_from(DTYPES[operator, impl]))
    return OPERATORS[operator](draw, impl, dtype, *LONG.get((operator, impl), EXTENTS[impl]), ways)

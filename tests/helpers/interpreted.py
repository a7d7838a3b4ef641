"""Helpers for tests whose kernels Triton's interpreter runs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from recattn.testing import assert_matches_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def with_dtypes(*axes: Sequence) -> list[tuple]:
    """Combinations of `axes` with a dtype: on a GPU every one, by the interpreter one that changes with each value.

    Of three axes and more the interpreter gets few, in which every two values meet.
    """
    if len(axes) > 2 and DEVICE == "cpu":
        return every_two(*axes, DTYPES)
    combinations = []
    for chosen in itertools.product(*map(enumerate, axes)):
        turn = sum(i for i, _ in chosen)
        dtypes = DTYPES if DEVICE == "cuda" else [DTYPES[turn % len(DTYPES)]]
        combinations += [(*(value for _, value in chosen), dtype) for dtype in dtypes]
    return combinations


def every_two(*axes: Sequence) -> list[tuple]:
    """Few combinations in which each value of an axis meets each of another: again and again the one with most new."""

    def pairs(values: tuple) -> set:
        return set(itertools.combinations(enumerate(values), 2))

    every = [*itertools.product(*axes)]
    chosen, missing = [], set().union(*map(pairs, every))
    while missing:
        chosen.append(max(every, key=lambda values: len(pairs(values) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def assert_matches_reference_twice_of_three(*args, **kwargs) -> None:
    """`assert_matches_reference` for one incoming gradient, or two of three others: see `twice_of_three`."""
    twice_of_three(lambda seed: assert_matches_reference(*args, **kwargs, seed=seed))


def twice_of_three(assert_matches: Callable[[int], None]) -> None:
    """Call `assert_matches` with seeds of incoming gradients: it must hold for 0, or for two of 1, 2 and 3.

    Where a gradient is the small difference of large sums, its largest error is the luck of one entry, in the kernel
    and in the reference alike: FlashAttention's backward sums dO·O and dO·V apart, PyTorch's softmax takes both from
    the same numbers. A wrong kernel exceeds the bound every time; an output's error is the same for all.
    """
    try:
        assert_matches(0)
    except AssertionError:
        failures = []
        for seed in (1, 2, 3):
            try:
                assert_matches(seed)
            except AssertionError as failure:
                failures.append(failure)
        if len(failures) > 1:
            raise failures[0] from None


def speed_up_interpreter() -> None:
    """Have the interpreter do without work that changes no result, which took most of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages(function) -> list:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]

    def patch_if_needed(function):
        if any(tl.core.is_builtin(lang.load) for lang in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()  # of no changes

    of_type, of_scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(dtype):
        return of_type(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)  # pointers have no hash

    checked = tl.core.builtin(lambda: None).__code__

    def patch_attribute(obj, name, member, builder, scope):
        # What checks that it is called from a kernel need not.
        function = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*args, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **options)

        scope.set_attr(obj, name, call)

    # In each launch only, not again in each function that a kernel calls.
    interpreter._patch_lang, interpreter._patch_attr = patch_if_needed, patch_attribute
    interpreter._get_np_dtype = numpy_dtype
    # Without debug nobody reads whether an integer overflows.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    reuse_shapes()


def reuse_shapes() -> None:
    """Have Triton make the objects of a shape once, and compare and convert types only where they differ."""
    from triton._utils import validate_block_shape
    from triton.language import core, semantic

    @functools.cache
    def of_sizes(sizes: tuple[int, ...]) -> tuple:
        shape = core.tuple(list(sizes))
        of_constants = core.tuple([core.constexpr(size) for size in sizes])
        return shape, validate_block_shape(sizes), str(shape), of_constants, core.constexpr(math.prod(sizes))

    def init_block_type(self, element_ty, shape):
        self.element_ty = element_ty
        self.sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if not self.sizes:
            raise TypeError("0d block_type is forbidden")
        self.shape, self.numel, *_ = of_sizes(self.sizes)

    def name_block_type(self):
        return f"<{of_sizes(self.sizes)[2]}, {self.element_ty}>"

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        *_, self.shape, self.numel = of_sizes(type.sizes if type.is_block() else ())

    core.block_type.__init__, core.tensor.__init__ = init_block_type, init_tensor
    core.block_type.name = property(name_block_type)
    of_semantic, equal = semantic.TritonSemantic, core.dtype.__eq__
    cast, broadcast = of_semantic.cast, of_semantic.broadcast_impl_value
    promote = of_semantic.binary_op_type_checking_impl

    def promote_if_needed(
        self, a, b, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
    ):
        alike = isinstance(a, core.tensor) and isinstance(b, core.tensor) and a.dtype is b.dtype
        if alike and not div_or_mod and not a.dtype.is_ptr():
            return self.broadcast_impl_value(a, b)
        return promote(self, a, b, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def cast_if_needed(self, x, dtype, *rounding, **options):
        return x if x.dtype is dtype else cast(self, x, dtype, *rounding, **options)

    def broadcast_if_needed(self, a, b):
        sizes_of_a, sizes_of_b = (x.type.sizes if x.type.is_block() else () for x in (a, b))
        return (a, b) if sizes_of_a == sizes_of_b else broadcast(self, a, b)

    def equal_if_named_alike(self, other):
        if self is other:
            return True
        return self.name == other.name if isinstance(other, core.dtype) else equal(self, other)

    core.dtype.__eq__ = equal_if_named_alike
    of_semantic.cast, of_semantic.broadcast_impl_value = cast_if_needed, broadcast_if_needed
    of_semantic.binary_op_type_checking_impl = promote_if_needed


def sum_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, float32 products add one term after another by fused multiply-adds, as threads of a GPU do.

    The errors are those of an H200 to the last digit. numpy sums in another order, with a third of the error.
    """
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_sequential_dot(self, a, b, acc, *options):
        if not a.data.dtype == b.data.dtype == acc.data.dtype == np.float32:
            return create_dot(self, a, b, acc, *options)
        total, columns, rows = acc.data, a.data.astype(np.float64), b.data.astype(np.float64)
        for k in range(columns.shape[-1]):
            # In float64 the product is exact, and the sum is rounded once.
            total = (columns[..., :, k, None] * rows[..., k, None, :] + total).astype(np.float32)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_sequential_dot)


def read_scalars() -> None:
    """Have the interpreter of Triton 3.6, which passes arrays of one element to int(), run with NumPy 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


def splat_masks() -> None:
    """Have the interpreter repeat a scalar's comparison as booleans: it makes integers of them, which 3.9 takes for no
    mask."""
    from triton.language import int1
    from triton.runtime import interpreter

    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, shape, x):
        if x.data.dtype == np.bool_:
            x = interpreter.TensorHandle(x.data, int1)
        return splat(self, shape, x)

    interpreter.InterpreterBuilder.create_splat = create_splat


def run_outer_programs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """From here on, interpret only the first program and the last `count` ones along each axis of a grid.

    The programs work in the tensors' own memory: the interpreter's copies of tensors larger than memory would fill it.
    int32 overflow is an error.
    """
    from triton.runtime import interpreter

    builder, launch = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    set_grid_idx = builder.set_grid_idx
    whole = (1, 1, 1)

    def launch_outer(executor, *args, **kwargs):
        grid = executor.grid

        def outer(arguments):
            nonlocal whole
            whole = (*(grid(arguments) if callable(grid) else grid), 1, 1)[:3]
            return tuple(min(size, 1 + count) for size in whole)

        executor.grid = outer
        launch(executor, *args, **kwargs)

    def set_outer_idx(*program):
        set_grid_idx(*(i and i + max(size - 1 - count, 0) for i, size in zip(program, whole, strict=True)))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_outer)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(builder, "set_grid_dim", lambda *_: type(builder).set_grid_dim(builder, *whole))
    monkeypatch.setattr(builder, "set_grid_idx", set_outer_idx)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True, sanitize_overflow=True))

"""Plans: what a kernel function calls and launches, recorded once and replayed for tensors of other sizes.

Between its launches a kernel function spends its time on sizes, strides, grids and arguments, which are Python. A plan
does the same in C++ (csrc/host/plan.cpp): the function's second call of a signature is recorded, with the sizes and
strides of its tensors as symbols, and later calls are replayed. Decisions that the function took because of a size are
guards: where one fails, the call is recorded anew. A function that reads the elements of a tensor is not replayed, nor
one whose kernels are interpreted or autotuned.
"""

import functools
import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recattn import _native

# Signatures kept for a function, and plans for a signature: beyond, the oldest signature gives way, and calls whose
# guards all fail are no longer recorded.
MOST_SIGNATURES = 256
MOST_PLANS = 16


def replayed(function: Callable) -> Callable:
    """Decorator of a kernel function: its arguments are tensors, numbers, strings, None and tuples of these."""
    if _native.make_plan is None:
        return function
    known: dict[bytes, _Plans] = {}

    @functools.wraps(function)
    def replaying(*args):
        if _Recorder.active is not None and _Recorder.is_active_here():  # a part of what is recorded
            return function(*args)
        key = _native.signature(args)
        plans = known.get(key)
        if plans is None:
            if len(known) >= MOST_SIGNATURES:
                known.pop(next(iter(known)), None)
            known[key] = _Plans()
            return function(*args)
        for plan in plans.plans:
            results = plan(args)
            if results is ...:
                return function(*args)
            if results is not NotImplemented:
                return results
        if len(plans.plans) < MOST_PLANS and plans.replayable:
            return plans.record(function, args)
        return function(*args)

    vars(replaying)["known"] = known
    return replaying


# --- What stands in a plan for what a replay finds out: csrc/host/plan.h ---


class Slot(NamedTuple):
    """A tensor: an argument, or the result of a call."""

    index: int


class Pointer(NamedTuple):
    """A tensor's data in a launch."""

    slot: int


class Expression(NamedTuple):
    """An integer made of sizes and strides."""

    operation: str  # s(ize), (s)t(ride), n(umel) of slot a along axis b, or + - * / % b(it length) < for <<
    a: Any
    b: Any


class Integer(NamedTuple):
    """The value of an expression, in a call or launch."""

    expression: Expression


class _Plans:
    """The plans of a signature."""

    def __init__(self):
        self.plans: list[Callable] = []
        self.replayable = True

    def record(self, function: Callable, args: tuple):
        from recattn.triton_kernels.common.launch import launch

        if not _RECORDING.acquire(blocking=False):  # another thread records: later
            return function(*args)
        recorder = _Recorder()
        try:
            _native.set_recorder(launch, recorder.launch)
            with recorder:
                results = function(*recorder.take_inputs(args))
        finally:
            _native.set_recorder(launch, None)
            recorder.end()
            _RECORDING.release()
        plan = recorder.plan(results)
        if plan is None:
            self.replayable = False
        else:
            self.plans.append(plan)
        return results


_RECORDING = threading.Lock()


# --- Recording ---


class _Recorder(TorchFunctionMode):
    """Sees what a function calls and launches, and what it asks of its tensors."""

    active: "_Recorder | None" = None

    def __init__(self):
        super().__init__()
        self.replayable = True
        self.thread = threading.get_ident()
        self.slots: dict[int, int] = {}  # by the id of a tensor
        self.kept: list[Tensor] = []  # so that no id is used again
        self.num_inputs = 0
        self.num_slots = 0
        self.steps: list[tuple] = []
        self.guards: set[tuple] = set()
        _Recorder.active = self

    def end(self) -> None:
        _Recorder.active = None

    @classmethod
    def is_active_here(cls) -> bool:
        """Whether this thread records."""
        return cls.active is not None and cls.active.thread == threading.get_ident()

    def take_inputs(self, value: Any) -> Any:
        """The arguments, each tensor as an alias of its own: one that is given twice counts as two."""
        with torch._C.DisableTorchFunction():
            inputs = self._aliases(value)
        self.num_inputs = self.num_slots
        return inputs

    def _aliases(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return _rebuilt(value, [self._aliases(field) for field in value])
        if not isinstance(value, Tensor):
            return value
        alias = value.detach()
        self._add_slot(alias)
        return alias

    def _add_slot(self, tensor: Tensor) -> None:
        self.slots[id(tensor)] = self.num_slots
        self.num_slots += 1
        self.kept.append(tensor)

    def guard(self, a: Any, relation: str, b: Any, outcome: bool) -> bool:
        self._add_guard(("guard", _expression(a, self), relation, _expression(b, self), outcome))
        return outcome

    def _add_guard(self, guard: tuple) -> None:
        if guard not in self.guards:
            self.guards.add(guard)
            self.steps.append(guard)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name(func)
        if name in _CONSTANT:
            return func(*args, **kwargs)
        if name in _SIZES and id(args[0]) in self.slots:
            return self._sizes(name, *args)
        if name in _READS_ELEMENTS:
            self.replayable = False
            return func(*args, **kwargs)
        result = func(*_plain(args), **_plain(kwargs))
        self._add_call(func, args, kwargs, result)
        return result

    def _sizes(self, name: str, x: Tensor, axis: int | None = None) -> Any:
        slot = self.slots[id(x)]
        if name == "numel":
            return Traced(x.numel(), Expression("n", slot, 0), self)
        values, letter = (x.stride(), "t") if name == "stride" else (tuple(x.shape), "s")
        traced = tuple(Traced(value, Expression(letter, slot, i), self) for i, value in enumerate(values))
        if name == "is_contiguous":
            strides = self._sizes("stride", x)
            for value in (*traced, *strides):
                _guarded(value)
            return x.is_contiguous()
        return traced if axis is None else traced[axis]

    def _add_call(self, func: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        results = result if isinstance(result, list | tuple) else (result,)
        if not all(isinstance(x, Tensor) for x in results):
            self.replayable = False
            return
        arguments = tuple(self._template(value) for value in (*args, *kwargs.values()))
        self.steps.append(("call", func, arguments, tuple(kwargs), self.num_slots))
        for x in results:
            self._add_slot(x)

    def launch(self, kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
        """Takes the place of `launch`."""
        from recattn.triton_kernels.common.launch import describe, launch

        constants = {name: _guarded(value) for name, value in constants.items()}
        with torch._C.DisableTorchFunction():
            _native.set_recorder(launch, None)
            compiled = launch(kernel, _plain(grid), *_plain(arguments), **constants)
            _native.set_recorder(launch, self.launch)
            described = describe(kernel)
            if compiled is None or callable(grid) or described is None:
                self.replayable = False
                return
            specialized, num_constants = described
            launched = [self._launched(x, special) for x, special in zip(arguments, specialized, strict=False)]
            launched += list(constants.values())[:num_constants]
            axes = tuple(self._template(axis) for axis in grid)
        self.steps.append(("launch", *compiled, axes, tuple(launched)))

    def _launched(self, value: Any, specialized: int) -> Any:
        """An argument of a launch."""
        if isinstance(value, tuple):
            return tuple(self._launched(field, True) for field in value)
        if isinstance(value, Tensor):
            slot = self._slot(value)
            self._add_guard(("aligned", Pointer(slot), value.data_ptr() % 16 == 0))
            return Pointer(slot)
        if _is_traced_by(self, value):
            known = "1" if value.plain == 1 else "d" if value.plain % 16 == 0 else "-"
            self.guard(value, known if specialized else "?", 0, True)
            return Integer(value.expression)
        return _plain(value)

    def _template(self, value: Any) -> Any:
        """An argument of a call, or a result."""
        if isinstance(value, list):
            return [self._template(item) for item in value]
        if isinstance(value, tuple):
            return _rebuilt(value, [self._template(field) for field in value])
        if isinstance(value, Tensor):
            return Slot(self._slot(value))
        return Integer(value.expression) if _is_traced_by(self, value) else _plain(value)

    def _slot(self, tensor: Tensor) -> int:
        slot = self.slots.get(id(tensor))
        if slot is None:
            self.replayable = False
        return slot or 0

    def plan(self, results: Any) -> Callable | None:
        """What replays the function; None if nothing can."""
        template = self._template(results)
        self.kept.clear()
        if not self.replayable:
            return None
        types = (Slot, Pointer, Expression, Integer)
        return _native.make_plan(types, self.num_inputs, self.num_slots, self._ordered_steps(), template)

    def _ordered_steps(self) -> tuple[tuple, ...]:
        """The steps, first the guards and allocations that nothing else must precede: then a guard fails in time."""
        guards, allocations, others = [], [], []
        early = set(range(self.num_inputs))
        for step in self.steps:
            slots = _slots_of(step[1:])
            if step[0] != "call" and step[0] != "launch" and slots <= early:
                (guards if max(slots, default=-1) < self.num_inputs else allocations).append(step)
            elif step[0] == "call" and _name(step[1]) in _ALLOCATES and slots <= early:
                allocations.append(step)
                early.add(step[-1])
            else:
                others.append(step)
        return (*guards, *allocations, *others)


def _slots_of(value: Any) -> set[int]:
    """The slots that a step reads."""
    if isinstance(value, Slot | Pointer):
        return {value[0]}
    if isinstance(value, Expression) and value.operation in "stn":
        return {value.a}
    return {slot for field in value for slot in _slots_of(field)} if isinstance(value, list | tuple) else set()


def _name(func: Callable) -> str:
    """Of a property its own name, not that of its __get__."""
    name = func.__name__
    return func.__self__.__name__ if name == "__get__" else name


def _rebuilt(like: tuple, fields: list) -> tuple:
    return tuple(fields) if type(like) in (tuple, torch.Size) else type(like)(*fields)


def _plain(value: Any) -> Any:
    """`value` with integers that are not traced."""
    if isinstance(value, Traced):
        return value.plain
    if isinstance(value, tuple):
        return _rebuilt(value, [_plain(field) for field in value])
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


# Known from the signature, or for the launch alone.
_CONSTANT = {
    *("dtype", "device", "layout", "is_cuda", "is_meta", "requires_grad", "get_device", "data_ptr"),
    *("dim", "ndim", "element_size", "itemsize", "is_floating_point", "is_nested", "is_sparse"),
}
_ALLOCATES = {"new_empty", "new_empty_strided", "empty_like", "empty", "empty_strided"}
_SIZES = {"shape", "size", "stride", "numel", "is_contiguous"}
_READS_ELEMENTS = {"item", "tolist", "__bool__", "__int__", "__index__", "__float__", "__len__", "nonzero"}


# --- Sizes as symbols ---


class Traced:
    """A size or stride, or an integer made of them, while the function that asked for it is recorded.

    Arithmetic keeps the expression. A comparison becomes a guard, and so does every use as a number: no `int`, or
    Python would use the number unseen, as in `0.5 / size`.
    """

    __slots__ = ("__weakref__", "expression", "plain", "recorder")

    def __init__(self, plain: int, expression: Expression, recorder: _Recorder):
        self.plain, self.expression, self.recorder = plain, expression, recorder

    def __neg__(self) -> Any:
        return _traced_result(-self.plain, "-", 0, self)

    def bit_length(self) -> Any:
        return _traced_result(self.plain.bit_length(), "b", self, 0)

    def __repr__(self) -> str:
        return repr(self.plain)


def _is_traced_by(recorder: _Recorder | None, value: Any) -> bool:
    """Without a recorder, or by another one, a traced integer is a number as any other."""
    return recorder is not None and isinstance(value, Traced) and value.recorder is recorder


def _recorder_of(*values: Any) -> _Recorder | None:
    if not _Recorder.is_active_here():
        return None
    recorder = _Recorder.active
    return recorder if any(_is_traced_by(recorder, value) for value in values) else None


def _expression(value: Any, recorder: _Recorder) -> Any:
    return value.expression if _is_traced_by(recorder, value) else _plain(value)


def _traced_result(result: int, operation: str, a: Any, b: Any) -> Any:
    recorder = _recorder_of(a, b)
    if recorder is None:
        return result
    expression = Expression(operation, _expression(a, recorder), _expression(b, recorder))
    return Traced(result, expression, recorder)


def _guarded(value: Any) -> Any:
    """An integer's value, which a plan then requires."""
    recorder = _recorder_of(value)
    if recorder is not None:
        recorder.guard(value, "=", _plain(value), True)
    return _plain(value)


def _is_integer(value: Any) -> bool:
    return type(value) in (int, bool, Traced)


def _arithmetic(compute: Callable, operation: str) -> tuple[Callable, Callable]:
    def forward(self, other):
        if not _is_integer(other):
            return compute(_guarded(self), other)
        return _traced_result(compute(self.plain, _plain(other)), operation, self, other)

    def reflected(self, other):
        if not _is_integer(other):
            return compute(other, _guarded(self))
        return _traced_result(compute(_plain(other), self.plain), operation, other, self)

    return forward, reflected


def _comparison(compute: Callable, relation: str, swapped: bool, negated: bool) -> Callable:
    def compare(self, other):
        if not _is_integer(other):
            return compute(_guarded(self), other)
        outcome = compute(self.plain, _plain(other))
        recorder = _recorder_of(self, other)
        if recorder is not None:
            a, b = (other, self) if swapped else (self, other)
            recorder.guard(a, relation, b, outcome != negated)
        return outcome

    return compare


def _define_operators() -> None:
    arithmetic = {"add": "+", "sub": "-", "mul": "*", "floordiv": "/", "mod": "%", "lshift": "<"}
    for name, operation in arithmetic.items():
        forward, reflected = _arithmetic(getattr(operator, name), operation)
        setattr(Traced, f"__{name}__", forward)
        setattr(Traced, f"__r{name}__", reflected)
    comparisons = {
        "eq": ("=", False, False),
        "ne": ("=", False, True),
        "lt": ("<", False, False),
        "gt": ("<", True, False),
        "le": ("<", True, True),
        "ge": ("<", False, True),
    }
    for name, meaning in comparisons.items():
        setattr(Traced, f"__{name}__", _comparison(getattr(operator, name), *meaning))
    # Anything else is done with the number.
    for name in ("truediv", "pow", "and_", "or_", "xor", "rshift"):
        compute, dunder = getattr(operator, name), name.strip("_")
        setattr(Traced, f"__{dunder}__", lambda self, other, compute=compute: compute(_guarded(self), _guarded(other)))
        setattr(Traced, f"__r{dunder}__", lambda self, other, compute=compute: compute(_guarded(other), _guarded(self)))
    for name, compute in (("bool", bool), ("hash", hash), ("int", int), ("index", int), ("float", float), ("abs", abs)):
        setattr(Traced, f"__{name}__", lambda self, compute=compute: compute(_guarded(self)))


_define_operators()

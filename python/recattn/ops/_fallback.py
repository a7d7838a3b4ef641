"""RECATTN_FALLBACK=reference: where a kernel fails to launch, the reference computes the call.

A forward that fell back has kept nothing that the kernel of its backward could read, and a kernel's dropout cannot be
repeated by a reference. So the calls of a kind (operator, device, dtype, widths) that has failed once stay with the
reference, and a backward with dropout runs the reference only after a forward that did.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recattn._warnings import warn_caller

VARIABLE = "RECATTN_FALLBACK"
# Of the caller, or of memory, which the reference needs more of.
_NEVER = (ValueError, TypeError, NotImplementedError, MemoryError, torch.OutOfMemoryError)
_WITHOUT_MEMORY = ("out of memory", "can't allocate memory")
# Seeds of forwards with dropout that are remembered until their backward.
MOST_SEEDS = 1 << 14

_lock = threading.Lock()
_failed: set[tuple] = set()
_reported: set[tuple[str, str]] = set()
_seeds: dict[int, None] = {}


def or_reference(op: str, reference: Callable, *, like: Callable) -> Callable[[Callable], Callable]:
    """Decorator of the kernel of a forward.

    `reference` takes its arguments and returns its first outputs; `like`, its fake kernel, allocates all of them.
    """

    def decorate(kernel: Callable) -> Callable:
        def compute(args: tuple) -> Any:
            seed = _dropout_seed(args)
            outs = like(*args)
            with torch.no_grad(), _by_reference(args, seed):
                results = _as_tuple(reference(*args))
            _remember(seed)
            for i, out in enumerate(_as_tuple(outs)):
                if i < len(results):
                    out.copy_(results[i])
                elif out.is_floating_point():
                    out.fill_(torch.nan)  # for the kernel of the backward, which does not run
            return outs

        @functools.wraps(kernel)
        def kernel_or_reference(*args, **hints):
            return _run(op, kernel, args, hints, lambda: args, compute)

        return kernel_or_reference

    return decorate


def or_reference_gradients(
    op: str, reference: Callable, *, like: Callable, split: Callable, wrt: Sequence[int]
) -> Callable[[Callable], Callable]:
    """Decorator of the kernel of a backward.

    `split` makes (gradients of reference's outputs, reference's arguments) of its arguments; it returns the gradients
    of the arguments at `wrt` in what `like`, its fake kernel, allocates: a tensor, a tuple with None for arguments that
    are None, or a list without these.
    """

    def decorate(kernel: Callable) -> Callable:
        def compute(args: tuple) -> Any:
            douts, inputs = split(*args)
            seed = _dropout_seed(inputs)
            if seed is not None and seed not in _seeds:
                raise NotImplementedError(
                    f"the reference cannot repeat the dropout that the kernel of {op} drew in the forward: run the "
                    "forward again, by the reference"
                )
            indices = [i for i in wrt if inputs[i] is not None]
            with torch.enable_grad(), _by_reference(inputs, seed):
                leaves = [x.detach().requires_grad_() if i in indices else x for i, x in enumerate(inputs)]
                outs = _as_tuple(reference(*leaves))
                pairs = [(out, dout) for out, dout in zip(outs, douts, strict=False) if out.requires_grad]
                computed = torch.autograd.grad(
                    [out for out, _ in pairs],
                    [leaves[i] for i in indices],
                    [dout for _, dout in pairs],
                    materialize_grads=True,
                )
            gradients = dict(zip(indices, computed, strict=True))
            outs = like(*args)
            if isinstance(outs, Tensor):
                return outs.copy_(computed[0])
            if isinstance(outs, list):
                return [out.copy_(gradients[i]) for i, out in zip(indices, outs, strict=True)]
            return tuple(out.copy_(gradients[i]) if i in gradients else None for i, out in zip(wrt, outs, strict=True))

        @functools.wraps(kernel)
        def kernel_or_reference(*args, **hints):
            return _run(op, kernel, args, hints, lambda: split(*args)[1], compute)

        return kernel_or_reference

    return decorate


def _run(op: str, kernel: Callable, args: tuple, hints: dict, inputs: Callable[[], tuple], compute: Callable) -> Any:
    if _failed and _kind(op, inputs()) in _failed:
        return compute(args)
    try:
        return kernel(*args, **hints)
    except Exception as error:
        if not _is_of_the_kernel(error):
            raise
        if os.environ.get(VARIABLE) != "reference":
            _add_note(error)
            raise
        if not _device_works(inputs()):
            raise
        _failed.add(_kind(op, inputs()))
        _warn(op, error)
        return compute(args)


def _kind(op: str, inputs: tuple) -> tuple:
    """What a forward and its backward have in common, and that few values are of."""
    first, second = inputs[:2]
    return op, first.device, first.dtype, first.shape[-1], second.shape[-1]


def _is_of_the_kernel(error: Exception) -> bool:
    return not isinstance(error, _NEVER) and not any(words in str(error) for words in _WITHOUT_MEMORY)


def _device_works(inputs: tuple) -> bool:
    """False after an illegal access or a failed assertion: what a GPU computes from then on is worth nothing."""
    if inputs[0].is_cuda:
        try:
            torch.cuda.synchronize(inputs[0].device)
        except RuntimeError:
            return False
    return True


def _add_note(error: Exception) -> None:
    value = os.environ.get(VARIABLE)
    note = f"{VARIABLE}=reference computes such calls by the reference, which is slower."
    if value:
        note = f"{VARIABLE} must be 'reference', got {value!r}."
    add_note = getattr(error, "add_note", None)  # from Python 3.11 on
    if add_note is not None:
        add_note(note)


def _warn(op: str, error: Exception) -> None:
    cause = f"{type(error).__name__}: {error}"
    with _lock:
        if (op, cause) in _reported:
            return
        _reported.add((op, cause))
    message = f"{op} runs the reference, which is slower, for its kernel failed ({VARIABLE}=reference): {cause}"
    warn_caller(message, RuntimeWarning)


# --- Dropout of the reference, by the seed of the call ---


def _dropout_seed(inputs: tuple) -> int | None:
    """The seed of a call with dropout. Every operator that has dropout takes (..., dropout_seed, options)."""
    return int(inputs[-2]) if getattr(inputs[-1], "dropout_p", 0) > 0 else None


def _remember(seed: int | None) -> None:
    if seed is None:
        return
    with _lock:
        _seeds[seed] = None
        if len(_seeds) > MOST_SEEDS:
            del _seeds[next(iter(_seeds))]


@contextmanager
def _by_reference(inputs: tuple, seed: int | None) -> Iterator[None]:
    """What a reference runs in: no autocast, and the dropout that the call's seed gives."""
    device = inputs[0].device
    with torch.autocast(device.type, enabled=False), nullcontext() if seed is None else _SeededDropout(seed, device):
        yield


class _SeededDropout(TorchFunctionMode):
    """F.dropout draws from a generator of its own: the same in the forward and in the backward, in any thread."""

    def __init__(self, seed: int, device: torch.device):
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.dropout:
            return func(*args, **kwargs)
        (x,), p = args, kwargs["p"]  # as F.dropout hands itself on
        kept = torch.rand(x.shape, device=x.device, generator=self.generator) >= p
        return x * (kept.to(x.dtype) / (1 - p))


def _as_tuple(outs: Any) -> tuple[Tensor, ...]:
    return outs if isinstance(outs, tuple) else (outs,)

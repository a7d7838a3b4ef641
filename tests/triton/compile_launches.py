"""Compile what launches asked Triton for, by no more work than it takes to see what fails.

The compile table has what most become on a GPU. Requests are compiled whole until every option that the table does not
have was seen; the others are lowered to Triton's IR, which runs all of the kernel's Python.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from tests.compile_table import table


class Requests:
    """The compilations that launches ask for: triton.compile's arguments, of each kernel."""

    def __init__(self):
        self.of_kernel = defaultdict(list)

    def add(self, source, target, options: Mapping) -> None:
        self.of_kernel[source.fn].append((source, target, options))

    def compile(self, architecture: int) -> Iterator[tuple[str, int]]:
        """Yields the kernel and the bytes of shared memory of each request that was compiled whole."""
        import triton

        for kernel, requests in self.of_kernel.items():
            whole = showing(requests, shown_by_table(kernel, architecture))
            for request in requests:
                if not any(request is chosen for chosen in whole):
                    lower(*request)
            for source, target, options in whole:
                yield kernel.__name__, triton.compile(source, target=target, options=options).metadata.shared


def lower(source, target, options: Mapping) -> None:
    """The first step of triton.compile: Triton's IR."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(options))
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source.make_ir(target, options, implementation, modules, context)


def showing(requests: Iterable[tuple], shown: set) -> list[tuple]:
    """Few requests with all the options that are not `shown`: again and again the one that has most of them."""
    left = [(request, options_of(request[0].signature, request[0].constants)) for request in requests]
    chosen = []
    while left:
        request, most = max(left, key=lambda of: len(of[1] - shown))
        if most <= shown:
            break
        chosen.append(request)
        shown = shown | most
    return chosen


def shown_by_table(kernel, architecture: int) -> set:
    compiled = [c for c in table.compilations(table.kernel_modules()) if c.kernel is kernel]
    of = [options_of(c.signature, c.constexprs) for c in compiled if c.architecture == architecture]
    return set().union(*of)


def options_of(signature: Mapping, constants: Mapping) -> set[tuple]:
    """What a kernel's code depends on but for sizes and strides: which tensors are given, and flags.

    Each is (path, value): the path of an argument is its index, and of a tuple's field also the field's.
    """
    options = set()
    for i, (name, kind) in enumerate(signature.items()):
        for path, of_leaf in leaves((i,), kind):
            if of_leaf.startswith("*"):
                options.add((path, "given"))
            elif of_leaf == "constexpr":
                value = constants.get(path, constants.get(name))
                if value is None or isinstance(value, bool | str):
                    options.add((path, value))
    return options


def leaves(path: tuple[int, ...], kind: str | tuple) -> Iterator[tuple[tuple[int, ...], str]]:
    if isinstance(kind, str):
        yield path, kind
        return
    for i, field in enumerate(kind):
        yield from leaves((*path, i), field)

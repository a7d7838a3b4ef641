"""Checks of the arguments that modules are constructed with."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

from recattn._check import expect, expect_choice, expect_probability
from recattn._typing import PaddingSide
from recattn._warnings import warn_of_change

_Init = TypeVar("_Init", bound=Callable)


def expect_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        expect(size > 0, name, "at least 1", size)


def expect_heads(name: str, width: int, num_heads: int) -> None:
    """Check that `width`, the argument called `name`, divides into `num_heads` heads."""
    expect_positive(num_heads=num_heads)
    expect(width > 0 and width % num_heads == 0, name, f"a multiple of {num_heads} heads", width)


def expect_attention_options(dropout: float, padding_side: PaddingSide | None) -> None:
    expect_probability("dropout", dropout)
    if padding_side is not None:
        expect_choice("padding_side", padding_side, ("right", "left"))


def takes_max_len_by_name(init: _Init) -> _Init:
    """Decorator: `max_len` may be given third by position, as before, with a warning."""

    @functools.wraps(init)
    def by_name(self, embed_dim, num_heads, *positional, **options):
        if positional:
            kind, (third, *more) = type(self).__name__, positional
            got = f"{2 + len(positional)} of them"
            expect(not more, f"arguments of {kind} by position", "embed_dim and num_heads", got)
            left_out = "left out: give dropout and max_len by name"
            expect(not isinstance(third, float), f"the third argument of {kind}", left_out, third)
            warn_of_change(f"{kind} takes max_len by name only from the next release on: write max_len={third}")
            options["max_len"] = third
        init(self, embed_dim, num_heads, **options)

    return cast("_Init", by_name)

"""Checks of the arguments that modules are constructed with."""

from recattn._check import expect, expect_choice, expect_probability
from recattn._typing import PaddingSide


def expect_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        expect(size > 0, name, "at least 1", size)


def expect_heads(name: str, width: int, num_heads: int) -> None:
    """Check that `width`, the argument called `name`, divides into `num_heads` heads."""
    expect_positive(num_heads=num_heads)
    expect(width > 0 and width % num_heads == 0, name, f"a multiple of {num_heads} heads", width)


def expect_attention_options(dropout: float, padding_side: PaddingSide) -> None:
    expect_probability("dropout", dropout)
    expect_choice("padding_side", padding_side, ("right", "left"))

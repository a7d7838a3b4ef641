"""Types of command-line arguments."""

import argparse
from collections.abc import Callable


def positive(number: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = number(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            kind = "integer" if number is int else "number"
            raise argparse.ArgumentTypeError(f"must be a positive {kind}, got {text!r}")
        return value

    return parse

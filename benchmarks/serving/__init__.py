"""Serving from stores of states: servers to measure with, loads and faults."""

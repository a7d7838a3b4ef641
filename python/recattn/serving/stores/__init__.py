"""Stores of user states: one interface, and an engine behind it."""

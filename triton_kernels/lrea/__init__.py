"""Kernels of LREA: core (the middle factor), jagged (matrix products by user), compress (compression)."""

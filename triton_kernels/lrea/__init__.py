"""Kernels of LREA: core (the map of hidden width L), jagged (products by user), compress (compression)."""

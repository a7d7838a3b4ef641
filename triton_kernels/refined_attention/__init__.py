"""Kernels of refined_attention: short sequences in one program, and the projection x = A W of longer ones."""

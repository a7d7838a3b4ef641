"""Triton kernels and their launchers. They know tensors and shapes, nothing else."""

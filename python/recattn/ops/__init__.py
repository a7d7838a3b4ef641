"""Operators: schemas, fake kernels, CPU kernels, autograd. One file an operator."""

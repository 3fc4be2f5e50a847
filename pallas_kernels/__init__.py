"""Kernels with one interface each and an implementation for every machine. Imports jax, NumPy and the standard library only."""

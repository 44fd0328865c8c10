"""Kernels for the CPU: compiled from C."""

"""Compiled kernels and what they stand on: SIMD, the JIT, atomics, the thread team. Imports only kernels."""

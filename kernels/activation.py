"""The gated unit of the feed-forward: g[i] <- act(g[i]) * u[i] (Shazeer, "GLU variants", 2020)."""

from edgert.kernels import simd
from edgert.kernels.elementwise import exp
from edgert.kernels.jit import jit, kernel
from edgert.kernels.reference import activation as _twin

SILU, RELU, RELU2, GELU_TANH = 0, 1, 2, 3
"""Activations as numbers, in the order of `config.ACTIVATIONS`."""


@jit
def activated(kind, x):
    """act(x) in every lane."""
    one, zero = simd.splat(1.0), simd.splat(0.0)
    if kind == SILU:
        return simd.div(x, simd.add(one, exp(simd.sub(zero, x))))
    if kind == GELU_TANH:
        # x/2 (1 + tanh u) = x (1 - 1/(e^2u + 1)), u = sqrt(2/pi) (x + 0.044715 x^3)
        cube = simd.mul(simd.mul(x, x), x)
        u = simd.mul(simd.splat(0.7978845608), simd.fma(simd.splat(0.044715), cube, x))
        tail = simd.div(one, simd.add(exp(simd.add(u, u)), one))
        return simd.mul(x, simd.sub(one, tail))
    positive = simd.maximum(x, zero)
    return simd.mul(positive, positive) if kind == RELU2 else positive


@kernel(_twin.gate)
def gate(kind, g, g_at, u, u_at, count):
    """g[g_at : g_at + count] <- act(g) * u, `count` a multiple of 16."""
    for i in range(0, count, 16):
        value = activated(kind, simd.load_f32(g, g_at + i))
        simd.store_f32(g, g_at + i, simd.mul(value, simd.load_f32(u, u_at + i)))

"""What is not linear in a model: activations, alone or as a gate, and soft caps.

A gated unit of the feed-forward is g[i] <- act(g[i]) * u[i] (Shazeer, "GLU variants", 2020).
"""

from edgert.kernels import simd
from edgert.kernels.elementwise import exp
from edgert.kernels.jit import jit, kernel
from edgert.kernels.reference import activation as _twin

SILU, RELU, RELU2, GELU_TANH, GELU = range(5)
"""Activations as numbers, in the order of `config.ACTIVATIONS`."""


_T, _A1, _A2, _A3, _A4, _A5 = _twin.TAIL


@jit
def _tail(x):
    """P(X > x) for a normal X and x >= 0, within 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = simd.div(simd.splat(1.0), simd.fma(simd.splat(_T), x, simd.splat(1.0)))
    p = simd.fma(simd.splat(_A5), t, simd.splat(_A4))
    p = simd.fma(p, t, simd.splat(_A3))
    p = simd.fma(p, t, simd.splat(_A2))
    p = simd.fma(p, t, simd.splat(_A1))
    return simd.mul(simd.mul(p, t), exp(simd.mul(simd.mul(x, x), simd.splat(-0.5))))


@jit
def capped(x, cap):
    """cap tanh(x / cap) in every lane, within 4e-7 of the cap (Gemma Team, arXiv:2408.00118, section 2)."""
    u = simd.div(x, cap)
    tail = simd.div(simd.splat(2.0), simd.add(exp(simd.add(u, u)), simd.splat(1.0)))
    return simd.mul(cap, simd.sub(simd.splat(1.0), tail))


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
    if kind == GELU:  # x P(X < x) for a normal X, as max(x, 0) - |x| P(X > |x|)
        return simd.sub(positive, simd.mul(simd.absolute(x), _tail(simd.absolute(x))))
    return simd.mul(positive, positive) if kind == RELU2 else positive


@kernel(_twin.gate)
def gate(kind, g, g_at, u, u_at, count):
    """g[g_at : g_at + count] <- act(g) * u, `count` a multiple of 16."""
    for i in range(0, count, 16):
        value = activated(kind, simd.load_f32(g, g_at + i))
        simd.store_f32(g, g_at + i, simd.mul(value, simd.load_f32(u, u_at + i)))


@kernel(_twin.soft_cap, inline=True)
def soft_cap(x, x_at, count, cap):
    """x[x_at : x_at + count] <- cap tanh(x / cap), `count` a multiple of 16."""
    limit = simd.splat(cap)
    for i in range(x_at, x_at + count, 16):
        simd.store_f32(x, i, capped(simd.load_f32(x, i), limit))


@kernel(_twin.clamped_gate, inline=True)
def clamped_gate(g, g_at, u, u_at, count, alpha, limit):
    """g <- g' sigmoid(alpha g') (u' + 1), g' = min(g, limit), u' = clip(u, +-limit): the gate of gpt-oss."""
    slope, high, low = simd.splat(alpha), simd.splat(limit), simd.splat(-limit)
    one = simd.splat(1.0)
    for i in range(0, count, 16):
        x = simd.minimum(simd.load_f32(g, g_at + i), high)
        up = simd.maximum(simd.minimum(simd.load_f32(u, u_at + i), high), low)
        swish = simd.div(x, simd.add(one, exp(simd.sub(simd.splat(0.0), simd.mul(slope, x)))))
        simd.store_f32(g, g_at + i, simd.mul(swish, simd.add(up, one)))

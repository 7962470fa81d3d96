"""The activations that a norm is fused with, and their derivatives, in Triton.

ACT is the operator's code: 0 for none, then from 1 in the order of `reference.ACTIVATIONS`. Results
are in z's dtype, float32 or float64, finite for every finite z, and NaN for NaN as in the
reference. ACT_PARAM is leaky_relu's slope or elu's alpha. It is a constant because an argument
arrives as a float32 number, and 0.01 in float32 is not float64's.

Conditions are written so that NaN fails or passes them as in the reference: `tl.maximum` and
`tl.minimum` drop a NaN when compiled and keep it when interpreted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expm1_nonpositive(z):
    """e^z - 1 for z <= 0, without cancellation near 0.

    Taylor down to -1/2, where the first term that is left out is below a third of the last place.
    From there on a subtraction loses one bit.
    """
    DEGREE: tl.constexpr = 15 if z.dtype == tl.float64 else 8
    near = tl.maximum(z, -0.5)
    series = near * (1.0 / DEGREE) + 1.0
    for i in tl.static_range(2, DEGREE):
        series = series * (near * (1.0 / (DEGREE + 1 - i))) + 1.0
    return tl.where(z > -0.5, near * series, tl.exp(z) - 1.0)


@triton.jit
def _sigmoid(z):
    """σ(z) and 1 - σ(z), neither of which cancels."""
    e = tl.exp(-tl.abs(z))  # of -z it would overflow
    return tl.where(z >= 0, 1.0, e) / (1.0 + e), tl.where(z >= 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(z):
    size = tl.abs(z)
    e = _expm1_nonpositive(-2.0 * tl.where(size > 40, 40.0, size))
    t = -e / (e + 2.0)
    return tl.where(z < 0, -t, t)


@triton.jit
def _normal_cdf(z):
    return 0.5 + 0.5 * tl.erf(z * 0.70710678118654752440)


@triton.jit
def _gelu_tanh_gate(z):
    """(1 + tanh(u)) / 2 = σ(2u) with u = √(2/π) (z + 0.044715 z³), 1 - σ(2u) and d(2u)/dz.

    Of z within ±40: there the gate is 0 or 1 in float64, too, and z³ does not overflow.
    """
    z = tl.minimum(tl.maximum(z, -40.0), 40.0)
    square = z * z
    gate, rest = _sigmoid(1.59576912160573071176 * z * (1.0 + 0.044715 * square))
    return gate, rest, 1.59576912160573071176 * (1.0 + 0.134145 * square)


@triton.jit
def _sixth_of_ramp(z):
    """clamp(z + 3, 0, 6) / 6: the product of z and 6 would overflow."""
    t = z + 3.0
    return tl.where(t <= 0, 0.0, tl.where(t >= 6, 6.0, t)) * (1.0 / 6.0)


@triton.jit
def activate(z, ACT_PARAM: tl.constexpr, ACT: tl.constexpr):
    """act(z)."""
    if ACT == 1:  # relu
        y = tl.where(z <= 0, 0.0, z)
    elif ACT == 2:  # relu6
        y = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACT == 3:  # leaky_relu
        y = tl.where(z > 0, z, z * ACT_PARAM)
    elif ACT == 4:  # elu
        y = tl.where(z > 0, z, _expm1_nonpositive(tl.where(z > 0, 0.0, z)) * ACT_PARAM)
    elif ACT == 5:  # silu
        gate, _ = _sigmoid(z)
        y = z * gate
    elif ACT == 6:  # gelu
        y = z * _normal_cdf(z)
    elif ACT == 7:  # gelu_tanh
        gate, _, _ = _gelu_tanh_gate(z)
        y = z * gate
    elif ACT == 8:  # hardswish
        y = z * _sixth_of_ramp(z)
    elif ACT == 9:  # hardsigmoid
        y = _sixth_of_ramp(z)
    elif ACT == 10:  # sigmoid
        y, _ = _sigmoid(z)
    elif ACT == 11:  # tanh
        y = _tanh(z)
    else:
        tl.static_assert(ACT == 0)
        y = z
    return y


@triton.jit
def slope(z, ACT_PARAM: tl.constexpr, ACT: tl.constexpr):
    """The derivative of act at z; at a kink the one that torch takes."""
    one = tl.full(z.shape, 1.0, z.dtype)
    if ACT == 1:  # relu
        d = tl.where(z <= 0, 0.0, one)
    elif ACT == 2:  # relu6
        d = tl.where((z > 0) & (z < 6), one, 0.0)
    elif ACT == 3:  # leaky_relu
        d = tl.where(z > 0, one, one * ACT_PARAM)
    elif ACT == 4:  # elu
        d = tl.where(z > 0, one, tl.exp(tl.where(z > 0, 0.0, z)) * ACT_PARAM)
    elif ACT == 5:  # silu
        gate, rest = _sigmoid(z)
        d = gate * (1.0 + z * rest)
    elif ACT == 6:  # gelu
        near = tl.minimum(tl.abs(z), 40.0)  # the density is 0 there, and a square does not overflow
        density = 0.39894228040143267794 * tl.exp(-0.5 * near * near)
        d = _normal_cdf(z) + z * density
    elif ACT == 7:  # gelu_tanh
        gate, rest, bend = _gelu_tanh_gate(z)
        d = gate + z * (gate * rest) * bend
    elif ACT == 8:  # hardswish
        d = tl.where(z <= -3, 0.0, tl.where(z < 3, z * (1.0 / 3.0) + 0.5, one))
    elif ACT == 9:  # hardsigmoid
        d = tl.where((z > -3) & (z < 3), one * (1.0 / 6.0), 0.0)
    elif ACT == 10:  # sigmoid
        y, rest = _sigmoid(z)
        d = y * rest
    elif ACT == 11:  # tanh
        e = tl.exp(-tl.abs(z))  # 1 / cosh², which does not cancel as 1 - tanh² does
        half = e / (1.0 + e * e)
        d = 4.0 * half * half
    else:
        tl.static_assert(ACT == 0)
        d = one
    return d

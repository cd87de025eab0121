"""Linear layers in e4m3 (8 bit: 4 of exponent, 3 of mantissa, up to 448), with scales that cannot overflow.

All scales are powers of two, fixed when the weights are loaded. LayerNorm bounds the input (|x| <= sqrt(D) for every
value, ||x|| <= sqrt(D) for a row, so |Wx + b| <= ||w|| sqrt(D) + |b|). A floating-point format does not mind that the
bound is seldom reached. Scales by each row's own maximum, tried on the real 8M weights, were no closer.
"""

import math

import torch

from virnucpro_cli.model.kernels.linear import Quantised, QuantisedSum, whole_tiles
from virnucpro_cli.model.plain import Pair

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
ROUNDED_UP = 1 + 2.0**-3
"""A quantised row may be longer by 2^-4 than the row was; the rest is margin."""


def quantise(norm: Pair, linear: Pair, offset: torch.Tensor) -> Quantised:
    """LayerNorm of x + offset [K] and the linear layer [M, K] after it, in e4m3; all arguments float32."""
    (gamma, beta), (weight, bias) = norm, linear
    depth = weight.shape[1]
    step = 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(depth)))
    bias = bias + (weight.double() @ beta.double()).float()
    rounded, unit = _rounded(weight * gamma)
    bound = (rounded.float().norm(dim=1) * unit * math.sqrt(depth) + bias.abs()) * ROUNDED_UP
    return Quantised(offset, rounded, whole_tiles(_power_of_two(LARGEST / bound)), whole_tiles(bias), step, unit / step)


def quantise_sum(weight: torch.Tensor, grain: torch.Tensor) -> QuantisedSum:
    """The linear layer [M, K] after a GELU that was multiplied by grain [K or more]; float32."""
    return QuantisedSum(*_rounded(weight / grain[: weight.shape[1]]))


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The weight in e4m3 as far up as it goes, and the factor that undoes it."""
    scale = float(_power_of_two(LARGEST / weight.abs().max().clamp_min(2.0**-100)))
    return (weight * scale).to(E4M3), 1 / scale


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.floor(torch.log2(x)))

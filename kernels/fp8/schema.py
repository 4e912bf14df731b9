"""Schemas and fakes of the operators in e4m3."""

from deit.kernels.engine import eight_bits
from deit.kernels.engine.registry import define

define("fp8_linear", eight_bits.LINEAR, eight_bits.fake_linear, triton="fp8.triton")
define("fp8_gelu_mlp", eight_bits.MLP, eight_bits.fake_mlp, triton="fp8.triton")

"""The layers of the TensorLy-Torch guide: factorized convolutions from random, or from a trained convolution."""

from fxfact.nn.factorized_conv import CPConv, FactorizedConv, TTConv, TuckerConv

__all__ = ["CPConv", "FactorizedConv", "TTConv", "TuckerConv"]

"""Convolutions as values: what one is, one with its numbers, and a chain of them that equals one.

A chain is the only currency between the mathematics and the graph. Two laws hold it together:
``run(chain, x) == run(ConvLayer(spec, compose(chain), bias), x)`` for the convolution ``spec`` that the chain was
made for, and a chain computes nothing but ordinary convolutions, one after the other.
"""

from fxfact.conv.base import PADDING_MODES, ConvSpec, Padding, Sizes, pad_amounts, same_padding, tuples
from fxfact.conv.chain import (
    ConvChain,
    ConvLayer,
    chain_macs,
    check_stages,
    compose,
    compose_weights,
    composed_spec,
    from_torch,
    padded,
    run,
    run_weight,
    to_torch,
)

__all__ = [
    "PADDING_MODES",
    "ConvChain",
    "ConvLayer",
    "ConvSpec",
    "Padding",
    "Sizes",
    "chain_macs",
    "check_stages",
    "compose",
    "compose_weights",
    "composed_spec",
    "from_torch",
    "pad_amounts",
    "padded",
    "run",
    "run_weight",
    "same_padding",
    "to_torch",
    "tuples",
]

"""Factorized convolution layers to build models with, compatible with TensorLy-Torch's ``FactorizedConv``.

A layer holds the stages of a factorization, as ``nn.Conv`` modules, instead of a dense kernel.
"""

from fxfact.conv import ConvNd
from fxfact.nn.attention import MultiheadAttention, split_attention
from fxfact.nn.joint import JointConv, SharedConv
from fxfact.nn.layers import CPConv, FactorizedConv, TTConv, TuckerConv
from fxfact.nn.rank_regularizers import (
    lasso_loss,
    prune_ranks,
    remove_tensor_dropout,
    remove_tensor_lasso,
    tensor_dropout,
    tensor_lasso,
)
from fxfact.nn.structure import Implementation
from fxfact.nn.tltorch import from_tltorch, load_tltorch_state_dict
from fxfact.nn.transduction import transduct_conv

__all__ = [
    "CPConv",
    "ConvNd",
    "FactorizedConv",
    "Implementation",
    "JointConv",
    "MultiheadAttention",
    "SharedConv",
    "TTConv",
    "TuckerConv",
    "from_tltorch",
    "lasso_loss",
    "load_tltorch_state_dict",
    "prune_ranks",
    "remove_tensor_dropout",
    "remove_tensor_lasso",
    "split_attention",
    "tensor_dropout",
    "tensor_lasso",
    "transduct_conv",
]

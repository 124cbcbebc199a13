"""Convolutions as values (ConvSpec, ConvLayer, ConvChain), modules and functions; their costs and Fisher information.

Factorizations return a chain, and graphs and modules are rewritten with a chain. It only consists of ordinary
convolutions that run one after another. If a chain was made for the convolution ``spec``, then ``run(chain, x)`` equals
``run(ConvLayer(spec, compose(chain), chain.bias), x)``.
"""

from fxfact.conv.chain import (
    ConvChain,
    ConvLayer,
    as_maps,
    compose,
    compose_weights,
    composed_spec,
    from_torch,
    padded,
    run,
    run_weight,
    to_torch,
)
from fxfact.conv.composed_layer import ComposedLayer, OwnParameters
from fxfact.conv.cost import Cost, format_amount, format_change, format_change_forms, format_short
from fxfact.conv.factorized_module import FactorizedModule, factorize_module, stages_in
from fxfact.conv.fisher import KroneckerFisher, KroneckerMoment, as_matrix, sqrt_and_inverse
from fxfact.conv.functional import ConvCall, looks_like_conv, matrix_of, read_call, write_call
from fxfact.conv.kernels import ONEDNN_TYPES, PLAIN_TYPES, POINTWISE_TYPES, supports_onednn
from fxfact.conv.linear_calls import LinearCallMode
from fxfact.conv.low_rank_moment import LowRankMoment
from fxfact.conv.modules import (
    ATTENTION_ADVICE,
    CHANNELS_LAST,
    FOLD_ADVICE,
    TRANSPOSED_TYPES,
    compose_modules,
    computes_weight,
    decides_size,
    has_hooks,
    insert_base,
    is_conv,
    overrides_conv_forward,
    read_conv,
    run_stages,
    spec_of,
    takes_output_size,
    torch_conv_class,
    why_state_unsupported,
    why_unsupported,
    why_weight_unsupported,
    write_chain,
    write_conv,
)
from fxfact.conv.site import ConvSite, Skip, mark_tied, path_of
from fxfact.conv.spec import ConvSpec, Sizes, as_tuples, chain_cost, format_spec_forms, pad_amounts
from fxfact.conv.stage_writes import ComposedChain

__all__ = [
    "ATTENTION_ADVICE",
    "CHANNELS_LAST",
    "FOLD_ADVICE",
    "ONEDNN_TYPES",
    "PLAIN_TYPES",
    "POINTWISE_TYPES",
    "TRANSPOSED_TYPES",
    "ComposedChain",
    "ComposedLayer",
    "ConvCall",
    "ConvChain",
    "ConvLayer",
    "ConvSite",
    "ConvSpec",
    "Cost",
    "FactorizedModule",
    "KroneckerFisher",
    "KroneckerMoment",
    "LinearCallMode",
    "LowRankMoment",
    "OwnParameters",
    "Sizes",
    "Skip",
    "as_maps",
    "as_matrix",
    "as_tuples",
    "chain_cost",
    "compose",
    "compose_modules",
    "compose_weights",
    "composed_spec",
    "computes_weight",
    "decides_size",
    "factorize_module",
    "format_amount",
    "format_change",
    "format_change_forms",
    "format_short",
    "format_spec_forms",
    "from_torch",
    "has_hooks",
    "insert_base",
    "is_conv",
    "looks_like_conv",
    "mark_tied",
    "matrix_of",
    "overrides_conv_forward",
    "pad_amounts",
    "padded",
    "path_of",
    "read_call",
    "read_conv",
    "run",
    "run_stages",
    "run_weight",
    "spec_of",
    "sqrt_and_inverse",
    "stages_in",
    "supports_onednn",
    "takes_output_size",
    "to_torch",
    "torch_conv_class",
    "why_state_unsupported",
    "why_unsupported",
    "why_weight_unsupported",
    "write_call",
    "write_chain",
    "write_conv",
]

"""Terms of a report, with an explanation that is shown on hover."""

from __future__ import annotations

from html import escape

from fxfact.factorizations import FACTORIZATIONS

_MEANINGS = {
    "parameters": "Number of parameters of the whole network, or of the layer.",
    "MACs": "Multiply-accumulates: one multiplication and one addition each, counted for one sample.",
    "ms": "Milliseconds of one call on the example inputs. Both networks, or both layers, took turns.",
    "peak MB": "Largest memory of activations at one time in megabytes, without the input.",
    "nats": (
        "Unit of the KL divergence from the outputs of the original, for one sample. 1 nat: the network gives e ≈ 2.7 "
        "times less probability to what the original predicts, in the geometric mean."
    ),
    "predicted loss increase": "Increase of the loss that the plan predicted, before any refitting or training.",
    "measured loss increase": "Increase of the loss that was measured on the data of the plan.",
    "loss increase on these inputs": "Divergence of the outputs from the original's on the inputs of this report.",
    "metric": "The metric that was passed with the budget.",
    "loss +": "Increase of the loss that the plan predicted for this layer, in nats for one sample.",
    "kernel error": (
        "‖Ŵ − W‖ / ‖W‖ for the kernel Ŵ that the chain composes to. It may be large where the data showed that it "
        "matters little."
    ),
    "output error": "Relative error of the layer's output, on the input that it gets in the original.",
    "singular values": (
        "Singular values of the kernel's unfoldings. Those that the rank keeps are filled, and a line marks the rank."
    ),
    "became": "The factorization and its rank. Hover over it for the stages of the chain.",
    "layer": "A convolution or linear layer: its name in the model and its sizes.",
}


def term(name: str) -> str:
    """Return a term of the report, with its explanation."""
    return explained(name, _MEANINGS[name])


def meaning(name: str) -> str:
    """Return the explanation of a term."""
    return _MEANINGS[name]


def explained(text: str, explanation: str) -> str:
    """Return a text with an explanation that is shown on hover, and to the keyboard."""
    return f'<abbr tabindex="0" data-tip="{escape(explanation)}">{escape(text)}</abbr>'


def factorization_meaning(name: str) -> str:
    """Return what a factorization makes of a layer, or "" for one that is not fxfact's."""
    kinds = {kind.name: kind for kind in FACTORIZATIONS}
    return (kinds[name].__doc__ or "").strip().partition("\n")[0] if name in kinds else ""

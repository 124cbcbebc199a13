"""Attention whose projections are linear layers, so that they can be factorized in every front end."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError, error_context
from fxfact.utils import copy_with_shared


class MultiheadAttention(nn.Module):
    """An ``nn.MultiheadAttention`` that computes its projections by linear layers (Vaswani et al. 2017).

    PyTorch's own holds the weights of the projections and reads them in a function, so no module of it can be replaced.
    This one has four linear layers, is called in the same way, and returns the same. PyTorch's encoder and decoder
    layers, in which it may take the other's place, do not use their fused operator then.

    Args:
        embed_dim: the channels of queries and outputs.
        num_heads: the number of heads, which divides ``embed_dim``.
        dropout: the probability that a weight of the attention is dropped in training.
        bias: whether the linear layers have biases.
        kdim: the channels of keys. Default: ``embed_dim``.
        vdim: the channels of values. Default: ``embed_dim``.
        batch_first: whether tensors are (batch, tokens, channels) instead of (tokens, batch, channels).
        device: the device of the parameters.
        dtype: their type.

    Attributes:
        q_proj: the projection of queries, an ``nn.Linear``.
        k_proj: that of keys.
        v_proj: that of values.
        out_proj: that of the output.

    Raises:
        ArgumentError: if ``num_heads`` does not divide ``embed_dim``.
    """

    in_proj_weight = in_proj_bias = None  # PyTorch's encoder layers look for them
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ArgumentError(f"num_heads must divide embed_dim={embed_dim}, got {num_heads}")
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.k_proj = nn.Linear(kdim or embed_dim, embed_dim, **options)
        self.v_proj = nn.Linear(vdim or embed_dim, embed_dim, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **options)

    @classmethod
    @torch.inference_mode(False)
    @torch.enable_grad()
    def from_torch(cls, attention: nn.MultiheadAttention) -> Self:
        """Return the layer that computes the same as PyTorch's.

        Args:
            attention: the layer, which is not changed.

        Returns:
            A layer with copies of its weights.

        Raises:
            ArgumentTypeError: if it is of another class.
            RefusedError: if it adds tokens to the keys (``add_bias_kv``, ``add_zero_attn``).
        """
        if type(attention) is not nn.MultiheadAttention:
            raise ArgumentTypeError(f"expected a torch.nn.MultiheadAttention, got {type(attention).__name__}")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise RefusedError("add_bias_kv and add_zero_attn add tokens to the keys, which this layer cannot do")
        names, weight, bias = ("q_proj", "k_proj", "v_proj"), attention.in_proj_weight, attention.in_proj_bias
        weights = [getattr(attention, f"{name}_weight") for name in names] if weight is None else weight.chunk(3)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            bias is not None,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            device="meta",
        )
        out = attention.out_proj
        for name, *tensors in [*zip(names, weights, biases, strict=True), ("out_proj", out.weight, out.bias)]:
            for key, tensor in zip(("weight", "bias"), tensors, strict=True):
                if tensor is not None:
                    copied = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
                    new.get_submodule(name).register_parameter(key, copied)
        return new.train(attention.training)

    def forward(  # noqa: PLR0917 (the positions of nn.MultiheadAttention)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does.

        Args:
            query: (batch, tokens, embed_dim) with ``batch_first``, else (tokens, batch, embed_dim); or without batch.
            key: likewise, (..., kdim).
            value: likewise, (..., vdim).
            key_padding_mask: keys to leave out, (batch, keys): True, or a number that is added to the logits.
            need_weights: whether to return the weights of the attention.
            attn_mask: pairs to leave out, (tokens, keys) or (batch · num_heads, tokens, keys), likewise.
            average_attn_weights: whether to return the mean of the weights over the heads.
            is_causal: says that ``attn_mask``, which is needed, is causal.

        Returns:
            The output, of the shape of ``query``, and the weights (batch, tokens, keys), or (batch, num_heads, tokens,
            keys) if they are not averaged, or None.

        Raises:
            ArgumentError: if ``is_causal`` is set without a mask.
        """
        if is_causal and attn_mask is None:
            raise ArgumentError("is_causal=True says what attn_mask is. Pass the mask as well.")
        tokens = -3 if self.batch_first else 0  # the axis of the tokens, before that of the heads
        projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k, v = (torch.unflatten(part, -1, (self.num_heads, -1)).movedim(tokens, -2) for part in projected)
        mask = self._merged_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q * (self.embed_dim // self.num_heads) ** -0.5 @ k.transpose(-2, -1)
            weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            found = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.out_proj(found.movedim(-2, tokens).flatten(-2)), weights

    def _merged_mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Return what is added to the logits (batch, num_heads, tokens, keys), or None."""
        pairs = None if attn_mask is None else _added(attn_mask, like)
        if pairs is not None and pairs.ndim == 3:  # (batch · num_heads, tokens, keys)
            pairs = torch.unflatten(pairs, 0, (-1, self.num_heads)) if like.ndim == 4 else pairs
        keys = None if key_padding_mask is None else _added(key_padding_mask, like)[..., None, None, :]
        return keys if pairs is None else pairs if keys is None else pairs + keys

    def extra_repr(self) -> str:
        """Describe the layer in ``repr``."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers that are added to logits."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)


def split_attention(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every ``nn.MultiheadAttention`` computes its projections by linear layers.

    The copy computes the same. Factorize it instead of the model, and compare with it.

    Args:
        model: a network, which is not changed.

    Returns:
        The copy, with ``fxfact.nn.MultiheadAttention`` in their places.

    Raises:
        ArgumentTypeError: if it is not a module.
        CaptureError: if the model cannot be copied.
        RefusedError: if an attention cannot be split; the message has its path.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    copied, new = copy_with_shared(model, set()), dict[nn.Module, MultiheadAttention]()
    for path, module in list(copied.named_modules(remove_duplicate=False)):
        if type(module) is nn.MultiheadAttention:
            with error_context(path or "the model"):
                new[module] = new.get(module) or MultiheadAttention.from_torch(module)
            if not path:
                return new[module]
            copied.set_submodule(path, new[module])
    return copied

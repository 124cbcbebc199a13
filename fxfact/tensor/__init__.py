"""Decompositions of plain tensors: no convolutions, no groups, no names. Float tensors in, float tensors out."""

from fxfact.tensor.base import tiny
from fxfact.tensor.cp import cp
from fxfact.tensor.svd import singular_squares, truncated_svd
from fxfact.tensor.tt import tt
from fxfact.tensor.tucker import partial_tucker

__all__ = ["cp", "partial_tucker", "singular_squares", "tiny", "truncated_svd", "tt"]

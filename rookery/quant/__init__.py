"""Frozen weights in 8 or 4 bits, for fine-tuning a small part of a large model."""

from rookery.quant.codes import KINDS, Kind
from rookery.quant.linear import QuantLinear
from rookery.quant.model import quantise

__all__ = ["KINDS", "Kind", "QuantLinear", "quantise"]

"""Files of weights: detecting, reading and writing them."""

from rookery.formats.combine import combine
from rookery.formats.load import assign, load, read_state, shape_of
from rookery.formats.stream import Pending, write_pth, write_weights
from rookery.formats.weights import read_weights, weight_file

__all__ = [
    "Pending",
    "assign",
    "combine",
    "load",
    "read_state",
    "read_weights",
    "shape_of",
    "weight_file",
    "write_pth",
    "write_weights",
]

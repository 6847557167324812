"""Files of weights: detecting, reading and writing them."""

from rookery.formats.combine import combine
from rookery.formats.load import assign, load, read_state, shape_of
from rookery.formats.weights import read_weights, weight_file, write_pth

__all__ = ["assign", "combine", "load", "read_state", "read_weights", "shape_of", "weight_file", "write_pth"]

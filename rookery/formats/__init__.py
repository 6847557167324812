"""Files of weights: detecting, reading and writing them."""

from rookery.formats.adapter import AdapterFile, Base, read_adapter, write_adapter
from rookery.formats.adapter_peft import write_peft
from rookery.formats.combine import combine
from rookery.formats.initial import write_initial
from rookery.formats.load import assign, load, read_state, shape_of
from rookery.formats.merge import merge
from rookery.formats.stream import Pending, write_pth, write_weights
from rookery.formats.weights import read_weights, weight_file

__all__ = [
    "AdapterFile",
    "Base",
    "Pending",
    "assign",
    "combine",
    "load",
    "merge",
    "read_adapter",
    "read_state",
    "read_weights",
    "shape_of",
    "weight_file",
    "write_adapter",
    "write_initial",
    "write_peft",
    "write_pth",
    "write_weights",
]

"""The recurrences, the steps around them and the loss head: one reference each, and back-ends behind one function."""

from rookery.ops.head_loss import head_loss
from rookery.ops.linear import linear
from rookery.ops.low_rank import low_rank
from rookery.ops.mix7 import mix7
from rookery.ops.pointwise import gates7, relu_square, token_shift
from rookery.ops.wkv5 import wkv5
from rookery.ops.wkv6 import wkv6
from rookery.ops.wkv7 import wkv7

__all__ = ["gates7", "head_loss", "linear", "low_rank", "mix7", "relu_square", "token_shift", "wkv5", "wkv6", "wkv7"]

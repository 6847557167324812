"""The recurrences and the loss head: one reference each, and back-ends behind one function."""

from rookery.ops.head_loss import head_loss
from rookery.ops.linear import linear
from rookery.ops.wkv5 import wkv5
from rookery.ops.wkv6 import wkv6
from rookery.ops.wkv7 import wkv7

__all__ = ["head_loss", "linear", "wkv5", "wkv6", "wkv7"]

"""The recurrences and the loss head: one reference each, and back-ends behind one function."""

from rookery.ops.wkv7 import wkv7

__all__ = ["wkv7"]

"""Rookery raises RWKV language models. See `rookery --help`; in Python, start with `rookery.load`."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["State", "__version__", "load"]

if TYPE_CHECKING:
    from rookery.formats import load
    from rookery.models import State


def __getattr__(name: str) -> Any:
    """Import `load` and `State` (and with them torch) at first use, so that `import rookery` stays instant."""
    if name == "load":
        from rookery.formats import load

        return load
    if name == "State":
        from rookery.models import State

        return State
    raise AttributeError(f"module 'rookery' has no attribute {name!r}")

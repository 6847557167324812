"""Typed configuration: one tree that makes flags, TOML, forms and documentation. Never imports torch."""

from rookery.config.tree import TrainConfig

__all__ = ["TrainConfig"]

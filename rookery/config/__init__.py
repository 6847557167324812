"""Typed configuration: one tree that makes flags, TOML, forms and documentation. Never imports torch."""

from rookery.config.origin import Origin, Origins, origins_of
from rookery.config.parse import Parsed, parse
from rookery.config.resolve import Resolved, resolve, with_custom
from rookery.config.tree import TrainConfig
from rookery.config.write import Difference, differences, samples_of_step, to_toml

__all__ = [
    "Difference",
    "Origin",
    "Origins",
    "Parsed",
    "Resolved",
    "TrainConfig",
    "differences",
    "origins_of",
    "parse",
    "resolve",
    "samples_of_step",
    "to_toml",
    "with_custom",
]

"""Measuring a model."""

from rookery.eval import arithmetic, perplexity
from rookery.eval.report import write_report

__all__ = ["arithmetic", "perplexity", "write_report"]

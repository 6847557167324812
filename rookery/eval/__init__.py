"""Measuring a model."""

from rookery.eval import arithmetic, perplexity
from rookery.eval.report import check_place, write_report

__all__ = ["arithmetic", "check_place", "perplexity", "write_report"]

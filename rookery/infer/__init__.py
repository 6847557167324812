"""Inference: sampling, streaming answers, many answers at once, conversations."""

from rookery.infer.engine import Generation, complete, generate, read
from rookery.infer.sampler import Sampler, Sampling, probabilities
from rookery.infer.sequence import Sequence

__all__ = ["Generation", "Sampler", "Sampling", "Sequence", "complete", "generate", "probabilities", "read"]

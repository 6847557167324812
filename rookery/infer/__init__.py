"""Inference: sampling, streaming answers, many answers at once, conversations."""

from rookery.infer.conversation import Conversation
from rookery.infer.engine import Generation, complete, generate, read
from rookery.infer.open import find_tokenizer, open_model
from rookery.infer.sampler import Sampler, Sampling, probabilities
from rookery.infer.sequence import Sequence

__all__ = [
    "Conversation",
    "Generation",
    "Sampler",
    "Sampling",
    "Sequence",
    "complete",
    "find_tokenizer",
    "generate",
    "open_model",
    "probabilities",
    "read",
]

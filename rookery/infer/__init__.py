"""Inference: sampling, streaming answers, many answers at once, conversations."""

from rookery.infer.cache import PrefixCache
from rookery.infer.constraint import Constraint, Guide
from rookery.infer.conversation import Conversation
from rookery.infer.engine import Busy, Closed, Engine, Load
from rookery.infer.forms import Form, PlainForm
from rookery.infer.generation import Generation, complete, generate, read
from rookery.infer.open import find_tokenizer, open_model
from rookery.infer.request import Answer, Handle, Piece, Request, Token, Usage
from rookery.infer.sampler import Sampler, Sampling, probabilities
from rookery.infer.sequence import Sequence

__all__ = [
    "Answer",
    "Busy",
    "Closed",
    "Constraint",
    "Conversation",
    "Engine",
    "Form",
    "Generation",
    "Guide",
    "Handle",
    "Load",
    "Piece",
    "PlainForm",
    "PrefixCache",
    "Request",
    "Sampler",
    "Sampling",
    "Sequence",
    "Token",
    "Usage",
    "complete",
    "find_tokenizer",
    "generate",
    "open_model",
    "probabilities",
    "read",
]

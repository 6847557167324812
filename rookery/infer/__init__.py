"""Inference: sampling, streaming answers, many answers at once, conversations."""

from rookery.infer.cache import PrefixCache
from rookery.infer.constraint import Constraint, Guide
from rookery.infer.conversation import Conversation
from rookery.infer.cpu7 import CPU7Form
from rookery.infer.engine import Engine
from rookery.infer.forms import Form, GraphForm, PackedForm, PlainForm, form_of
from rookery.infer.generation import Generation, complete, generate, read
from rookery.infer.open import DTYPES, find_tokenizer, open_form, open_model
from rookery.infer.request import Answer, Handle, Piece, Request, Token, Usage
from rookery.infer.sampler import NoNumbers, Sampler, Sampling, probabilities
from rookery.infer.sequence import Sequence
from rookery.infer.template import TEMPLATES, Template
from rookery.infer.work import Busy, Closed, Load

__all__ = [
    "DTYPES",
    "TEMPLATES",
    "Answer",
    "Busy",
    "CPU7Form",
    "Closed",
    "Constraint",
    "Conversation",
    "Engine",
    "Form",
    "Generation",
    "GraphForm",
    "Guide",
    "Handle",
    "Load",
    "NoNumbers",
    "PackedForm",
    "Piece",
    "PlainForm",
    "PrefixCache",
    "Request",
    "Sampler",
    "Sampling",
    "Sequence",
    "Template",
    "Token",
    "Usage",
    "complete",
    "find_tokenizer",
    "form_of",
    "generate",
    "open_form",
    "open_model",
    "probabilities",
    "read",
]

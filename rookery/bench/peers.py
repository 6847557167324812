"""Other programs that Rookery is compared with, and whether they can run here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from rookery.errors import UserError
from rookery.i18n import _

PACKAGES = {
    "torch": ("torch", "torch"),
    "fla": ("fla", "flash-linear-attention"),
    "rwkv": ("rwkv", "rwkv"),
    "llama": ("llama_cpp", "llama-cpp-python"),
    "pyrwkv": ("pyrwkv_tokenizer", "pyrwkv-tokenizer"),
}
"""Name -> module, and what pip calls it. "torch" is the same computation in plain PyTorch operations."""

DOES = {
    "train": ("torch", "fla"),
    "op": ("torch", "fla"),
    "infer": ("torch", "rwkv", "llama"),
    "data": ("rwkv", "pyrwkv"),
}
"""What is measured -> peers that do it too."""


def choose(wanted: Sequence[str], benchmark: str, device: str, version: str = "x070") -> tuple[list[str], list[str]]:
    """Of the peers in `wanted`, those that can run here, and for each other one sentence that says why not.

    Raises:
        UserError: a name is unknown.
    """
    able, refused = [], []
    for name in dict.fromkeys(wanted):
        if name not in PACKAGES:
            raise UserError(_("{name} is none of {known}", name=name, known=", ".join(PACKAGES)))
        reason = _refusal(name, benchmark, device, version)
        if reason:
            refused.append(f"{name}: {reason}")
        else:
            able.append(name)
    return able, refused


def _refusal(name: str, benchmark: str, device: str, version: str) -> str | None:
    module, package = PACKAGES[name]
    if name not in DOES[benchmark]:
        return _("it does not do what rookery bench {benchmark} measures", benchmark=benchmark)
    if importlib.util.find_spec(module) is None:
        return _("it is not installed (pip install {package})", package=package)
    if name == "fla" and device != "cuda":
        return _("its kernels need a GPU")
    if name == "llama" and device != "cpu":
        return _("it is compared on a CPU only")
    if name == "llama" and importlib.util.find_spec("gguf") is None:
        return _("its files need the package gguf: python -m pip install 'rookery[gguf]'")
    if version != "x070" and benchmark != "op" and (benchmark, name) != ("infer", "rwkv"):
        return _("it is compared with x070 only, not with {version}", version=version)
    return None

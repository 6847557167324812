"""Why a run or a command failed: a stable code, the cause and the remedy.

A failure is known by the sentence that Rookery says (in either language, as the catalogue has it) or by what PyTorch
and the operating system say. What is not known gets RK900 and keeps its own words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache

from rookery.i18n import N_, catalogue
from rookery.ui.metrics import Metrics


@dataclass(frozen=True)
class Failure:
    """One kind of failure.

    Attributes:
        code: never changes, so that it can be looked up and reported.
        cause, remedy: English sentences with a translation.
        sentences: what Rookery says when it happens: keys of the catalogue, long ones by how they begin ("…").
        patterns: regular expressions for what others say.
    """

    code: str
    cause: str
    remedy: str
    sentences: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


FAILURES = (
    Failure(
        "RK301",
        N_("The GPU has too little memory for this."),
        N_(
            "Lower the micro batch or set it to 0 (as many as fit), turn on gradient checkpointing, shorten the "
            "context, or keep the base in int8 or nf4."
        ),
        patterns=(r"CUDA out of memory", r"torch\.(cuda\.)?OutOfMemoryError", r"CUDA error: out of memory"),
    ),
    Failure(
        "RK302",
        N_("The machine has too little memory for this."),
        N_(
            "Close other programs, lower the micro batch or the context, turn on gradient checkpointing, or take a "
            "smaller model."
        ),
        sentences=("the helper process ended; memory may have run out", "Out of memory: {reason}"),
        patterns=(r"\bMemoryError\b", r"DefaultCPUAllocator: (can't|not enough)", r"std::bad_alloc", r"os error 1455"),
    ),
    Failure(
        "RK304",
        N_("The training needs more memory than there is."),
        N_("The message lists changes that would fit; the form offers the same ones beside Memory."),
        sentences=(
            "this training does not fit into memory.",
            "the device ran out of memory at step {step}.",
        ),
    ),
    Failure(
        "RK303",
        N_("The disk is full, or a quota is used up."),
        N_("Make room and press Resume: the run goes on from its last checkpoint."),
        sentences=(
            "{folder} cannot be written: {reason}. Make room and run the same command again…",
            "cannot save a checkpoint in {folder}: {reason}. Earlier checkpoints are untouched…",
        ),
        patterns=(
            r"No space left on device",
            r"File too large",
            r"Disk quota exceeded",
            r"\[Errno (27|28|122)\]",
            r"\[WinError 112\]",
            r"not enough space on the disk",
        ),
    ),
    Failure(
        "RK101",
        N_("There is no training data at this path."),
        N_("Choose a .jsonl file, a folder of .txt files, or the prefix of data that were converted."),
        sentences=(
            "no training data: give data_file",
            "data_file {name}: there is no {prefix}.bin and {prefix}.idx, and it is no .jsonl, .txt or .npy…",
            "{path} does not exist; binidx data is a pair NAME.bin and NAME.idx",
            "the folder {path} has no .txt files",
        ),
    ),
    Failure(
        "RK102",
        N_("The data are too small for the context length."),
        N_("Shorten the context, or add data."),
        sentences=(
            "{file} has fewer than two tokens: there is nothing to predict",
            "{file} has {tokens} tokens, too few for ctx_len {ctx_len}",
            "{path} holds no documents",
            "{path} holds no tokens",
        ),
    ),
    Failure(
        "RK103",
        N_("The data were made with another vocabulary than the model has."),
        N_("Convert the text again with the vocabulary of the model (World for every official one)."),
        sentences=(
            "{file}: token {place} is id {id}, but the vocabulary has {size} ids (0 to {last})…",
            "the character {character} (U+{code:04X}) is not in the vocabulary {name}, which has {size} characters",
        ),
    ),
    Failure(
        "RK104",
        N_("The data file is damaged, or has lines that hold no text."),
        N_("The message names the line. Mend it, or convert with bad lines left out."),
        sentences=(
            "{path}, line {line}: {reason}",
            "{path} is not a binidx index: it does not begin with MMIDIDX",
            "{path} was cut short: not even its header is whole",
            "{path} has {stored} bytes where its header announces {expected}: the file was cut short or is damaged",
            "{path} is not {encoding} text",
        ),
    ),
    Failure(
        "RK105",
        N_("The magic prime does not fit the data."),
        N_("Leave it empty: it is found from the data."),
        sentences=(
            "magic_prime {prime} does not fit {tokens} tokens at ctx_len {ctx_len}; leave it out and it is found",
        ),
    ),
    Failure(
        "RK201",
        N_("The base model does not fit what was asked for."),
        N_("Leave version, layers, width and vocabulary empty: the file decides them. Or choose another base model."),
        sentences=(
            "the checkpoint {file} is of another model than was asked for:",
            "{name} does not fit the model: missing {missing}; unknown {unknown}; other shape {wrong}",
            "{path} holds {found} states of shape {sizes}; the model needs {layers} of {heads} x {size} x {size}",
        ),
    ),
    Failure(
        "RK202",
        N_("The file is no whole RWKV-5, RWKV-6 or RWKV-7 model."),
        N_("Choose a base model on the Models page: it says what each file holds."),
        sentences=(
            "{name} holds no whole RWKV model: {key} is missing",
            "{name} is a model of version {found}; Rookery knows {known}",
            "{path} is not a flat dictionary of tensors",
            "{path} holds no tensors",
            "{path} holds no RWKV model, state or adapter; its first tensor is {name}",
            "{path} is {kind}, no file of weights: choose a .pth or .safetensors",
            "{path} is a directory without rwkv-final.pth, rwkv-N.pth or rwkv-init.pth",
        ),
    ),
    Failure(
        "RK203",
        N_("The model file is damaged or was not downloaded completely."),
        N_("Copy or download it again."),
        sentences=(
            "{path} is damaged or not a PyTorch file; copy or download it again",
            "{path} is damaged or no safetensors file ({error})",
        ),
    ),
    Failure(
        "RK204",
        N_("The file would run code when it is read, and is refused."),
        N_("Take the model from a source you trust, as a plain .pth or .safetensors file."),
        sentences=("{path} holds more than tensors and would run code when read; it is refused",),
    ),
    Failure(
        "RK206",
        N_("This method needs a base model."),
        N_("Choose a base model, or take the method that trains a new one."),
        sentences=("peft {peft} begins with a trained model: give --load_model",),
    ),
    Failure(
        "RK205",
        N_("The adapter or state does not belong to this base model."),
        N_("Choose the model that it was trained on: the Models page says which one fits."),
        sentences=(
            "{adapter} belongs to {own} ({own_dimensions}), not to a model like {file} ({dimensions})",
            "{adapter} was trained on {own} (fingerprint {own_print})…",
            "the adapter does not fit the model…",
            "{folder} holds only what was trained on {base}, which is no longer there…",
        ),
    ),
    Failure(
        "RK207",
        N_("The adapter file does not say something that is needed to use it."),
        N_("The message says what to give: its alpha, or what a PiSSA began with (pissa_init, under Advanced)."),
        sentences=(
            "{path} holds no adapter; its first tensor is {name}",
            "{path} does not say its alpha, which decides how strong it is…",
            "{path} does not say what adapter it is",
            "{folder} is a PiSSA without what it began with…",
        ),
    ),
    Failure(
        "RK208",
        N_("The rank is not possible for the matrices of this model."),
        N_("Choose a smaller rank; for MiSS of the form bat, one that divides the width."),
        sentences=(
            "pissa of rank {r} is not possible for a matrix of {rows} x {columns}; give a smaller lora_r",
            "miss of rank {r} is not possible for a matrix with {columns} inputs; give a smaller lora_r",
            "miss_mode bat cuts a matrix into blocks of r x r; {rows} x {columns} is not divisible by lora_r {r}",
        ),
    ),
    Failure(
        "RK209",
        N_("The vocabulary of the model is not known."),
        N_("Put its vocab.json or vocab.txt beside it, or give the vocabulary by name."),
        sentences=(
            "{path} has {size} token ids, so its tokenizer is not World, and neither vocab.json nor…",
            "The tokenizer {name} has {ids} ids and {path} only {size}; it belongs to another model.",
        ),
    ),
    Failure(
        "RK506",
        N_("The batch does not divide the 40320 samples of a mini-epoch."),
        N_("Change micro batch or accumulation as the message says, or give the epoch steps."),
        sentences=("one optimiser step takes {batch} samples (micro_bsz x devices x num_nodes x…",),
    ),
    Failure(
        "RK401",
        N_("No NVIDIA GPU can be used, or its driver is too old for this PyTorch."),
        N_("Update the driver, or install the PyTorch that pytorch.org names for it. Without a GPU, the CPU trains."),
        patterns=(
            r"Found no NVIDIA driver",
            r"NVIDIA driver on your system is too old",
            r"no CUDA-capable device",
            r"Torch not compiled with CUDA enabled",
            r"CUDA driver version is insufficient",
            r"no kernel image is available",
        ),
    ),
    Failure(
        "RK402",
        N_("The GPU reported an error."),
        N_("Press Resume. If it happens again, update the driver and look for heat or a failing card."),
        patterns=(r"CUDA error: ", r"CUBLAS_STATUS", r"cuDNN error"),
    ),
    Failure(
        "RK403",
        N_("More devices were asked for than this machine has."),
        N_("Set Devices to what there is; the message says how many GPUs were found."),
        sentences=("{processes} processes share this machine, which has {gpus} GPUs: one process needs one GPU…",),
    ),
    Failure(
        "RK507",
        N_("One of several training processes was lost, or they cannot reach each other."),
        N_("The message names it and its place. Press Resume: the run goes on from its last checkpoint."),
        sentences=(
            "rank {rank}: {reason}",
            "rank {rank} cannot join the others at {address}:{port}: {reason}",
            "rank {rank} was ended by the system or by somebody ({signal})",
        ),
    ),
    Failure(
        "RK501",
        N_("The training diverged: a loss or gradient was not finite."),
        N_("Begin a new run with a lower learning rate, more warm-up, or precision bf16 or fp32."),
        sentences=("step {step} is not finite (loss {loss}, gradient norm {norm}); first bad tensor: {tensor}…",),
    ),
    Failure(
        "RK502",
        N_("Another process trains in this run directory."),
        N_("Open that run and stop it, or give this one another run directory."),
        sentences=("{folder} is in use: process {pid} trains in it; wait for it, stop it, or take another --proj_dir",),
    ),
    Failure(
        "RK503",
        N_("The run directory holds a run with other settings."),
        N_("Give the run another directory, or the same settings to go on with it."),
        sentences=("{folder} holds a run with another configuration:\n{lines}\nGive the same values to go on with…",),
    ),
    Failure(
        "RK505",
        N_("A file or folder cannot be written."),
        N_("Check its permissions, or choose another folder."),
        sentences=("proj_dir {path} cannot be written: {reason}", "no permission: {path}"),
        patterns=(r"PermissionError", r"Permission denied", r"Read-only file system"),
    ),
    Failure(
        "RK601",
        N_("The port is taken by another program."),
        N_("Choose another port, or stop the program that has it."),
        sentences=("port {port} is taken by another program",),
        patterns=(r"[Aa]ddress already in use", r"\[Errno (98|48|10048)\]", r"only one usage of each socket address"),
    ),
    Failure(
        "RK602",
        N_("A part of Rookery is not installed."),
        N_("Install Rookery again: python -m pip install . in its folder."),
        patterns=(r"ModuleNotFoundError", r"ImportError"),
    ),
    Failure(
        "RK106",
        N_("A file is missing."),
        N_("Check the path, or choose the file again."),
        sentences=("{path} does not exist",),
        patterns=(r"FileNotFoundError", r"No such file or directory"),
    ),
)
"""In the order in which they are tried."""

KILLED = Failure(
    "RK504",
    N_("The process ended without a word: it was killed, ran out of memory, or the machine went down."),
    N_("Press Resume: the run goes on from its last checkpoint. If memory ran out, lower the micro batch first."),
)

UNKNOWN = Failure(
    "RK900",
    N_("The run ended with an error."),
    N_("Its own words are below. If they end in a traceback, it is a fault of Rookery: please report it."),
)

INVALID = Failure("RK510", N_("A setting is not valid."), N_("The message names it and what it may be."))

ALL = (*FAILURES, KILLED, UNKNOWN, INVALID)

HIGH_LOSS = Failure(
    "RK701",
    N_("The loss is above 5: the model does not recognise the data."),
    N_(
        "Check that the data were converted with the vocabulary of the base model and that the base model is the "
        "right one."
    ),
)


def explain(phase: str, text: str) -> dict[str, str]:
    """Code, cause and remedy of a run that ended in `phase` ("failed", "killed") with the words `text`."""
    return as_dict(KILLED if phase == "killed" else find(text))


@lru_cache(maxsize=64)
def find(text: str) -> Failure:
    """The failure that `text` tells of."""
    for failure in FAILURES:
        if any(told.within(text) for told in _tellings(failure)):
            return failure
    return UNKNOWN


def as_dict(failure: Failure) -> dict[str, str]:
    """For the page, which translates."""
    return {"code": failure.code, "cause": failure.cause, "remedy": failure.remedy}


def warnings(metrics: Metrics, *, new_model: bool) -> list[dict[str, str]]:
    """What is odd about a run that goes on. A new model begins at the logarithm of its vocabulary and may stay above 5
    for long; one that was trained before and does so reads something that it does not know."""
    recent = sorted(metrics.columns["loss"][-20:])
    high = not new_model and len(recent) == 20 and recent[10] > 5
    return [as_dict(HIGH_LOSS)] if high else []


@dataclass(frozen=True)
class _Telling:
    """One way in which a failure is told: a pattern, and what it cannot do without, which is quicker to look for."""

    pattern: re.Pattern[str]
    parts: tuple[str, ...] = ()

    def within(self, text: str) -> bool:
        return all(part in text for part in self.parts) and self.pattern.search(text) is not None


@cache
def _tellings(failure: Failure) -> tuple[_Telling, ...]:
    spoken = [text for sentence in failure.sentences for pair in said(sentence) for text in pair]
    return (*(_Telling(re.compile(pattern)) for pattern in failure.patterns), *map(_template, spoken))


def said(sentence: str) -> list[tuple[str, str]]:
    """The sentences of the catalogue, English and Chinese, that `sentence` means."""
    if not sentence.endswith("…"):
        return [(sentence, catalogue()[sentence])] if sentence in catalogue() else []
    opening = sentence.removesuffix("…")
    return [(english, chinese) for english, chinese in catalogue().items() if english.startswith(opening)]


def _template(sentence: str) -> _Telling:
    """`sentence` with anything in its places, on lines of its own."""
    parts = re.split(r"{\w+[^}]*}", sentence)
    pattern = "(?ms)^" + ".+?".join(map(re.escape, parts)) + ("" if sentence.endswith(":") else r"\s*$")
    return _Telling(re.compile(pattern), tuple(parts))

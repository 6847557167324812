"""The configuration of a training run: one tree of pydantic models.

The leaf names are the field's own and unique in the whole tree, so a leaf is also a flag (``--ctx_len 512``), a TOML
key under its section, a field of the console's form and a row of the reference page. ``None`` means "not given": the
value is found when the run is resolved, from the checkpoint, the data or a rule; `rookery train --explain` says which.
"""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

VERSIONS = ("x052", "x060", "x070")
Version = Literal["x052", "x060", "x070"]
Strategy = Literal[
    "auto",
    "single",
    "ddp",
    "fsdp",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
]


class Section(BaseModel):
    """One table of the TOML file."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)


class ModelSection(Section):
    """Architecture. With `load_model`, everything is read from the file."""

    load_model: str = Field("", description="Checkpoint to start from (.pth, .safetensors or a run directory)")
    load_partial: int = Field(
        0, ge=0, le=1, description="1 = parameters that the checkpoint lacks begin with initial values"
    )
    version: Version | None = Field(None, description="Architecture: x052 (RWKV-5), x060 (RWKV-6) or x070 (RWKV-7)")
    n_layer: int | None = Field(None, ge=1, description="Number of blocks")
    n_embd: int | None = Field(None, ge=32, multiple_of=32, description="Width of the residual stream")
    dim_att: int | None = Field(None, ge=32, multiple_of=32, description="Width of time mixing; n_embd when not given")
    dim_ffn: int | None = Field(
        None, ge=32, multiple_of=32, description="Width of channel mixing (x052, x060); x070 always uses 4 n_embd"
    )
    head_size: int = Field(64, ge=8, multiple_of=8, description="Channels of one time-mixing head")
    head_size_divisor: int = Field(
        8,
        ge=1,
        description="The normalisation after the recurrence has epsilon 1e-5 times its square; 8 in every release",
    )
    vocab_size: int | None = Field(None, ge=0, description="Number of token ids; 0 builds a character vocabulary")
    decay_low_rank_dim: int | None = Field(None, ge=1, description="Rank of the decay low-rank layer (x070: w1, w2)")
    a_low_rank_dim: int | None = Field(None, ge=1, description="Rank of the in-context learning rate layer (a1, a2)")
    v_low_rank_dim: int | None = Field(None, ge=1, description="Rank of the value residual layer (v1, v2)")
    gate_low_rank_dim: int | None = Field(None, ge=1, description="Rank of the gate layer (g1, g2)")
    rank_rule: Literal["current", "g1"] = Field(
        "current",
        description="Rule for ranks not given: RWKV-LM's current formulas, or those of the released G1 models",
    )
    head_qk: int = Field(
        0, ge=0, description="Width of head_qk (x052, x060), which scores tokens of the text; 0 = none"
    )
    tiny_att_dim: int = Field(0, ge=0, description="Width of tiny attention (x052, x060); 0 = none")
    tiny_att_layer: int | None = Field(None, ge=0, description="Block that has tiny attention, from 0")
    my_pos_emb: int = Field(
        0,
        ge=0,
        description="Side of the position embedding (x052, x060), which has room for its square - 1 tokens; 0 = none",
    )
    pre_ffn: int = Field(
        0, ge=0, le=1, description="1 = block 0 has a second channel mixing for time mixing (x052, x060)"
    )


class DataSection(Section):
    """What the model reads."""

    data_file: str = Field("", description="Training data: binidx prefix, .jsonl, .txt, .npy or a folder of .txt files")
    data_type: Literal["auto", "binidx", "jsonl", "utf-8", "utf-16le", "numpy", "uint16", "dummy"] = Field(
        "auto", description="Format of data_file; auto detects it"
    )
    tokenizer: str = Field("", description="world, char or a vocabulary file; found from the data when not given")
    ctx_len: int = Field(1024, ge=1, description="Tokens of one sample")
    my_exit_tokens: int | None = Field(None, description="Tokens to train on; all of the data, once, when not given")
    magic_prime: int | None = Field(None, ge=0, description="Prime of the sampler; computed when not given")
    data_format: Literal["auto", "text", "messages", "sharegpt", "alpaca", "prompt"] = Field(
        "auto", description="What the rows of a .jsonl or .json file are; auto detects it"
    )
    template: Literal["world", "g1"] = Field(
        "world", description="How conversations become text: world, or g1 with thoughts and tool calls"
    )
    sft_field: list[str] | None = Field(
        None, description="Names of the two fields of a row that hold prompt and completion, when they are other ones"
    )
    sft_split: str = Field("train", description="Rows to use, such as train[:1000]; train = all")
    loss_mask: Literal["auto", "none", "pad", "qa", "se", "answer"] = Field(
        "auto",
        description="Which targets count: none or pad = all, answer = what the assistant says, qa = the same with its "
        "mark (RWKV-PEFT), se = between mask_id marks; auto = answer for conversations, none for other data",
    )
    mask_id: dict[str, str] | None = Field(
        None, description="Marks of loss_mask se: mask0 ends, mask1 begins a trained span"
    )
    dataload: Literal["auto", "get", "pad", "only", "pack"] = Field(
        "auto",
        description="get = windows of the whole token stream; pad = one document a sample, padded or cut; only = the "
        "same without padding, one at a time; pack = several whole documents a sample, each with a state of its own; "
        "auto = pack for conversations, get for other data",
    )
    epochs: int = Field(
        1, ge=1, description="Passes over the data, when neither my_exit_tokens nor epoch_count says the length"
    )
    data_shuffle: int = Field(
        1, ge=0, le=1, description="Order of documents (pad, only, pack): 1 = shuffled in each pass, 0 = as in the file"
    )
    mix: list[str] = Field(
        [], description="Other data to replay against forgetting, each PREFIX:SHARE, such as pile:0.1"
    )
    my_sample_len: int = Field(0, ge=0, description="Tokens of a row of uint16 data; 0 = one stream without rows")
    my_pile_version: Literal[1, 2] = Field(
        1, description="2 = data_file is a text file that lists binidx prefixes, one a line, with their weights"
    )
    my_pile_shift: int = Field(-1, ge=-1, description="Tokens by which every window is moved on; -1 = 0")
    my_random_steps: int = Field(0, ge=0, description="Samples at the beginning that are windows at random places")
    my_qa_mask: Literal[0, 1, 2] = Field(
        0,
        description="1 = every other sample is from qa_mix_file, the others train answers only; 2 = without that mask",
    )
    qa_mix_file: str = Field("", description="binidx data that my_qa_mask mixes in (the Pile, in the reference)")
    val_file: str = Field("", description="Data for the validation loss, in any format of data_file")
    val_split: float = Field(
        0.0, ge=0, lt=1, description="Part of the documents held out for the validation loss, when there is no val_file"
    )
    val_every: int = Field(0, ge=0, description="Optimiser steps between validations; 0 = at the end of a mini-epoch")
    early_stop: int = Field(
        0, ge=0, description="Validations without a better loss after which the run ends; 0 = it never does"
    )
    num_workers: int = Field(0, ge=0, description="Processes that read data; 0 reads in the training process")


class OptimSection(Section):
    """Optimiser, learning rate and regularisation."""

    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps AdamW's two moments in 8 bits: 6 bytes a trained parameter less"
    )
    master_weights: int = Field(
        1,
        ge=0,
        le=1,
        description="With precision bf16: 1 = the optimiser keeps fp32 weights; 0 = it changes the bf16 ones, rounding "
        "them up or down by chance: 6 bytes a trained parameter less",
    )
    lr_init: float | None = Field(None, ge=0, description="First learning rate; 0.45/n_embd, rounded, when not given")
    lr_final: float | None = Field(None, ge=0, description="Last learning rate; 0.04/n_embd, rounded, when not given")
    warmup_steps: int = Field(-1, ge=-1, description="Warm-up in optimiser steps; -1 = 10, as the published scripts")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW beta 2")
    adam_eps: float | None = Field(None, gt=0, description="AdamW epsilon; 1e-18 (1e-8 for x052) when not given")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of emb, head and the large matrices")
    weight_decay_final: float = Field(
        -1.0, description="Weight decay at the end, approached exponentially; -1 = constant"
    )
    grad_clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 = no clipping")
    my_pile_edecay: int = Field(
        0, ge=0, description="Mini-epochs before the decay over mini-epochs begins, which my_exit_tokens <= 0 chooses"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Part of the residual stream dropped in training (x052, x060)")
    layerwise_lr: int = Field(
        1, ge=0, le=1, description="1 = decay parameters learn faster, as the reference's groups do"
    )


class AdapterSection(Section):
    """Fine-tuning: what is trained beside a model that stays as it is."""

    peft: Literal["none", "state", "lora", "dora", "pissa", "miss"] = Field(
        "none",
        description="none = all weights train; state = the initial state of each block, blocks.N.att.time_state; "
        "lora, dora, pissa, miss = an adapter",
    )
    adapter_load: str = Field("", description="Adapter file or its run directory to go on from")
    lora_r: int = Field(64, ge=1, description="Rank of the adapter")
    lora_alpha: float = Field(192.0, gt=0, description="Strength of lora and dora: their output counts alpha / r times")
    lora_dropout: float = Field(0.01, ge=0, lt=1, description="Part of the input dropped before lora and dora")
    rslora: bool = Field(False, description="Strength alpha / sqrt(r) in place of alpha / r (rsLoRA)")
    lora_plus_ratio: float = Field(
        1.0, gt=0, description="Learning rate of lora_B over that of lora_A (LoRA+: 16); 1 = the same"
    )
    target_modules: list[str] | None = Field(
        None, description="Matrices that get an adapter, such as att.key ffn.value; all large ones when not given"
    )
    train_parts: list[str] = Field(
        [], description="Base parameters that train as well: time, ln, emb, head; they are kept in the adapter file"
    )
    miss_mode: Literal["bone", "bat"] = Field("bone", description="Form of miss: bone, or bat with block products")
    pissa_init: str = Field(
        "", description="init_pissa.pth of an adapter_load file of RWKV-PEFT or RWKV Runner, which does not hold it"
    )
    svd_niter: int = Field(4, ge=0, description="Iterations of the fast SVD that pissa begins with")
    quant: Literal["none", "int8", "nf4"] = Field(
        "none", description="How the frozen matrices are kept: as they are, or in 8 or 4 bits"
    )
    merge: int = Field(
        0, ge=0, le=1, description="1 = beside each adapter file, also write rwkv-N.pth with the adapter merged in"
    )


class RunSection(Section):
    """Length, files and numerics of the run."""

    proj_dir: str = Field("out", description="Run directory")
    train_stage: Literal[0, 1, 2, 3, 4] = Field(
        3,
        description="0 = train; 1 = write rwkv-init.pth and exit; "
        "2, 3, 4 = train, going on from the newest rwkv-N.pth; "
        "2 = time mixing learns faster (x052, x060), 4 = windows at random places",
    )
    train_type: Literal["normal", "infctx"] = Field(
        "normal", description="infctx = a sample is read in chunks of chunk_ctx tokens, the state passing between them"
    )
    chunk_ctx: int = Field(512, ge=1, description="Tokens of a chunk with train_type infctx")
    infctx_grad: Literal["truncated", "full"] = Field(
        "truncated",
        description="Gradients between chunks: truncated = none; full = as without chunks, reading each one twice",
    )
    micro_bsz: int = Field(
        12, ge=0, description="Sequences of one forward pass on one device; 0 (auto) = as many as fit into memory"
    )
    accumulate_grad_batches: int = Field(1, ge=1, description="Forward passes for one optimiser step")
    epoch_steps: int | None = Field(
        None, ge=1, description="Optimiser steps of a mini-epoch; 40320 samples when not given"
    )
    epoch_count: int | None = Field(None, ge=0, description="Mini-epochs; from my_exit_tokens when not given")
    epoch_begin: int = Field(0, ge=0, description="Number of the first mini-epoch")
    epoch_save: int = Field(1, ge=0, description="Mini-epochs between rwkv-N.pth files; 0 = only the last")
    my_exit: int | None = Field(None, ge=0, description="Number of the mini-epoch after which the run ends early")
    save_every: int | None = Field(
        None, ge=0, description="Optimiser steps between full checkpoints; by time when not given"
    )
    random_seed: int = Field(-1, description="Seed of everything random; -1 = 0, so that a run can be repeated")
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = Field(
        None, description="fp32, tf32, fp16 or bf16; bf16 on a GPU that has it and fp32 on a CPU when not given"
    )
    grad_cp: int = Field(0, ge=0, le=1, description="1 = recompute activations of each block to save memory")
    offload_activations: int = Field(
        0,
        ge=0,
        le=1,
        description="1 = the inputs of blocks wait for the backward pass in the host's memory (grad_cp 1)",
    )
    head_chunk: int = Field(0, ge=0, description="Tokens whose logits exist at one time in the loss; 0 = chosen")
    kernel: Literal["auto", "reference", "chunked", "native", "triton", "fla"] = Field(
        "auto",
        description="Back-end of the recurrence and the steps beside it; auto takes the fastest that serves the call",
    )


class DeviceSection(Section):
    """Where it runs."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = Field("auto", description="auto = the GPU if there is one")
    devices: int = Field(1, ge=1, description="Devices of one machine")
    num_nodes: int = Field(1, ge=1, description="Machines")
    strategy: Strategy = Field("auto", description="How several devices share the work; one device needs none")
    context_parallel: int = Field(
        1, ge=1, description="Devices that share each sample, every one its part of the tokens; for long ctx_len"
    )
    ds_bucket_mb: int = Field(200, ge=1, description="Millions of elements that DeepSpeed exchanges at a time")

    @property
    def groups(self) -> int:
        """Groups of devices that share samples; without `context_parallel`, devices."""
        return self.devices * self.num_nodes // self.context_parallel


class LogSection(Section):
    """What is reported, and where."""

    wandb: str = Field("", description="Weights & Biases project; empty = off")
    run_name: str = Field("", description="Name of the run in Weights & Biases; made from the model when not given")
    tensorboard: bool = Field(False, description="Also write TensorBoard files into the run directory")
    log_every: int = Field(1, ge=1, description="Optimiser steps between lines of metrics.jsonl")


class TrainConfig(Section):
    """Everything that decides a training run.

    Leaves may be given in their section (``TrainConfig(data={"ctx_len": 512})``) or flat
    (``TrainConfig(ctx_len=512)``).
    """

    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    run: RunSection = Field(default_factory=RunSection)
    device: DeviceSection = Field(default_factory=DeviceSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="before")
    @classmethod
    def _accept_flat_keys(cls, values: Any) -> Any:
        """Move flat leaves into their sections, on a copy; a flat leaf overrides the same leaf of a given section."""
        if not isinstance(values, dict):
            return values
        tree = {key: value for key, value in values.items() if key not in SECTION_OF}
        for leaf, value in values.items():
            if leaf in SECTION_OF:
                section = tree.get(SECTION_OF[leaf], {})
                given = section.model_dump(exclude_unset=True) if isinstance(section, Section) else section
                tree[SECTION_OF[leaf]] = {**given, leaf: value}
        return tree


SECTION_OF: dict[str, str] = {
    leaf: name
    for name, field in TrainConfig.model_fields.items()
    for leaf in field.annotation.model_fields  # type: ignore[union-attr]
}
"""Leaf name -> name of its section."""


def section_model(name: str) -> type[Section]:
    """The class of section `name`."""
    return TrainConfig.model_fields[name].annotation  # type: ignore[return-value]


def leaf_field(leaf: str) -> FieldInfo:
    """Type, default and description of `leaf`."""
    return section_model(SECTION_OF[leaf]).model_fields[leaf]


def choices(leaf: str) -> tuple[Any, ...]:
    """The values `leaf` may have, when they are few and named; else ``()``."""
    found: list[Any] = []
    for part in _alternatives(leaf_field(leaf).annotation):
        if get_origin(part) is Literal:
            found.extend(get_args(part))
    return tuple(found)


def value_type(leaf: str) -> type:
    """The Python type of a value of `leaf`: int, float, bool, str, list or dict; with choices, that of a choice."""
    named = choices(leaf)
    if named:
        return type(named[0])
    first = next(part for part in _alternatives(leaf_field(leaf).annotation) if part is not type(None))
    return get_origin(first) or first


def allowed(leaf: str) -> str:
    """What a value of `leaf` may be, for people: its choices, or the name of its type."""
    return "|".join(str(choice) for choice in choices(leaf)) or value_type(leaf).__name__


def get(config: TrainConfig, leaf: str) -> Any:
    """The value of `leaf` in `config`."""
    return getattr(getattr(config, SECTION_OF[leaf]), leaf)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)

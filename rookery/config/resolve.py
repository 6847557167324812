"""Every value a run needs, made concrete from checkpoint, data, machine and rules, each with its origin.

No torch here: the facts come in as plain dictionaries, so that the same function serves `rookery train`, its
``--explain`` and the console.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rookery.config import rules
from rookery.config.memory import Plan, gib, largest_micro_bsz
from rookery.config.origin import Origin, Origins, origins_of
from rookery.config.tree import SECTION_OF, DeviceSection, TrainConfig, choices, get
from rookery.errors import UserError
from rookery.i18n import _

RANK_LEAVES = {
    "w": "decay_low_rank_dim",
    "a": "a_low_rank_dim",
    "v": "v_low_rank_dim",
    "g": "gate_low_rank_dim",
    "decay": "decay_low_rank_dim",
}
"""Name of a rank in `ModelShape.ranks` -> leaf. The rank `mix` of x060 has no leaf: it follows the width."""

PART_LEAVES = ("head_qk", "tiny_att_dim", "tiny_att_layer", "my_pos_emb", "pre_ffn")
"""Optional parts of x052 and x060, by the names of `rookery.models.Parts` and of their leaves."""

DOCUMENT_SAMPLERS = ("documents", "only", "pack")
"""Samplers that pass over the data, each document once."""

OF_LORA = ("lora_alpha", "lora_dropout", "rslora")
"""What pissa and miss have not."""

DEFAULT_VERSION, DEFAULT_LAYERS, DEFAULT_WIDTH, WORLD_VOCABULARY = "x070", 6, 512, 65536
"""A new model of which nothing is said: the current generation with the sizes the reference trainers start from."""


class Resolved(NamedTuple):
    """A configuration in which everything is decided, the origin of every leaf, and what the user is told about it."""

    config: TrainConfig
    origins: Origins
    notes: list[str]


def resolve(
    config: TrainConfig,
    origins: Origins | None = None,
    *,
    model_facts: Mapping[str, Any] | None = None,
    adapter_facts: Mapping[str, Any] | None = None,
    data_facts: Mapping[str, Any] | None = None,
    device_facts: Mapping[str, Any] | None = None,
) -> Resolved:
    """`config` with every value concrete.

    Args:
        config: as parsed, or as built in Python.
        origins: those `parse` gave; found from what was set in `config` when left out.
        model_facts: what the checkpoint holds: ``file``, ``version``, ``n_layer``, ``n_embd``, ``dim_att``,
            ``dim_ffn``, ``head_size``, ``vocab_size``, ``ranks`` and ``parts`` (dicts). None: a new model is made.
        adapter_facts: what the adapter to go on with is: ``file``, and the leaves of its method and shape.
        data_facts: what the data hold: ``file``, ``data_type``, ``tokenizer``, ``vocab_size``, ``exit_tokens``,
            ``prime`` (0: too little data for the prime rule), ``sampler`` and ``samples`` of one pass. None: nothing is
            trained, and what depends on the data stays open.
        device_facts: what runs it: ``accelerator`` ("cpu" or "cuda"), ``name``, ``bf16`` (whether it is native),
            ``free`` (bytes of memory). None: the CPU.

    With a checkpoint at `train_stage` 1, a new model is made from it, of the dimensions that are given: it may have
    more token ids, more layers or another width than the file.

    Only `save_every` (None: by time), `target_modules` (None: all large matrices) and what is not used (`mask_id`,
    `sft_field`, `tiny_att_layer`, `my_exit`) may stay None.

    Raises:
        UserError: settings that disagree with the checkpoint (both sides are listed) or with each other.
    """
    resolver = _Resolver(config, origins_of(config) if origins is None else origins)
    resolver.device(device_facts or {"accelerator": "cpu", "name": "CPU", "bf16": False})
    if data_facts is not None:
        resolver.data(data_facts)
    if model_facts is not None:
        resolver.checkpoint(model_facts)
    resolver.new_model()
    if adapter_facts is not None:
        resolver.adapter(adapter_facts)
    resolver.fine_tuning()
    resolver.validation()
    resolver.optimiser()
    resolver.memory_options()
    resolver.batch_that_fits((device_facts or {}).get("free"), data_facts)
    resolver.length(data_facts)
    return Resolved(TrainConfig(**resolver.values), resolver.origins, resolver.notes)


def with_custom(config: TrainConfig, origins: Origins) -> Resolved:
    """`config` with what its method of fine-tuning does by custom where nothing else was asked for, before the data are
    opened."""
    if config.adapter.peft != "state" or origins["ctx_len"].given:
        return Resolved(config, origins, [])
    ctx_len = rules.STATE_TUNING_CTX_LEN
    custom = config.model_copy(update={"data": config.data.model_copy(update={"ctx_len": ctx_len})})
    note = _("{leaf} is {rate}, the custom of {peft} tuning", leaf="ctx_len", rate=ctx_len, peft="state")
    return Resolved(custom, {**origins, "ctx_len": Origin("rule", "peft state")}, [note])


class _Resolver:
    def __init__(self, config: TrainConfig, origins: Origins) -> None:
        self.values = {leaf: get(config, leaf) for leaf in SECTION_OF}
        self.origins = dict(origins)
        self.notes: list[str] = []

    def fill(self, leaf: str, value: Any, origin: Origin) -> None:
        """Decide an open leaf."""
        self.values[leaf] = value
        self.origins[leaf] = origin

    def fill_open(self, leaf: str, value: Any, origin: Origin, open_value: Any = None) -> None:
        """Decide `leaf` if its value is `open_value`, the one that means "not given"."""
        if self.values[leaf] == open_value:
            self.fill(leaf, value, origin)

    def device(self, facts: Mapping[str, Any]) -> None:
        machine = Origin("device", str(facts["name"]))
        wanted, found = self.values["accelerator"], facts["accelerator"]
        if wanted in ("gpu", "cuda") and found == "cpu":
            self.notes.append(
                _("there is no GPU that PyTorch can use here: the CPU trains instead of {flag}", flag=wanted)
            )
        self.fill(
            "accelerator",
            "cpu" if wanted == "cpu" else found,
            self.origins["accelerator"] if wanted == "cpu" else machine,
        )
        bf16 = self.values["accelerator"] != "cpu" and facts["bf16"]
        self.fill_open("precision", "bf16" if bf16 else "fp32", machine)
        strategy, world = self.values["strategy"], self.values["devices"] * self.values["num_nodes"]
        if world == 1 and strategy != "single":
            if strategy != "auto":
                self.notes.append(_("one device trains alone: {strategy} has nothing to share out", strategy=strategy))
            self.fill("strategy", "single", Origin("rule", _("one device")))
        self.fill_open("strategy", "ddp", Origin("rule", _("several devices")), open_value="auto")
        self._check_strategy(world)
        self._check_context_parallel(world)
        self.fill_open("random_seed", 0, Origin("rule", _("a run can be repeated")), open_value=-1)

    def _check_strategy(self, world: int) -> None:
        strategy = self.values["strategy"]
        if world > 1 and strategy == "single":
            raise UserError(
                _("strategy single is for one device, and there are {devices}: take ddp or fsdp", devices=world)
            )
        if world > 1 and strategy != "ddp" and self.values["train_type"] == "infctx":
            raise UserError(
                _(
                    "with train_type infctx the devices may read different numbers of chunks, for which strategy "
                    "{strategy} would wait in vain: take --strategy ddp",
                    strategy=strategy,
                )
            )

    def _check_context_parallel(self, world: int) -> None:
        size = self.values["context_parallel"]
        if size == 1:
            return
        if world % size:
            raise UserError(
                _(
                    "context_parallel {size}: each sample is shared by {size} devices, and there are {devices}; make "
                    "devices a multiple of it (--devices {size}), or take --context_parallel 1",
                    size=size,
                    devices=world,
                )
            )
        if self.values["train_type"] == "infctx":
            raise UserError(
                _(
                    "context_parallel and train_type infctx both cut samples into parts, and cannot be combined: leave "
                    "out one of them"
                )
            )

    def _groups(self) -> int:
        """Devices, or groups of them that share samples."""
        return DeviceSection(**{leaf: self.values[leaf] for leaf in DeviceSection.model_fields}).groups

    def data(self, facts: Mapping[str, Any]) -> None:
        origin = Origin("data", str(facts["file"]))
        self.fill_open("data_type", facts["data_type"], origin, open_value="auto")
        self.fill_open("tokenizer", facts["tokenizer"], origin, open_value="")
        for leaf in ("data_format", "dataload", "loss_mask"):
            self.fill_open(leaf, facts.get(leaf, "auto"), origin, open_value="auto")
        if not self.values["magic_prime"]:
            self.fill("magic_prime", facts["prime"], origin)
        if not self.values["vocab_size"]:
            self.fill("vocab_size", facts["vocab_size"], origin)

    def checkpoint(self, facts: Mapping[str, Any]) -> None:
        """Take the architecture from a file; what was asked for must agree with it, unless the model is to grow."""
        origin = Origin("checkpoint", str(facts["file"]))
        found = {leaf: facts[leaf] for leaf in ("version", "n_layer", "n_embd", "dim_att", "head_size", "vocab_size")}
        found |= {RANK_LEAVES[rank]: size for rank, size in facts["ranks"].items() if rank in RANK_LEAVES}
        found |= {leaf: int(facts.get("parts", {}).get(leaf, 0)) for leaf in PART_LEAVES}
        if facts["version"] != "x070":
            found["dim_ffn"] = facts["dim_ffn"]
        may_differ = set(PART_LEAVES) if self.values["load_partial"] else set()
        if self.values["train_stage"] == 1:
            may_differ = found.keys() - {"version"}
            if self.values["n_embd"] not in (None, found["n_embd"]):
                found = {leaf: value for leaf, value in found.items() if leaf not in ("dim_att", "dim_ffn")}
        conflicts = []
        for leaf, value in found.items():
            asked, given = self.values[leaf], self.origins[leaf].given
            if leaf in may_differ and asked and given:
                continue
            if asked and asked != value and (given or leaf == "vocab_size"):
                said = {"leaf": leaf, "asked": asked, "origin": self.origins[leaf], "value": value}
                conflicts.append(_("  {leaf}: {asked} ({origin}), the file has {value}", **said))
            if not (given and asked == value):
                self.fill(leaf, value, origin)
        if conflicts:
            heading = _("the checkpoint {file} is of another model than was asked for:", file=facts["file"])
            remedy = _("Leave out what the file decides, or load another file.")
            raise UserError("\n".join([heading, *conflicts, remedy]))

    def adapter(self, facts: Mapping[str, Any]) -> None:
        """Take method and shape from an adapter's file; what was asked for must agree with it."""
        origin = Origin("checkpoint", str(facts["file"]))
        for leaf, value in facts.items():
            if leaf == "file" or (leaf in OF_LORA and facts["peft"] in ("pissa", "miss")):
                continue
            if self.origins[leaf].given and self.values[leaf] != value:
                raise UserError(
                    _(
                        "{file} is an adapter with {leaf} {value}; you ask for {asked} ({origin}). Leave it out, or "
                        "begin a new adapter without adapter_load.",
                        file=facts["file"],
                        leaf=leaf,
                        value=value,
                        asked=self.values[leaf],
                        origin=self.origins[leaf],
                    )
                )
            if not self.origins[leaf].given:
                self.fill(leaf, value, origin)
        if self.values["miss_mode"] not in choices("miss_mode"):
            raise UserError(
                _(
                    "{file} has the form bat of Hugging Face peft, which can be merged but not trained further",
                    file=facts["file"],
                )
            )

    def new_model(self) -> None:
        """The architecture of a new model; of a loaded one, only what no file records."""
        self.fill_open("version", DEFAULT_VERSION, Origin("rule", _("the current generation")))
        self.fill_open("n_layer", DEFAULT_LAYERS, Origin("rule", _("the reference's default")))
        self.fill_open("n_embd", DEFAULT_WIDTH, Origin("rule", _("the reference's default")))
        if not self.values["vocab_size"]:
            self.fill("vocab_size", WORLD_VOCABULARY, Origin("rule", _("the World vocabulary")))
        version, n_layer, n_embd = self.values["version"], self.values["n_layer"], self.values["n_embd"]
        self.fill_open("dim_att", n_embd, Origin("rule", "n_embd"))
        dim_ffn = rules.dim_ffn(version, n_embd)
        if version == "x070" and self.values["dim_ffn"] not in (None, dim_ffn):
            self.notes.append(_("dim_ffn is always 4 n_embd in x070: {value} is used", value=dim_ffn))
            self.values["dim_ffn"] = None
        self.fill_open("dim_ffn", dim_ffn, Origin("rule", "4 n_embd" if version == "x070" else "3.5 n_embd"))
        for rank, size in rules.ranks(version, n_layer, n_embd, self.values["rank_rule"]).items():
            if rank in RANK_LEAVES:
                self.fill_open(RANK_LEAVES[rank], size, Origin("rule", f"rank_rule {self.values['rank_rule']}"))
        self._check_heads()
        self._check_parts()

    def _check_heads(self) -> None:
        dim_att, head_size, n_embd = self.values["dim_att"], self.values["head_size"], self.values["n_embd"]
        if dim_att % head_size:
            raise UserError(
                _(
                    "time mixing is {dim_att} wide, which is not a multiple of head_size {head_size}",
                    dim_att=dim_att,
                    head_size=head_size,
                )
            )
        if self.values["version"] == "x070" and dim_att != n_embd:
            raise UserError(
                _(
                    "in x070 dim_att is n_embd: {dim_att} is not {n_embd}; leave dim_att out",
                    dim_att=dim_att,
                    n_embd=n_embd,
                )
            )

    def _check_parts(self) -> None:
        values = self.values
        if not values["tiny_att_dim"]:
            values["tiny_att_layer"] = None
        elif values["tiny_att_layer"] is None or values["tiny_att_layer"] >= values["n_layer"]:
            last = values["n_layer"] - 1
            raise UserError(_("tiny_att_dim needs tiny_att_layer, the number of a block from 0 to {last}", last=last))
        if 0 < values["my_pos_emb"] ** 2 <= values["ctx_len"]:
            raise UserError(
                _(
                    "my_pos_emb {side} has room for {places} tokens, fewer than ctx_len {ctx_len}",
                    side=values["my_pos_emb"],
                    places=values["my_pos_emb"] ** 2 - 1,
                    ctx_len=values["ctx_len"],
                )
            )
        for leaf in PART_LEAVES if values["context_parallel"] > 1 else ():
            if values[leaf]:
                raise UserError(
                    _(
                        "a model with {leaf} looks at whole samples, which context_parallel cuts into parts: take "
                        "--context_parallel 1",
                        leaf=leaf,
                    )
                )
        if values["version"] != "x070":
            return
        for leaf in PART_LEAVES:
            if values[leaf]:
                raise UserError(_("{leaf} is a part of x052 and x060; x070 has none: leave it out", leaf=leaf))
        if values["dropout"]:
            self.notes.append(_("x070 has no dropout: 0 is used"))
            values["dropout"] = 0.0

    def fine_tuning(self) -> None:
        """What each method of fine-tuning needs."""
        peft, quant = self.values["peft"], self.values["quant"]
        if peft != "none" and self.values["train_stage"] == 1:
            raise UserError(
                _(
                    "train_stage 1 writes initial weights and trains nothing: leave out --peft {peft} there, or "
                    "--train_stage 1 to train",
                    peft=peft,
                )
            )
        if quant != "none" and peft == "none":
            raise UserError(
                _(
                    "quant {quant} keeps matrices that do not train in fewer bits, but with peft none all of them "
                    "train: add --peft lora (or state, dora, pissa, miss)",
                    quant=quant,
                )
            )
        if peft in ("pissa", "miss"):
            plain = dict(zip(OF_LORA, (float(self.values["lora_r"]), 0.0, False), strict=True))
            for leaf, value in plain.items():
                self._leave_out(leaf, value)
        if peft in ("none", "state", "miss"):
            self._leave_out("lora_plus_ratio", 1.0)
        if peft in ("none", "state"):
            self._leave_out("merge", 0)
            for leaf in ("adapter_load", "train_parts"):
                if self.values[leaf]:
                    raise UserError(
                        _("{leaf} belongs to an adapter: add --peft lora (or dora, pissa, miss)", leaf=leaf)
                    )

    def _leave_out(self, leaf: str, value: Any) -> None:
        """Give `leaf`, which the method has not, the value that does nothing."""
        if self.values[leaf] == value:
            return
        peft = f"peft {self.values['peft']}"
        if self.origins[leaf].given:
            self.notes.append(_("{peft} has no {leaf}: it is left out", peft=peft, leaf=leaf))
        self.fill(leaf, value, Origin("rule", peft))

    def validation(self) -> None:
        if self.values["early_stop"] and not (self.values["val_file"] or self.values["val_split"]):
            raise UserError(
                _("early_stop watches the validation loss: give validation data with val_split or val_file")
            )

    def optimiser(self) -> None:
        peft = self.values["peft"]
        if peft == "none":
            rates, rules_of_rates = rules.learning_rates(self.values["n_embd"]), ("0.45/n_embd", "0.04/n_embd")
            eps, rule_of_eps = rules.adam_eps(self.values["version"]), str(self.values["version"])
        else:
            rates = rules.STATE_TUNING_RATES if peft == "state" else rules.ADAPTER_RATES
            rules_of_rates = (f"peft {peft}", f"peft {peft}")
            eps, rule_of_eps = rules.FINE_TUNING_EPS, f"peft {peft}"
        for leaf, rate, rule in zip(("lr_init", "lr_final"), rates, rules_of_rates, strict=True):
            if peft != "none" and self.values[leaf] is None:
                self.notes.append(_("{leaf} is {rate}, the custom of {peft} tuning", leaf=leaf, rate=rate, peft=peft))
            self.fill_open(leaf, rate, Origin("rule", rule))
        self.fill_open("adam_eps", eps, Origin("rule", rule_of_eps))
        self.fill_open("warmup_steps", rules.WARMUP_STEPS, Origin("rule", _("as the published scripts")), open_value=-1)
        name = "{vocab_size} ctx{ctx_len} L{n_layer} D{n_embd}".format_map(self.values)
        self.fill_open("run_name", name, Origin("rule", "vocab_size ctx_len n_layer n_embd"), open_value="")

    def memory_options(self) -> None:
        """What keeps less in memory, and what it needs."""
        values = self.values
        lean = [f"--optimizer {values['optimizer']}"] if values["optimizer"] != "adamw" else []
        if not values["master_weights"] and values["precision"] == "fp16":
            raise UserError(
                _("master_weights 0 needs bf16 weights: those of fp16 have too small a range. Add --precision bf16.")
            )
        if not values["master_weights"] and values["precision"] != "bf16":
            self.notes.append(
                _(
                    "precision {precision} has no other weights than fp32 ones: master_weights is 1",
                    precision=values["precision"],
                )
            )
            self.fill("master_weights", 1, Origin("rule", f"precision {values['precision']}"))
        lean += [] if values["master_weights"] else ["--master_weights 0"]
        if lean and values["strategy"].startswith("deepspeed"):
            raise UserError(
                _(
                    "{strategy} shares out an optimiser of its own: leave out {flags}, or take --strategy fsdp",
                    strategy=values["strategy"],
                    flags=" ".join(lean),
                )
            )
        if values["offload_activations"] and not values["grad_cp"]:
            self.notes.append(_("offload_activations keeps the inputs of blocks alone, so grad_cp is 1"))
            self.fill("grad_cp", 1, Origin("rule", "offload_activations"))

    def batch_that_fits(self, free: int | None, data_facts: Mapping[str, Any] | None) -> None:
        """Decide `micro_bsz` 0."""
        values = self.values
        if values["micro_bsz"]:
            return
        if free is None:
            raise UserError(_("micro_bsz 0 (auto) needs a device whose free memory is known: give a number"))
        documents = data_facts is not None and data_facts["sampler"] in DOCUMENT_SAMPLERS
        groups = self._groups()
        found = largest_micro_bsz(
            Plan.of(TrainConfig(**values)),
            free,
            whole_epochs=values["epoch_steps"] is None and not documents,
            groups=groups,
        )
        if data_facts is not None and documents:
            # More would read documents several times in one step.
            found = min(found, data_facts["samples"] // (groups * values["accumulate_grad_batches"]))
        self.fill("micro_bsz", max(1, found), Origin("device", _("{free} of memory free", free=gib(free))))

    def length(self, data_facts: Mapping[str, Any] | None) -> None:
        """Steps, mini-epochs and tokens of the run."""
        values = self.values
        batch = values["micro_bsz"] * values["accumulate_grad_batches"] * self._groups()
        if data_facts is not None and data_facts["sampler"] in DOCUMENT_SAMPLERS and batch > data_facts["samples"]:
            self.notes.append(
                _(
                    "one optimiser step takes {batch} samples, and a pass over the data has {samples}: documents are "
                    "read several times in a step; lower micro_bsz or accumulate_grad_batches",
                    batch=batch,
                    samples=data_facts["samples"],
                )
            )
        if values["epoch_steps"] is None:
            self._mini_epoch(batch, data_facts)
        tokens_per_epoch = values["epoch_steps"] * batch * values["ctx_len"]
        unlimited = values["epoch_count"] in (None, rules.UNLIMITED_EPOCHS)
        if values["my_exit_tokens"] is None and not unlimited:
            tokens = values["epoch_count"] * tokens_per_epoch
            self.fill("my_exit_tokens", tokens, Origin("rule", "epoch_count x epoch_steps x ctx_len"))
        elif values["my_exit_tokens"] is None and data_facts is not None:
            self.fill("my_exit_tokens", data_facts["exit_tokens"], Origin("data", str(data_facts["file"])))
        if not unlimited and not values["my_exit_tokens"]:
            return
        tokens = values["my_exit_tokens"] or (data_facts or {}).get("exit_tokens", 0)
        epochs = -(-abs(tokens) // tokens_per_epoch)
        if not unlimited and epochs != values["epoch_count"]:
            self.notes.append(
                _(
                    "my_exit_tokens decides the length: {epochs} mini-epochs, not {asked}",
                    epochs=epochs,
                    asked=values["epoch_count"],
                )
            )
        if tokens and epochs != values["epoch_count"]:
            self.fill("epoch_count", epochs, Origin("rule", "my_exit_tokens / (epoch_steps x ctx_len)"))

    def _mini_epoch(self, batch: int, data_facts: Mapping[str, Any] | None) -> None:
        """Of documents, one pass over them; else the reference's number of samples."""
        if data_facts is None or data_facts["sampler"] not in DOCUMENT_SAMPLERS:
            self.fill("epoch_steps", rules.epoch_steps(batch), Origin("rule", f"{rules.MINI_EPOCH} / {batch}"))
            return
        steps = -(-data_facts["samples"] // batch)
        self.fill("epoch_steps", steps, Origin("rule", _("one pass: {samples} samples", samples=data_facts["samples"])))

"""What a run decides before it begins: starting point, data, and every value of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rookery.config import Origin, Origins, Resolved, TrainConfig, origins_of, parse, resolve, with_custom
from rookery.data import Dataset, open_datasets
from rookery.errors import UserError
from rookery.formats import weight_file
from rookery.formats.beside import vocabulary_file
from rookery.i18n import _
from rookery.ops.backend import Call
from rookery.ops.wkv6 import OP as WKV6
from rookery.ops.wkv7 import OP as WKV7
from rookery.train.device import device_facts
from rookery.train.precision import DTYPES
from rookery.train.ranks import ALONE, Ranks
from rookery.train.rundir import RunFiles
from rookery.train.start import Start, find_start


@dataclass(frozen=True)
class Preparation:
    """Starting point, data and resolved configuration of a run."""

    start: Start
    dataset: Dataset
    validation: Dataset | None
    resolved: Resolved


def prepare_run(
    config: TrainConfig,
    origins: Origins | None,
    files: RunFiles,
    report: Callable[[str], None],
    ranks: Ranks | None = None,
    open_data: Callable[..., tuple[Dataset, Dataset | None]] = open_datasets,
) -> Preparation:
    """Find everything out; nothing is written.

    Args:
        report: told about each file that had to be passed over.
        ranks: those that will train; None: nothing is trained, and what is asked for is believed.
        open_data: as `open_datasets`; whoever asks again and again may remember what it gave.

    Raises:
        UserError: data or weights are missing, or do not fit what was asked for.
    """
    origins = origins_of(config) if origins is None else origins
    if ranks is not None:
        config, origins = _with_devices(config, origins, ranks)
    ranks = ranks or ALONE
    config, origins, notes = with_custom(config, origins)
    if not config.run.micro_bsz and files.config_file.exists():
        # What fitted when the run began decides its samples, whatever is free now.
        begun = parse([], files.config_file).config.run.micro_bsz
        config = config.model_copy(update={"run": config.run.model_copy(update={"micro_bsz": begun})})
    start = find_start(config, files, report, ranks)
    model_facts = start.model_facts()
    # 0 asks for a character vocabulary, whatever it was found to be in an earlier session.
    vocab_size = config.model.vocab_size
    grows = config.run.train_stage == 1 and vocab_size is not None
    if model_facts is not None and vocab_size != 0 and not grows:
        vocab_size = model_facts["vocab_size"]
    data = config.data
    if not data.tokenizer and start.file is not None:
        kept = vocabulary_file(weight_file(start.file))
        if kept is not None:
            data = data.model_copy(update={"tokenizer": str(kept)})
    dataset, validation = open_data(
        data,
        vocab_size=vocab_size,
        seed=max(0, config.run.random_seed),
        random_places=config.run.train_stage == 4,
    )
    facts = device_facts()
    if facts["accelerator"] == "cpu" or config.device.accelerator == "cpu":
        facts["free"] //= ranks.local_size
    facts["free"] = ranks.least(facts["free"])  # all must take the same batch
    resolved = resolve(
        config,
        origins,
        model_facts=model_facts,
        adapter_facts=start.adapter_facts(),
        data_facts=vars(dataset.facts),
        device_facts=facts,
    )
    resolved = _with_kernel(resolved)
    _check_agreement(ranks, str(start.checkpoint), resolved.config)
    return Preparation(start, dataset, validation, resolved._replace(notes=[*notes, *resolved.notes]))


def _with_devices(config: TrainConfig, origins: Origins, ranks: Ranks) -> tuple[TrainConfig, Origins]:
    """The configuration with as many devices and machines as whatever started the processes gave.

    Raises:
        UserError: several devices are asked for, and nothing started a process for each.
    """
    device = config.device
    if ranks.world_size == 1 and device.devices * device.num_nodes > 1:
        raise UserError(
            _(
                "--devices {devices} --num_nodes {nodes}: each device needs a process of its own, and this one was "
                "started alone. `rookery train` starts those of one machine itself; for more, see docs/en/cluster.md.",
                devices=device.devices,
                nodes=device.num_nodes,
            )
        )
    given = {"devices": ranks.local_size, "num_nodes": ranks.world_size // ranks.local_size}
    changed = [leaf for leaf, number in given.items() if getattr(device, leaf) != number]
    origins = origins | {leaf: Origin("device", ranks.launcher) for leaf in changed}
    return config.model_copy(update={"device": device.model_copy(update=given)}), origins


def _with_kernel(resolved: Resolved) -> Resolved:
    """`resolved` with a back-end that can serve the run.

    --fla and --op stand in the scripts of RWKV-PEFT, which run anywhere: what they name is answered where it cannot
    serve.

    Raises:
        UserError: the back-end that `kernel` asks for cannot serve, with the reason.
    """
    config, origin = resolved.config, resolved.origins["kernel"]
    op = WKV7 if config.model.version == "x070" else WKV6
    device = "cpu" if config.device.accelerator == "cpu" else "cuda"
    call = Call(device, DTYPES[str(config.run.precision)], int(config.model.head_size or 0))
    try:
        op.choose(call, config.run.kernel)
    except ValueError as error:
        if not origin.detail.startswith(("--fla", "--op")):
            raise UserError(
                _("--kernel {kernel}: {reason}. Without it, Rookery chooses.", kernel=config.run.kernel, reason=error)
            ) from error
        note = _("{flag}: {reason}. Rookery chooses the kernel of each call itself.", flag=origin.detail, reason=error)
        config = config.model_copy(update={"run": config.run.model_copy(update={"kernel": "auto"})})
        origins = {**resolved.origins, "kernel": Origin("device", device)}
        return Resolved(config, origins, [*resolved.notes, note])
    return resolved


def _check_agreement(ranks: Ranks, *found: object) -> None:
    """
    Raises:
        UserError: the ranks, which read the same files, did not find the same in them.
    """
    by_rank = ranks.gather(found)
    others = [rank for rank, other in enumerate(by_rank) if other != by_rank[0]]
    if others:
        raise UserError(
            _(
                "rank {rank} finds other files than rank 0: all machines must see the same data_file, load_model and "
                "proj_dir, on a file system that they share",
                rank=others[0],
            )
        )

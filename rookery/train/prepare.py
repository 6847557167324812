"""What a run decides before it begins: starting point, data, and every value of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rookery.config import Origins, Resolved, TrainConfig, origins_of, parse, resolve, with_custom
from rookery.data import Dataset, open_datasets
from rookery.formats import weight_file
from rookery.tokenizer import load_beside
from rookery.train.device import device_facts
from rookery.train.rundir import RunFiles
from rookery.train.start import Start, find_start
from rookery.train.strategies import check_devices


@dataclass(frozen=True)
class Preparation:
    """Starting point, data and resolved configuration of a run."""

    start: Start
    dataset: Dataset
    validation: Dataset | None
    resolved: Resolved


def prepare_run(
    config: TrainConfig, origins: Origins | None, files: RunFiles, report: Callable[[str], None]
) -> Preparation:
    """Find everything out; nothing is written.

    Args:
        report: told about each file that had to be passed over.

    Raises:
        UserError: data or weights are missing, or do not fit what was asked for.
    """
    check_devices(config.device)
    config, origins, notes = with_custom(config, origins_of(config) if origins is None else origins)
    if not config.run.micro_bsz and files.config_file.exists():
        # What fitted when the run began decides its samples, whatever is free now.
        begun = parse([], files.config_file).config.run.micro_bsz
        config = config.model_copy(update={"run": config.run.model_copy(update={"micro_bsz": begun})})
    start = find_start(config, files, report)
    model_facts = start.model_facts()
    # 0 asks for a character vocabulary, whatever it was found to be in an earlier session.
    vocab_size = config.model.vocab_size
    grows = config.run.train_stage == 1 and vocab_size is not None
    if model_facts is not None and vocab_size != 0 and not grows:
        vocab_size = model_facts["vocab_size"]
    data = config.data
    if not data.tokenizer and start.file is not None:
        folder = weight_file(start.file).parent
        if load_beside(folder / "vocab") is not None:
            data = data.model_copy(update={"tokenizer": str(folder)})
    dataset, validation = open_datasets(
        data,
        vocab_size=vocab_size,
        seed=max(0, config.run.random_seed),
        random_places=config.run.train_stage == 4,
    )
    resolved = resolve(
        config,
        origins,
        model_facts=model_facts,
        adapter_facts=start.adapter_facts(),
        data_facts=vars(dataset.facts),
        device_facts=device_facts(),
    )
    return Preparation(start, dataset, validation, resolved._replace(notes=[*notes, *resolved.notes]))

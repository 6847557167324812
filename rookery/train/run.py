"""A training run from configuration to rwkv-final.pth."""

from __future__ import annotations

import errno
import math
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rookery.config import Origins, Resolved, TrainConfig, differences, parse, samples_of_step, to_toml
from rookery.config.launcher import find_place
from rookery.config.memory import Plan
from rookery.config.remedies import advice
from rookery.config.tree import RunSection
from rookery.data import Dataset, open_dataset
from rookery.errors import Interrupted, UserError, ran_out_of_memory
from rookery.i18n import _
from rookery.train import checkpoint, divergence
from rookery.train.batches import batches
from rookery.train.callbacks import Callback, MetricsFile, Observers, RunFacts, StatusFile, flat
from rookery.train.context import Context
from rookery.train.device import describe, keep_freed_memory
from rookery.train.infctx import chunk_losses
from rookery.train.interrupt import StopRequest
from rookery.train.keeper import Keeper, Progress, StoppedEarly
from rookery.train.loop import Batch, LossFunction, Part, fit
from rookery.train.memory import check_memory, free_memory
from rookery.train.monitor import Diverged, Monitor
from rookery.train.precision import set_matmul_precision
from rookery.train.prepare import prepare_run
from rookery.train.progress import display
from rookery.train.ranks import RankLost, Ranks, joined
from rookery.train.rundir import Phase, RunDir, RunFiles, replace_text
from rookery.train.schedule import Schedule
from rookery.train.start import Start
from rookery.train.strategies import Engine, build_engine
from rookery.train.trackers import TensorBoard, Tracker, WandB
from rookery.train.validate import Validation
from rookery.train.weights import WeightFiles, build_model

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the operating system answers when the disk, a quota or the largest file size is used up."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended that did not fail."""

    step: int
    """Optimiser steps done, over all sessions."""
    loss: float | None
    """Smoothed training loss at the end; None when nothing was trained."""
    val_loss: float | None
    tokens: int
    """Tokens read, over all sessions."""
    proj_dir: Path
    final_path: Path
    """The weights to use: rwkv-final.pth, or rwkv-init.pth of stage 1."""
    exit_reason: str
    """For people: why it ended."""


def prepare(config: TrainConfig, origins: Origins | None = None) -> Resolved:
    """Everything that `run` would decide, from data, checkpoint and machine; nothing is written.

    Raises:
        UserError: data or weights are missing, or do not fit what was asked for.
    """
    return prepare_run(config, origins, RunFiles(config.run.proj_dir), report=lambda text: None).resolved


def run(config: TrainConfig, origins: Origins | None = None, *, callbacks: Iterable[Callback] = ()) -> RunResult:
    """Trains, or goes on training, in the run directory `config.run.proj_dir`.

    Ctrl-C and SIGTERM finish the step and save; the same call then goes on so that on a CPU all losses are those of an
    uninterrupted run, bit for bit.

    In a process that torchrun, SLURM or MPI started together with others, it trains together with them: every one of
    them calls this, and rank 0 writes the files.

    Args:
        config: what to train; open values are found from data, checkpoint and machine.
        origins: where its values came from, as `rookery.config.parse` tells, for messages.
        callbacks: followers of the run, beside those that write its files and display it.

    Raises:
        UserError: something asked for is wrong or impossible, the run directory is in use or belongs to another
            configuration, the disk is full, or the training diverged.
        Interrupted: stopped on request, with everything saved.
        RankLost: another of several processes died, hung or failed.
    """
    rundir: RunFiles = RunFiles(config.run.proj_dir)
    observers = Observers([])
    phase: Phase = "failed"
    reason = ""
    stop = StopRequest()
    try:
        with stop, joined(find_place(), config.device.accelerator) as ranks:
            if ranks.main:
                rundir = RunDir(rundir.path)
                observers = Observers([display(), *callbacks])
            if ranks.watch is not None:
                ranks.watch.on_end = partial(observers.on_end, "failed")
            result = _run(config, origins, rundir, observers, stop, ranks)
        phase, reason = "done", result.exit_reason
        return result
    except Interrupted as error:
        phase, reason = "stopped", str(error)
        raise
    except KeyboardInterrupt:
        phase, reason = "stopped", _("Stopped at once. The same command goes on from the last checkpoint.")
        raise Interrupted(reason) from None
    except (UserError, RankLost) as error:
        reason = str(error)
        raise
    except BaseException as error:
        reason = traceback.format_exc()
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            reason = _(
                "{folder} cannot be written: {reason}. Make room and run the same command again; it goes on from the "
                "last checkpoint.",
                folder=rundir.path,
                reason=error,
            )
            raise UserError(reason) from error
        raise
    finally:
        with suppress(OSError):  # on a full disk, why the run ended matters more than a last line
            observers.on_end(phase, reason)
        if isinstance(rundir, RunDir):
            rundir.close()


def _run(
    config: TrainConfig,
    origins: Origins | None,
    rundir: RunFiles,
    observers: Observers,
    stop: StopRequest,
    ranks: Ranks,
) -> RunResult:
    if isinstance(rundir, RunDir):
        observers.add(StatusFile(rundir))
    observers.on_phase("preparing")
    prepared = prepare_run(config, origins, rundir, observers.on_message, ranks)
    start, dataset = prepared.start, prepared.dataset
    config = prepared.resolved.config
    for note in [*dataset.notes, *prepared.resolved.notes]:
        observers.on_message(note)
    if config.run.train_stage != 1:
        check_memory(config, observers.on_message)
    if start.checkpoint is not None:
        _refuse_other_configuration(rundir, config)
    ranks.barrier()  # nothing was written yet, so that all have found the same
    if ranks.main:
        replace_text(rundir.config_file, to_toml(config, origins=prepared.resolved.origins))
        dataset.save_vocabulary(rundir.path)

    _set_seeds(config.run.random_seed + ranks.rank)
    set_matmul_precision(str(config.run.precision))
    keep_freed_memory()
    model = build_model(config, start, rundir, ranks)
    if config.run.train_stage == 1:
        file = rundir.weights_file("init")
        return RunResult(0, None, None, 0, rundir.path, file, _("initial weights are in {file}", file=file))
    engine = build_engine(config, model, ranks)
    progress = _restore(config, start, engine, ranks)
    weights = WeightFiles(config, start, rundir, engine, ranks)
    validation = prepared.validation
    del start, prepared  # closes the mapped weight files: Windows could not remove an old checkpoint else
    context = Context.of(ranks, config.device.context_parallel)
    return _train(config, dataset, validation, engine, weights, progress, rundir, observers, stop, context)


def _refuse_other_configuration(rundir: RunFiles, config: TrainConfig) -> None:
    """
    Raises:
        UserError: the run directory belongs to a run that would give other losses.
    """
    if not rundir.config_file.exists():
        return
    before = parse([], rundir.config_file).config
    found = differences(before, config)
    if found:
        lines = "\n".join(f"  {d.leaf}: {d.before} -> {d.after}" for d in found)
        raise UserError(
            _(
                "{folder} holds a run with another configuration:\n{lines}\n"
                "Give the same values to go on with it, or another --proj_dir to begin a new run.",
                folder=rundir.path,
                lines=lines,
            )
        )


def _set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _restore(config: TrainConfig, start: Start, engine: Engine, ranks: Ranks) -> Progress:
    """Puts engine and generators where the checkpoint left them."""
    if start.checkpoint is None or start.state is None:
        first_step = start.epoch * int(config.run.epoch_steps or 0)
        return Progress(run_first_step=first_step, step=first_step)
    engine.load(start.checkpoint)
    engine.load_state_dict(start.state["engine"])
    checkpoint.restore_random_state(start.state, ranks)
    known = [field.name for field in fields(Progress) if field.name in start.state]
    return Progress(**{name: start.state[name] for name in known})


def _schedule(config: TrainConfig, tokens_per_step: int, first_step: int) -> Schedule:
    optim, run = config.optim, config.run
    return Schedule(
        lr_init=float(optim.lr_init or 0),
        lr_final=float(optim.lr_final or 0),
        warmup_steps=optim.warmup_steps,
        tokens_per_step=tokens_per_step,
        exit_tokens=int(config.data.my_exit_tokens or 0),
        epoch_steps=int(run.epoch_steps or 0),
        epoch_count=int(run.epoch_count or 0),
        first_step=first_step,
        weight_decay=optim.weight_decay,
        weight_decay_final=optim.weight_decay_final,
        edecay=optim.my_pile_edecay,
        last_epoch=run.my_exit,
    )


def _train(
    config: TrainConfig,
    dataset: Dataset,
    validation: Dataset | None,
    engine: Engine,
    weights: WeightFiles,
    progress: Progress,
    rundir: RunFiles,
    observers: Observers,
    stop: StopRequest,
    context: Context,
) -> RunResult:
    """From where `progress` stands to the last step."""
    run, ranks = config.run, context.ranks
    samples_per_step = samples_of_step(config)
    tokens_per_step = samples_per_step * config.data.ctx_len
    epoch_steps = int(run.epoch_steps or 0)
    schedule = _schedule(config, tokens_per_step, progress.run_first_step)
    final = weights.file("final")

    def result(reason: str) -> RunResult:
        return RunResult(
            step=progress.step,
            loss=None if math.isnan(progress.smooth_loss) else progress.smooth_loss,
            val_loss=progress.val_loss,
            tokens=progress.step * tokens_per_step,
            proj_dir=rundir.path,
            final_path=final,
            exit_reason=reason,
        )

    stopped_early = 0 < config.data.early_stop <= progress.worse_validations
    if progress.step >= schedule.total_steps or stopped_early:
        if not final.exists():
            weights.write("final")
        reason = _("all {steps} steps were already trained; the model is {file}", steps=progress.step, file=final)
        if stopped_early:
            reason = _stopped_early(progress, weights)
        observers.on_message(reason)
        return result(reason)

    if isinstance(rundir, RunDir):
        rundir.forget_after(progress.step, epoch=progress.step // epoch_steps)
        _log_new_run(config, rundir)
        observers.add(MetricsFile(rundir.metrics_file, config.log.log_every))

    loss_function = _loss_function(run, context)
    monitor = Monitor(engine, observers.on_record, tokens_per_step=tokens_per_step, total_steps=schedule.total_steps)
    keeper = Keeper(
        config,
        progress,
        engine=engine,
        ranks=ranks,
        rundir=rundir,
        monitor=monitor,
        observers=observers,
        stop=stop,
        validate=_validator(config, validation, engine, loss_function, stop, context),
        save_weights=weights.write,
        epoch_steps=epoch_steps,
        total_steps=schedule.total_steps,
    )
    observers.add(keeper)
    facts = RunFacts(
        config=config,
        proj_dir=rundir.path,
        first_step=progress.step,
        total_steps=schedule.total_steps,
        tokens_per_step=tokens_per_step,
        epoch_steps=epoch_steps,
        parameters=sum(map(_elements, engine.model.parameters())),
        trained_parameters=sum(_elements(p) for p in engine.model.parameters() if p.requires_grad),
        device=str(engine.device),
    )
    if ranks.main:
        with ranks.patience():  # Weights & Biases may ask for a login
            _announce(facts, engine.device, observers)
    stop.deferred = True
    monitor.restart_clock()
    try:
        keeper.catch_up()
        fit(
            engine,
            loss_function,
            batches(
                partial(_open_training_data, config) if config.data.num_workers else lambda: dataset,
                progress.step * samples_per_step,
                run.micro_bsz,
                engine.device,
                context=context,
                num_workers=config.data.num_workers,
            ),
            schedule,
            range(progress.step, schedule.total_steps),
            accumulate=run.accumulate_grad_batches,
            after_step=[monitor, keeper],
        )
    except StoppedEarly:
        reason = _stopped_early(progress, weights)
        observers.on_message(reason)
        return result(reason)
    except Diverged as error:
        raise UserError(_explain(error, config, engine, loss_function, rundir, ranks)) from error
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        plan = Plan.of(config)
        reason = _("the device ran out of memory at step {step}.", step=progress.step + 1)
        raise UserError(f"{reason}\n{advice(plan, free_memory(plan.accelerator))}") from error
    reason = _("trained {steps} steps; the model is {file}", steps=progress.step, file=final)
    observers.on_message(reason)
    return result(reason)


def _stopped_early(progress: Progress, weights: WeightFiles) -> str:
    return _(
        "the validation loss has not become better for {count} validations: stopped at step {steps}; the best is "
        "{file}",
        count=progress.worse_validations,
        steps=progress.step,
        file=weights.file("best"),
    )


def _elements(parameter: torch.Tensor) -> int:
    """Of the whole parameter, whatever part of it this rank has: DeepSpeed's stage 3 leaves an empty tensor."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _open_training_data(config: TrainConfig) -> Dataset:
    """The data of a resolved configuration, for processes that read ahead."""
    return open_dataset(
        config.data,
        vocab_size=config.model.vocab_size,
        seed=config.run.random_seed,
        random_places=config.run.train_stage == 4,
    )


def _validator(
    config: TrainConfig,
    dataset: Dataset | None,
    engine: Engine,
    loss_function: LossFunction,
    stop: StopRequest,
    context: Context,
) -> Callable[[], float | None] | None:
    """Computes the validation loss, if there are data for it."""
    if dataset is None:
        return None
    validation = Validation(dataset, config.run.micro_bsz, engine.device, context)
    return lambda: validation.loss(engine.model, loss_function, lambda: stop.made)


def language_loss(model: nn.Module, batch: Batch, *, head_chunk: int = 0) -> Iterator[Part]:
    """Mean cross-entropy of the next token over the trained targets of a batch, in one part.

    Args:
        model: any generation.
        head_chunk: tokens whose logits exist at one time; 0 chooses.
    """
    loss = None
    if not head_chunk:
        loss = model.quick_loss(  # type: ignore[operator]
            batch.tokens, batch.targets, lengths=batch.lengths, trained=batch.trained
        )
    if loss is None:
        loss, _state = model.loss(  # type: ignore[operator]
            batch.tokens, batch.targets, lengths=batch.lengths, trained=batch.trained, chunk=head_chunk
        )
    yield Part(loss, batch.trained, last=True)


def _loss_function(run: RunSection, context: Context) -> LossFunction:
    if context.size > 1:
        return partial(context.loss, head_chunk=run.head_chunk)
    if run.train_type == "normal":
        return partial(language_loss, head_chunk=run.head_chunk)
    return partial(chunk_losses, chunk_ctx=run.chunk_ctx, full=run.infctx_grad == "full", head_chunk=run.head_chunk)


def _explain(
    error: Diverged, config: TrainConfig, engine: Engine, loss_function: LossFunction, rundir: RunFiles, ranks: Ranks
) -> str:
    """Saves the batch that made the training diverge, and says what the user can do."""
    step = error.step
    # With several ranks, which of them was first is not known: each saves its own.
    file = divergence.save_batch(step, rundir.path, ranks.rank if ranks.world_size > 1 else None)
    tensor = _("not searched for with strategy {strategy}", strategy=config.device.strategy)
    if config.device.context_parallel > 1:
        tensor = _("not searched for with context_parallel")
    elif config.device.strategy in ("single", "ddp"):  # a rank can repeat the step without the others
        tensor = divergence.first_bad_tensor(engine.model, loss_function, step.batches)
    return _(
        "step {step} is not finite (loss {loss}, gradient norm {norm}); first bad tensor: {tensor}. Its batch is in "
        "{file}, the last good checkpoint is untouched. Lower lr_init, raise warmup_steps, or use --precision bf16 "
        "or fp32, in a new --proj_dir.",
        step=step.number,
        loss=step.loss.item(),
        norm=step.grad_norm.item(),
        tensor=tensor,
        file=file,
    )


def _log_new_run(config: TrainConfig, rundir: RunFiles) -> None:
    """The head of RWKV-LM's train_log.txt: time and settings of this session."""
    settings = flat(config)
    with rundir.log_file.open("a", encoding="utf-8") as log:
        log.write(f"NEW RUN {datetime.now():%Y-%m-%d-%H-%M-%S}\n{settings}\n")


def _announce(facts: RunFacts, device: torch.device, observers: Observers) -> None:
    """Tells everybody that training begins."""
    model, log = facts.config.model, facts.config.log
    parameters = f"{facts.parameters / 1e6:.3g}"
    if facts.trained_parameters < facts.parameters:
        trained = f"{facts.trained_parameters / 1e6:.3g}"
        parameters = _("{trained} of {all}", trained=trained, all=parameters)
    observers.on_message(
        _(
            "{version} L{n_layer} D{n_embd}, {parameters} M parameters, {precision} on {device}; "
            "{steps} steps of {tokens} tokens, from step {first}",
            version=model.version,
            n_layer=model.n_layer,
            n_embd=model.n_embd,
            parameters=parameters,
            precision=facts.config.run.precision,
            device=describe(device),
            steps=facts.total_steps,
            tokens=facts.tokens_per_step,
            first=facts.first_step,
        )
    )
    trackers: list[Tracker] = []
    if log.wandb:
        trackers.append(WandB(observers.on_message))
    if log.tensorboard:
        trackers.append(TensorBoard(observers.on_message))
    for tracker in trackers:
        # Before the display takes the terminal: Weights & Biases may ask for a login.
        tracker.on_start(facts)
    observers.on_start(facts)
    for tracker in trackers:
        observers.add(tracker)

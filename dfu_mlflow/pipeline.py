"""The only wiring: which parts make a training run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch

from dfu_mlflow.alone import alone
from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.base.origin import Origin
from dfu_mlflow.batches import Batches
from dfu_mlflow.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from dfu_mlflow.config.runtime import RuntimeConfig
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import dataset_digest
from dfu_mlflow.ema import ExponentialMovingAverage
from dfu_mlflow.engine_choice import check_launch
from dfu_mlflow.errors import UserError
from dfu_mlflow.evaluation_budget import Protocol, plan_evaluation
from dfu_mlflow.fused import BackwardOptimizer
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.memory import check_disk, check_output_folder
from dfu_mlflow.memory_limits import require_memory
from dfu_mlflow.memory_phases import run_memory
from dfu_mlflow.objective import Objective
from dfu_mlflow.optimizers import build_optimizer
from dfu_mlflow.panels import build_panels
from dfu_mlflow.participant import Equipment, Participant, TrainingResult
from dfu_mlflow.perceptual import build_perceptual
from dfu_mlflow.phases import phase
from dfu_mlflow.preparation import Material, Source, prepare, read_source
from dfu_mlflow.ranks import Ranks, joined
from dfu_mlflow.resume import check_same_run
from dfu_mlflow.runtime import make_current, pick_device
from dfu_mlflow.tracking import track
from dfu_mlflow.tracking_store import check_store
from dfu_mlflow.trainer import Parts
from dfu_mlflow.training_run import Supervisor, TrainingRun
from dfu_mlflow.verdict import check_names


def run_training(
    config: RunConfig,
    publish: Callable[[TrainingResult], object] | None = None,
    supervisor: Supervisor | None = None,
) -> TrainingResult:
    """Train as configured: data -> fine-tuning -> evaluation of each epoch -> best checkpoint as a bundle.

    Args:
        publish: called with the result before the MLflow run is closed, to register the model.
        supervisor: names the MLflow run to write to, hears of each epoch and may end the run.

    Under a launcher every process calls this; all work, the first one decides and writes, and all get the result.

    Raises:
        UserError: for input that cannot be worked with; before the run is opened where that can be known. `RankLost`
            when another process has died, hangs or failed.
        Interrupted: after Ctrl-C or SIGTERM; a checkpoint has been written. `Pruned` where the supervisor says so.
    """
    device = make_current(pick_device(config.device))
    with (
        StopRequest() as stop,
        joined(device, config.runtime.timeout_s, stop) as ranks,
        ranks.explained(),
        ExitStack() as held,
    ):
        check_launch(config.train, ranks.count)
        if supervisor is not None:
            _check_single(ranks)
        config = config.model_copy(update={"runtime": _runtime(config, ranks)})
        check_disk(config, resolve_base(config.base_model))
        resumed_from = ranks.decided(lambda: _claimed_checkpoint(config, held), "the start")
        with ranks.main_first("preparation"):
            source = _checked_source(config, ranks, device)
            checkpoint = load_checkpoint(resumed_from) if resumed_from else None
            digest = dataset_digest(source.split)
            if checkpoint is not None:
                check_same_run(checkpoint, config, digest)
            kept = None if checkpoint is None else Protocol.of(checkpoint.state)
            equipment = equip(config, prepare(config, source), ranks, kept)
        if not ranks.main:
            folder = resumed_from.parent.parent if resumed_from else config.output_dir
            return train(Participant(config, equipment, ranks, folder, {}), checkpoint)
        given = supervisor.run_id if supervisor else None
        tracker = held.enter_context(track(config, checkpoint.state["run_id"] if checkpoint else given))
        # Explained inside the MLflow run: its `exit.reason` is to name the rank that is missing.
        held.enter_context(ranks.explained())
        folder = resumed_from.parent.parent if resumed_from else config.output_dir / tracker.run_id[:8]
        if not resumed_from:
            held.enter_context(_trained_by_one(folder))
        run = TrainingRun(config, equipment, tracker, ranks, folder, supervisor)
        run.describe(digest)
        result = train(run, checkpoint)
        if supervisor is not None:
            result = supervisor.finished(run, result)
        if publish is not None:
            publish(result)
    return result


def _checked_source(config: RunConfig, ranks: Ranks, device: torch.device) -> Source:
    """The photographs; whatever else would end the run later on is said now, before hours of encoding."""
    source = read_source(config)
    check_names(config.evaluation, source.split.classes)
    if ranks.main:
        check_output_folder(config.output_dir)
        check_store()
    if ranks.count == 1:  # several share the batch, and some of them the weights
        require_memory(config, device, run_memory)
    return source


def _check_single(ranks: Ranks) -> None:
    if ranks.count > 1:
        raise UserError(
            f"tune and study compare trainings of one process each, and {ranks.count} run: start them without a "
            "launcher; any number of them on one tune.study share its trials"
        )


def _claimed_checkpoint(config: RunConfig, held: ExitStack) -> Path | None:
    """What to resume from, of a run that no other process trains; a newer one where the other ended just now."""
    found = find_checkpoint(config.resume, config.output_dir)
    if found is None:
        return None
    held.enter_context(_trained_by_one(found.parent.parent))
    newest = find_checkpoint(config.resume, config.output_dir)
    return newest if newest is not None and newest.parent == found.parent else found


def _trained_by_one(folder: Path) -> AbstractContextManager[None]:
    return alone(
        folder / ".training.lock",
        f"the run in {folder} is being trained by another process: wait for it, or resume another run",
    )


def train(run: Participant, checkpoint: Checkpoint | None) -> TrainingResult:
    """Train as one rank of the run, from a checkpoint or from the base."""
    with run.shown():
        if checkpoint is not None:
            run.trainer.restore(checkpoint)
        run.show_draws(run.ranks.everyone(run.first_draws(), "the first step"))
        run.trainer.fit()
        run.confirm()
    run.trainer.engine.release()
    return run.ranks.decided(run.finish, "the end of training", limited=False)


def _runtime(config: RunConfig, ranks: Ranks) -> RuntimeConfig:
    given = config.runtime.num_processes
    if given not in (1, ranks.count):
        raise UserError(
            f"--runtime.num_processes {given}, but {ranks.count} run: leave it out, the run fills it in; "
            f"--launch ddp --processes {given} starts {given}"
        )
    return config.runtime.model_copy(update={"num_processes": ranks.count})


def equip(config: RunConfig, material: Material, ranks: Ranks, kept: Protocol | None = None) -> Equipment:
    """Build networks, objective, optimizer and references.

    Args:
        kept: how the run evaluated so far, where it goes on.

    Raises:
        UserError: for weights or packages that are not at hand, or adapters that fit nowhere.
    """
    panels = build_panels(config, material)  # before the UNet is loaded: they need the autoencoder alone
    with phase("making the network trainable"):
        parts = build_parts(config, material, ranks)
        # Before the first step an adapter adds nothing. The main rank alone measures how far the weights went.
        origin = Origin(material.pipe.unet, config.adapter) if ranks.main else None
    plan = plan_evaluation(config, material.source.split, kept)
    return Equipment(material, panels, parts, origin, plan)


def build_parts(config: RunConfig, material: Material, ranks: Ranks | None = None) -> Parts:
    """What is trained, on what: the base's UNet made trainable, and everything that a step needs.

    The UNet is loaded here, in the precision that it is trained in.

    Raises:
        UserError: as `equip`.
    """
    pipe, ranks = material.pipe, ranks or Ranks()
    matrices = torch.bfloat16 if config.adapter.frozen_dtype == "bfloat16" else torch.float32
    pipe.register_modules(unet=material.base.unet(matrices, material.device))
    objective = Objective(
        dict(pipe.scheduler.config), config.loss, build_perceptual(config.loss.perceptual_loss, pipe.vae)
    )
    build_kind = BackwardOptimizer if config.train.fused_backward else build_optimizer
    weights = attach(pipe.unet, config.adapter, config.seed)
    place = torch.device("cpu") if config.ema.on_host else None
    if config.train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return Parts(
        unet=pipe.unet,
        weights=weights,
        optimizer=build_kind(weights.values(), config.train),
        objective=objective,
        conditioner=material.conditioner,
        batches=Batches(material.train, float(pipe.vae.config.scaling_factor), config, ranks.index, ranks.count),
        ema=ExponentialMovingAverage(weights, config.ema.decay, config.ema.warmup, place)
        if config.ema.enabled
        else None,
    )

"""`--dry-run`: the resolved configuration and what it would do, without training."""

from __future__ import annotations

from pathlib import Path

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.batches import steps_per_epoch
from dfu_mlflow.config.load import dump_yaml
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.evaluation_budget import EvaluationPlan, Workload, plan
from dfu_mlflow.memory import GIB, free_bytes, kept_checkpoints, training_memory
from dfu_mlflow.memory_phases import CUDA_BYTES, RunMemory, libraries_bytes, run_memory
from dfu_mlflow.pass_timing import time_passes
from dfu_mlflow.preparation import Source, read_source
from dfu_mlflow.runtime import pick_device
from dfu_mlflow.verdict import check_names


def print_plan(config: RunConfig) -> None:
    """Print the configuration, the images by class and patient, the steps and the estimated memory and disk.

    Raises:
        UserError: for whatever would stop the run itself before its first step.
    """
    source = read_source(config)
    check_names(config.evaluation, source.split.classes)
    print(dump_yaml(config))
    lines = [*_data_lines(source), *_step_lines(config, source), *_pass_lines(config, source), *_size_lines(config)]
    if not Path(base := resolve_base(config.base_model)).is_dir():
        lines.append(f"base {base} is no folder here: it is fetched from the hub, unless the hub's cache holds it")
    print("\n".join(lines))


def _data_lines(source: Source) -> list[str]:
    lines = ["# Photographs"]
    for side, records in (("train", source.split.train), ("held out", source.split.held_out)):
        for label in source.split.classes:
            chosen = [record for record in records if record.label == label]
            patients = len({record.patient for record in chosen})
            lines.append(f"{side:>8}  class {label}: {len(chosen)} images of {patients} patients")
    if source.audit.in_short() is not None:
        lines += ["", "# Files", source.audit.table()]
    lines += ["", "# Prompts"] + [f"{label}: {prompt}" for label, prompt in source.prompts.items()]
    return lines


def _step_lines(config: RunConfig, source: Source) -> list[str]:
    train = config.train
    steps = steps_per_epoch(config, len(source.split.train) * config.data.views_per_image)
    samples = steps * train.batch_size * train.gradient_accumulation_steps
    return [
        "",
        "# Steps",
        f"{train.epochs} epochs of {steps} optimizer steps of {train.batch_size} x {train.gradient_accumulation_steps} "
        f"samples: {train.epochs * steps} steps, {train.epochs * samples} samples",
    ]


def _pass_lines(config: RunConfig, source: Source) -> list[str]:
    work = Workload.of(config, source.split)
    chosen, whole = plan(work, config.evaluation.budget), plan(work, None)
    parts = {"in full": chosen.full_passes, "quick": chosen.quick_passes, "confirming": chosen.confirmation_passes}
    return [
        "",
        "# UNet passes",
        f"training: {chosen.training_passes:,} ({4 if config.train.gradient_checkpointing else 3} a sample)",
        f"evaluation: {chosen.evaluation_passes:,} "
        f"({', '.join(f'{name} {count:,}' for name, count in parts.items() if count)})",
        chosen.in_words(),
        f"evaluation is {100 * chosen.share:.1f} % of the run"
        + (f"; in full after every epoch it would be {100 * whole.share:.1f} %" if chosen != whole else ""),
        *_hour_lines(config, source, chosen),
    ]


def _hour_lines(config: RunConfig, source: Source, chosen: EvaluationPlan) -> list[str]:
    """Hours, from a short timing on the device."""
    device = pick_device(config.device)
    try:
        times = time_passes(config, resolve_base(config.base_model), device)
    except RuntimeError as error:  # torch's own for memory that is not there
        return [f"hours are not estimated: {device} has no room to time a pass ({str(error).splitlines()[0][:120]})"]
    split = source.split
    views = len(split.train) * config.data.views_per_image
    photographs = len(split.train) + len(split.held_out)
    seconds = {
        "caching": times.encode_s * (views + len(split.held_out)) + times.decode_s * photographs,
        "training": times.pass_s * chosen.training_passes,
        "evaluation": times.pass_s * chosen.evaluation_passes + times.decode_s * chosen.pictures,
    }
    return [
        f"estimated for one process, from a short timing on {device} scaled by FLOPs "
        f"({1e3 * times.pass_s:.3g} ms a pass): " + ", ".join(f"{name} {_long(s)}" for name, s in seconds.items())
    ]


def _long(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _size_lines(config: RunConfig) -> list[str]:
    source, device = resolve_base(config.base_model), pick_device(config.device)
    parts = training_memory(config, source)
    memory = run_memory(config, source, device.type != "cuda", libraries_bytes())
    place, free = free_bytes(config.output_dir)
    return [
        "",
        "# Size",
        f"UNet: {parts.weights:,} weights; {parts.trained:,} are trained "
        f"({100 * parts.trainable_fraction:.1f} % with the adapters counted in)",
        *memory_lines(memory),
        f"disk for checkpoints: {kept_checkpoints(config)} x {parts.checkpoint / GIB:.2f} GiB; "
        f"free at {place}: {free / GIB:.1f} GiB",
    ]


def memory_lines(memory: RunMemory) -> list[str]:
    """Peak memory of each phase in GiB, the largest one named, and what it is made of."""
    where = ("this machine's",) if memory.shared else ("the card's", "this machine's")
    lines = ["", f"# Memory, GiB ({' and '.join(where)}), of one process"]
    for phase in memory.phases:
        sizes = [phase.on_host(memory.shared)] if memory.shared else [phase.on_device(), phase.on_host(False)]
        lines.append(f"  {phase.name:<26}" + "".join(f"{size / GIB:8.2f}" for size in sizes))
    largest = memory.largest_on_host() if memory.shared else memory.largest_on_device()
    parts = {**largest.device, **largest.host} if memory.shared else largest.device
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    more = "" if memory.shared else f", and about {CUDA_BYTES / GIB:.1f} that CUDA takes for itself"
    lines.append(f"largest: {largest.name} ({listed}{more})")
    if not memory.shared:
        host = memory.largest_on_host()
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in host.host.items() if size)
        lines.append(f"largest on the host: {host.name} ({listed})")
    return lines

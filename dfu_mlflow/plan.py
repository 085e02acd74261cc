"""`--dry-run`: the resolved configuration and what it would do, without training."""

from __future__ import annotations

from pathlib import Path

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.batches import steps_per_epoch
from dfu_mlflow.config.load import dump_yaml
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.memory import GIB, free_bytes, kept_checkpoints, memory_plan
from dfu_mlflow.preparation import Source, read_source
from dfu_mlflow.verdict import check_names


def print_plan(config: RunConfig) -> None:
    """Print the configuration, the images by class and patient, the steps and the estimated memory and disk.

    Raises:
        UserError: for whatever would stop the run itself before its first step.
    """
    source = read_source(config)
    check_names(config.evaluation, source.split.classes)
    print(dump_yaml(config))
    lines = [*_data_lines(source), *_step_lines(config, source), *_size_lines(config)]
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


def _size_lines(config: RunConfig) -> list[str]:
    plan = memory_plan(config, resolve_base(config.base_model))
    place, free = free_bytes(config.output_dir)
    parts = [f"  {name:<32}{gib:8.2f} GiB" for name, gib in plan["memory_gib"].items()]
    host = [f"  {name:<40}{gib:8.2f} GiB" for name, gib in plan["host_memory_gib"].items()]
    return [
        "",
        "# Size",
        f"UNet: {plan['unet_weights']:,} weights; {plan['trained_weights']:,} are trained "
        f"({100 * plan['trainable_fraction']:.1f} % with the adapters counted in)",
        "estimated peak memory of training in one process:",
        *parts,
        f"  {'sum':<32}{sum(plan['memory_gib'].values()):8.2f} GiB, and what CUDA takes for itself",
        "  not counted: evaluations, the average on the device while it is evaluated, and the perceptual term, which "
        "decodes pictures with gradients",
        "beside it in the computer's memory:",
        *host,
        f"disk for checkpoints: {kept_checkpoints(config)} x {plan['checkpoint_gib']:.2f} GiB; "
        f"free at {place}: {free / GIB:.1f} GiB",
    ]

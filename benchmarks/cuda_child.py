"""One case of `benchmarks.cuda`, in a process of its own, so that its peaks are nobody else's.

    python -m benchmarks.cuda_child REQUEST DESCRIPTOR

REQUEST is `Request.tree()` as JSON; figures go to the file descriptor, one JSON object a line, as they come.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.cuda_base import REAL, SMALL, write_random_base
from benchmarks.cuda_cases import BASE, Request, case_config, find
from benchmarks.cuda_flops import matmul_rate
from benchmarks.cuda_memory import GIB, Peaks, timed
from dfu_mlflow import participant, pipeline
from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.conditioning import encode_prompts
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.config.sample import SampleConfig
from dfu_mlflow.engine_choice import build_accelerator, check_launch
from dfu_mlflow.errors import UserError
from dfu_mlflow.optimizers import build_optimizer, state_bytes
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.preparation import prepare, read_source
from dfu_mlflow.runtime import make_current, pick_device, release_memory, use_precision
from dfu_mlflow.sampling import Sampler, Settings
from dfu_mlflow.trainer import Hooks, Trainer
from registry.publish import publish
from registry.sample import sample

Figures = dict[str, Any]
Record = Callable[[Figures], None]

FOREACH = "adamw, foreach"
"""What AdamW would be without its fused kernels."""


def run_case(request: Request, record: Record) -> None:
    """Run a case and hand out its figures as they come.

    Raises:
        UserError: for what this machine cannot do.
        torch.OutOfMemoryError: where the card is too small.
    """
    device = make_current(pick_device(request.device))
    if request.case == BASE:
        return run_base(request, device, record)
    kinds = {"training": run_training_steps, "sampling": run_sampling, "chain": run_chain, "optimizers": run_optimizers}
    return kinds[find(request.case).kind](request, device, record)


def started_s() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def run_base(request: Request, device: torch.device, record: Record) -> None:
    """Say what the device is and what it reaches; write the random base."""
    facts: Figures = {"device": str(device)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        capability = f"{card.major}.{card.minor}"
        facts |= {"card": card.name, "total_gib": card.total_memory / GIB, "capability": capability}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    rate = matmul_rate(device, 512 if request.small else 8192, 0.1 if request.small else 2.0)
    record({**facts, "bf16_flops_per_s": rate})
    peaks = Peaks(device)
    with peaks.phase("make the base"):
        write_random_base(request.base, SMALL if request.small else REAL, device)
    size = sum(file.stat().st_size for file in request.base.rglob("*") if file.is_file())
    record({"base_gib": size / GIB, "phases": peaks.phases})


def run_training_steps(request: Request, device: torch.device, record: Record) -> None:
    """Optimizer steps of the project's own trainer, without evaluation and tracking."""
    config = case_config(request)
    check_launch(config.train)
    build_optimizer([nn.Parameter(torch.zeros(1))], config.train)  # a package that is missing is told before loading
    peaks = Peaks(device)
    with peaks.phase("load and cache"):
        material = prepare(config, read_source(config))
    with peaks.phase("build"):
        hooks = Hooks(lambda *_: None, lambda *_: None, lambda: None, lambda: False)
        trainer = Trainer(
            pipeline.build_parts(config, material),
            config,
            CheckpointStore(Path(request.folder) / "checkpoints", 1),
            hooks,
            build_accelerator(device, config.train.mixed_precision),
        )
        trainer.progress.epoch = 1
        trainer.parts.unet.train()
    with peaks.phase("first step"):
        trainer.train_step(0)
    record({"start_s": started_s(), "first_step_s": peaks.phases["first step"]["seconds"]})

    def step() -> None:
        trainer.train_step(trainer.progress.step)

    with peaks.phase("steps"):
        steps, taken_s = timed(step, peaks.wait, request.seconds, 2)
    pictures = steps * config.train.batch_size * config.train.gradient_accumulation_steps
    record(
        {
            "steps": steps,
            "step_s": taken_s / steps,
            "images_per_s": pictures / taken_s,
            "skipped_steps": trainer.progress.nonfinite,
            "phases": peaks.phases,
        }
    )


def run_sampling(request: Request, device: torch.device, record: Record) -> None:
    """Pictures of the untouched base, in the precision that the preset trains and evaluates in."""
    config = case_config(request)
    peaks = Peaks(device)
    with peaks.phase("load"):
        sampler = open_sampler(config, device)
    labels = [sampler.classes[number % len(sampler.classes)] for number in range(sampler.batch_size)]
    seeds = list(range(len(labels)))
    with peaks.phase("first batch"):
        sampler.draw(labels, seeds, num_inference_steps=1)
    record({"start_s": started_s(), "first_batch_s": peaks.phases["first batch"]["seconds"]})
    with peaks.phase("pictures"):
        batches, taken_s = timed(lambda: sampler.draw(labels, seeds), peaks.wait, request.seconds, 1)
    own = sampler.settings
    record(
        {
            "pictures_per_s": batches * len(labels) / taken_s,
            "batch_size": len(labels),
            "solver_steps": own.num_inference_steps,
            "unet_passes": own.num_inference_steps * (2 if own.guided else 1),
            "phases": peaks.phases,
        }
    )


def open_sampler(config: RunConfig, device: torch.device) -> Sampler:
    """The base as `Sampler.load` opens a full fine-tune's bundle."""
    base = BaseModel(config.base_model)
    conditioner = encode_prompts(base, dict(MINIMAL), "")
    pipe = base.pipeline()
    pipe.register_modules(vae=base.vae(), unet=base.unet())
    pipe.to(device)
    use_precision(pipe.unet, device, config.train.mixed_precision)
    px, own = config.data.resolution_px, config.sampling
    settings = Settings(own.guidance_scale, own.num_inference_steps, px, (px, px), scheduler=own.scheduler)
    return Sampler(pipe, conditioner.to(device), settings, own.batch_size)


def run_chain(request: Request, device: torch.device, record: Record) -> None:
    """Train, register, sample, as the entry points do it, with what each phase takes.

    Colours of a random base's pictures are not held against it; what is drawn is checked for copies as always.
    """
    config = case_config(request)
    peaks = Peaks(device)
    places = (
        (pipeline, "prepare", "load and cache"),
        (pipeline, "equip", "build"),
        (participant.Participant, "evaluate", "evaluate"),
        (Trainer, "train_epoch", "train"),
        (Trainer, "save", "checkpoints"),
    )

    def register(result: TrainingResult) -> None:
        record({"trained": result.best_epoch, "phases": peaks.phases})
        with peaks.phase("register"):
            publish(result, config)

    with ExitStack() as measured:
        for owner, name, phase in places:
            measured.enter_context(peaks.around(owner, name, phase))
        pipeline.run_training(config, publish=register)
    record({"registered": config.registry.name, "phases": peaks.phases})
    wanted = SampleConfig.model_validate(
        {
            "model": f"models:/{config.registry.name}@{config.registry.alias}",
            "output_dir": Path(request.folder) / "samples",
            "device": request.device,
            "num_inference_steps": 4,
            "sample": {"per_class": 2, "filter_colour": False},
        }
    )
    release_memory()  # the entry point `sample` has a process of its own
    with peaks.phase("sample"):
        sampled = sample(wanted)
    written = len(list((Path(request.folder) / "samples").rglob("*.png")))
    record({"sampled": written, "complete": sampled.complete, "chain_s": started_s(), "phases": peaks.phases})


def run_optimizers(request: Request, device: torch.device, record: Record) -> None:
    """One update of a LoRA's weights by each optimizer, and what it keeps, against the plan."""
    config = case_config(request)
    with torch.device("meta"):
        unet = meta_modules(config.base_model)["unet"]
        shapes = [weight.shape for weight in attach(unet, config.adapter, seed=0).values()]
    weights = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    peaks = Peaks(device)
    for name in ("adamw", FOREACH, "adamw_8bit", "adafactor"):
        kind = "adamw" if name == FOREACH else name
        try:
            train = config.train.model_copy(update={"optimizer": kind})
            optimizer = torch.optim.AdamW(weights, foreach=True) if name == FOREACH else build_optimizer(weights, train)
        except UserError as error:
            record({"optimizer": name, "skipped": str(error)})
            continue
        optimizer.step()
        steps, taken_s = timed(optimizer.step, peaks.wait, request.seconds / 8, 3)
        kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        figures = {
            "optimizer": name,
            "weights": sum(weight.numel() for weight in weights),
            "update_s": taken_s / steps,
            "state_gib": sum(value.nbytes for value in kept) / GIB,
            "planned_state_gib": sum(state_bytes(shape, kind) for shape in shapes) / GIB,
        }
        record(figures)
        optimizer.state.clear()
        del optimizer, kept


def main(arguments: Sequence[str]) -> int:
    """Run the case of this process; 0 when done, 2 for what this machine cannot do, 3 where the card is too small."""
    request = Request(**json.loads(arguments[0]))
    with os.fdopen(int(arguments[1]), "w", encoding="utf-8") as pipe:

        def record(figures: Figures) -> None:
            print(json.dumps(figures), file=pipe, flush=True)

        try:
            run_case(request, record)
        except UserError as error:
            record({"skipped": " ".join(str(error).split())})
            return 2
        except torch.OutOfMemoryError as error:
            record({"out_of_memory": " ".join(str(error).split())[:300]})
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

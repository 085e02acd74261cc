"""The zoo's inmates: one fault for each entry of the catalogue, at two strengths.

Every fault is put in from outside: by configuration, by a faulty component around the real training, or by doctoring
the record, the checkpoint or the pictures of a healthy run. Nothing in the product knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.zoo_components import (
    abandoned,
    copies,
    dead_term,
    doctored,
    hanging,
    labels_mixed,
    metric_sees,
    not_finite,
    other_pictures_each_epoch,
    out_of_memory,
    random_validation,
    ranks_that_draw,
    schedule_too_long,
    split_by_image,
    stale,
    trained_on,
    wrapped,
)
from benchmarks.zoo_lab import Injection, Lab

STOCK = (
    "stock photo of a diabetic foot ulcer in the {}, open wound with tissue changes around the wound margins, "
    "professional medical documentation, close-up macro photography, studio lighting, sharp focus"
)
"""A caption of the weaker kind: shorter than the founding run's, as styled."""

PERCEPTUAL = {"loss.perceptual_loss.enabled": True}
MANY = {"train.epochs": 7, "train.steps_per_epoch": 12}
"""Enough evaluations to see noise."""
LONG = {"train.epochs": 3, "train.steps_per_epoch": 80}
"""Enough updates for the classes to differ: before that guidance has nothing to push on, and 12 does no harm."""
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592"
WATCHDOG = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=41, OpType=ALLREDUCE) ran for 600000 ms"
CAPTIONS = {"I": STOCK.format("inflammatory phase"), "P": STOCK.format("proliferative phase")}
CLINICAL = {
    "I": "diabetic foot ulcer with slough and a red, swollen margin",
    "P": "diabetic foot ulcer with granulation tissue",
    "R": "diabetic foot ulcer closed by new pale skin",
}

Make = Callable[[Lab, int], Injection]
FAULTS: Mapping[str, tuple[Make, Make]] = MappingProxyType(
    {
        "ema_lag": (
            lambda lab, seed: Injection({"ema.decay": 0.99, "ema.warmup": False, "evaluation.ema": True}),
            lambda lab, seed: Injection({"ema.decay": 0.999, "ema.warmup": False, "evaluation.ema": True}),
        ),
        "dead_loss_term": (
            lambda lab, seed: Injection({**PERCEPTUAL, "loss.perceptual_loss.weight": 0.02}, (dead_term(),)),
            lambda lab, seed: Injection({**PERCEPTUAL, "loss.perceptual_loss.weight": 0.5}, (dead_term(),)),
        ),
        "dominant_loss_term": (
            lambda lab, seed: Injection({**PERCEPTUAL, "loss.perceptual_loss.weight": 0.5}),
            lambda lab, seed: Injection({**PERCEPTUAL, "loss.perceptual_loss.weight": 10.0}),
        ),
        "metric_input_broken": (
            lambda lab, seed: Injection(patches=(metric_sees(lambda images: 255 - images),)),
            lambda lab, seed: Injection(patches=(metric_sees(wrapped),)),
        ),
        "text_mismatch": (
            lambda lab, seed: Injection(patches=(trained_on("encoded_empty"),)),
            lambda lab, seed: Injection(patches=(trained_on("final_layer"),)),
        ),
        "weights_not_moving": (
            lambda lab, seed: Injection({"train.learning_rate": 3e-6}),
            lambda lab, seed: Injection({"train.learning_rate": 1e-6}),
        ),
        "nonfinite": (
            lambda lab, seed: Injection(patches=(not_finite(8, 0),)),
            lambda lab, seed: Injection(patches=(not_finite(1, 50),)),
        ),
        "guidance_too_high": (
            lambda lab, seed: Injection({**LONG, "sampling.guidance_scale": 9.0}),
            lambda lab, seed: Injection({**LONG, "sampling.guidance_scale": 12.0}),
        ),
        "resolution_off_native": (
            lambda lab, seed: Injection({"data.resolution_px": 112, "train.steps_per_epoch": 20}),
            lambda lab, seed: Injection({"data.resolution_px": 16}),
        ),
        "prompt_prior": (
            lambda lab, seed: Injection(
                {
                    "prompts.style": "custom",
                    "prompts.phase_prompts": {**CAPTIONS, "R": STOCK.format("remodeling phase")},
                }
            ),
            lambda lab, seed: Injection({"prompts.style": "detailed"}),
        ),
        "noisy_validation": (
            lambda lab, seed: Injection(MANY, (random_validation(16),)),
            lambda lab, seed: Injection(MANY, (random_validation(4),)),
        ),
        "selection_on_noise": (
            lambda lab, seed: Injection(
                {**MANY, "train.learning_rate": 1e-4, "evaluation.samples": 24}, (other_pictures_each_epoch(),)
            ),
            lambda lab, seed: Injection(
                {**MANY, "train.learning_rate": 1e-4, "evaluation.samples": 12}, (other_pictures_each_epoch(),)
            ),
        ),
        "small_sample_fid": (
            lambda lab, seed: Injection({"evaluation.best_metric": "fd", "evaluation.samples": 240}),
            lambda lab, seed: Injection({"evaluation.best_metric": "fd", "evaluation.samples": 24}),
        ),
        "patient_leakage": (
            lambda lab, seed: split_by_image(lab, seed, 0.6),
            lambda lab, seed: split_by_image(lab, seed, 0.0),
        ),
        "memorisation": (lambda lab, seed: doctored(copies, 0.25), lambda lab, seed: doctored(copies, 1.0)),
        "class_ignored": (
            lambda lab, seed: Injection(
                {"train.epochs": 3, "data.phantom.patients": 96, "evaluation.samples": 144}, (labels_mixed(0.9),)
            ),
            lambda lab, seed: Injection(
                {"train.epochs": 3, "data.phantom.patients": 96, "evaluation.samples": 144}, (labels_mixed(1.0),)
            ),
        ),
        "wrong_schedule": (
            lambda lab, seed: Injection(patches=(schedule_too_long(1.5),)),
            lambda lab, seed: Injection(patches=(schedule_too_long(4.0),)),
        ),
        "same_noise_on_ranks": (
            lambda lab, seed: doctored(ranks_that_draw, "abba"),
            lambda lab, seed: doctored(ranks_that_draw, "aaaa"),
        ),
        "stale_cache": (lambda lab, seed: stale(lab, seed, 3), lambda lab, seed: stale(lab, seed, 1)),
        "rank_deadlock": (lambda lab, seed: doctored(hanging, ""), lambda lab, seed: doctored(hanging, WATCHDOG)),
        "eval_oom": (
            lambda lab, seed: Injection(patches=(out_of_memory(1, lambda: RuntimeError(CPU)),)),
            lambda lab, seed: Injection(patches=(out_of_memory(2, lambda: torch.OutOfMemoryError(CUDA)),)),
        ),
        "run_left_running": (
            lambda lab, seed: doctored(abandoned, 2400.0),
            lambda lab, seed: doctored(abandoned, 36_000.0),
        ),
    }
)
"""Catalogue id -> how it is put in, weaker and stronger."""
PAIRS = (
    ("ema_lag", "guidance_too_high"),
    ("ema_lag", "metric_input_broken"),
    ("dead_loss_term", "wrong_schedule"),
    ("weights_not_moving", "patient_leakage"),
    ("stale_cache", "small_sample_fid"),
    ("prompt_prior", "wrong_schedule"),
)
"""Faults put in together, each at its stronger strength."""
HEALTHY: tuple[Mapping[str, Any], ...] = (
    {},
    {"adapter.method": "lora", "train.learning_rate": 3e-3},
    {"data.classes": ["P"]},
    {"train.learning_rate": 2e-3},
    {"sampling.guidance_scale": 1.5},
    {"sampling.guidance_scale": 5.0},
    {"ema.decay": 0.9, "ema.warmup": False, "evaluation.ema": True},
    {"evaluation.ema": True},
    {"prompts.style": "custom", "prompts.phase_prompts": {**CLINICAL}},
    {"data.phantom.patients": 20},
    {"train.lr_schedule": "constant"},
    {"train.lr_schedule": "linear", "train.gradient_accumulation_steps": 2, "train.batch_size": 4},
    {"ema.enabled": False},
    {"loss.min_snr_gamma": 5.0},
    {**PERCEPTUAL, "loss.perceptual_loss.weight": 0.01},
    {"adapter.method": "lora", "adapter.rank": 32, "train.learning_rate": 5e-3, "sampling.guidance_scale": 2.0},
    {"prompts.dropout": 0.2, "sampling.scheduler": "ddim", "sampling.num_inference_steps": 10},
    {"data.horizontal_flip": True, "data.views_per_image": 2},
    {"train.epochs": 6, "train.steps_per_epoch": 16},
    {"data.resolution_px": 48},
)
"""Settings that nothing is wrong with; the position is the seed too."""

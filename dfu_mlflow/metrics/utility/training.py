"""Train one classifier for a fixed number of steps, and let it name held-out pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from dfu_mlflow import runtime
from dfu_mlflow.config.judgement import UtilityConfig
from dfu_mlflow.metrics.utility.networks import Classifier, build_classifier

WEIGHT_DECAY = 0.01
WARMUP_FRACTION = 0.1
SHIFT = 0.0625
"""Largest shift of a training picture, as a share of its side."""


def train_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    config: UtilityConfig,
    seed: int,
    between_steps: Callable[[], None] = lambda: None,
) -> Classifier:
    """A classifier after `config.steps` steps of AdamW on images uint8 [N, H, W, 3] with labels int64 [N].

    Every picture is drawn equally often, mirrored at random and shifted by up to a sixteenth of its side. Weights at
    the start and the numbers behind every draw depend on `seed` alone: arms that differ in their pictures share them.

    Args:
        between_steps: called before each step; raises to stop.

    Raises:
        UserError: for a network that cannot be built, see `build_classifier`.
    """
    device = runtime.pick_device(config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.derive_seed(seed, "utility/weights"))
        classifier = build_classifier(config, classes)
    network = classifier.network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps + 1, pct_start=WARMUP_FRACTION
    )
    draws = runtime.generator(seed, "utility/batches")
    with torch.random.fork_rng(devices=[]):  # dropout, in networks that have it
        torch.manual_seed(runtime.derive_seed(seed, "utility/dropout"))
        for _ in range(config.steps):
            between_steps()
            rows = (torch.rand(config.batch_size, generator=draws) * len(images)).long()
            pixels = classifier.prepare(_augmented(images[rows], draws), device)
            loss = functional.cross_entropy(network(pixels), labels[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return classifier


@torch.inference_mode()
def name_classes(classifier: Classifier, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The class named for each of images uint8 [N, H, W, 3]: int64 [N]."""
    network = classifier.network.eval()
    device = next(network.parameters()).device
    return torch.cat([network(classifier.prepare(part, device)).argmax(1).cpu() for part in images.split(batch_size)])


def _augmented(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Each picture mirrored or not, and rolled by a shift of its own after continuing it by its edge."""
    count, height, width = images.shape[:3]
    reach = int(SHIFT * min(height, width))
    mirrored = torch.rand(count, generator=draws) < 0.5
    moves = torch.randint(-reach, reach + 1, (2, count, 1), generator=draws)
    down = (torch.arange(height) + moves[0]).clamp(0, height - 1)
    across = (torch.arange(width) + moves[1]).clamp(0, width - 1)
    across = torch.where(mirrored[:, None], across.flip(1), across)
    return images[torch.arange(count)[:, None, None], down[:, :, None], across[:, None, :]]

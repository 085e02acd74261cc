"""Figures of `benchmarks.cuda` in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Figures = dict[str, Any]
BESIDE = ("skipped", "out_of_memory", "cut_off", "failed")
"""Instead of figures."""


def lines(figures: Figures) -> Iterator[str]:
    """What is printed of one line of JSON."""
    name = figures["case"]
    if "on" in figures:
        return
    for word in BESIDE:
        if word in figures:
            which = f" {figures['optimizer']}" if "optimizer" in figures else ""
            yield f"{name}{which}: {word.replace('_', ' ')}: {figures[word]}"
            if "log" in figures:
                yield figures["log"]
            return
    yield f"{name}: {', '.join(_parts(figures))}"
    yield from (f"    {phase:<16}{_memory(found)}" for phase, found in figures.get("phases", {}).items())


def _parts(figures: Figures) -> Iterator[str]:
    if "bf16_flops_per_s" in figures:
        card = figures.get("card", figures["device"])
        memory = f" with {figures['total_gib']:.1f} GiB" if "total_gib" in figures else ""
        yield f"{card}{memory}, a large bf16 matrix product at {figures['bf16_flops_per_s'] / 1e12:.3g} TFLOP/s"
    if "base_gib" in figures:
        yield f"random base written, {figures['base_gib']:.3g} GiB"
    if "first_step_s" in figures:
        yield f"first step done {figures['start_s']:.1f} s after the start (itself {figures['first_step_s']:.1f} s)"
    if "first_batch_s" in figures:
        yield f"first batch drawn {figures['start_s']:.1f} s after the start (itself {figures['first_batch_s']:.1f} s)"
    if "images_per_s" in figures:
        yield from _training(figures)
    if "pictures_per_s" in figures:
        yield (
            f"{figures['pictures_per_s']:.3g} pictures/s in batches of {figures['batch_size']} with "
            f"{figures['solver_steps']} solver steps"
        )
    if "flops_per_picture" in figures:
        yield f"the UNet's {figures['flops_per_picture'] / 1e12:.3g} TFLOP a picture are {_share(figures)}"
    if "estimate_failed" in figures:
        yield f"not held against plan and rate: {figures['estimate_failed']}"
    if "update_s" in figures:
        yield f"{figures['optimizer']}: {1e3 * figures['update_s']:.2f} ms for {figures['weights']:,} weights"
        yield f"keeps {figures['state_gib']:.3f} GiB (plan: {figures['planned_state_gib']:.3f})"
    if "trained" in figures:
        yield "trained"
    if "registered" in figures:
        yield f"registered as {figures['registered']}"
    if "sampled" in figures:
        all_of_them = "" if figures["complete"] else ", some classes not full"
        yield f"{figures['sampled']} pictures sampled{all_of_them}; the whole chain {figures['chain_s']:.0f} s"


def _training(figures: Figures) -> Iterator[str]:
    yield f"{figures['images_per_s']:.3g} images/s ({figures['steps']} steps of {1e3 * figures['step_s']:.0f} ms)"
    if figures["skipped_steps"]:
        yield f"{figures['skipped_steps']} steps were not finite"
    if "planned_gib" not in figures:
        return
    yield f"{figures['flops_per_image'] / 1e12:.3g} TFLOP an image are {_share(figures)}"
    if figures["peak_gib"] is None:
        yield f"plan {figures['planned_gib']:.3g} GiB, no card to hold it against"
    else:
        yield (
            f"plan {figures['planned_gib']:.2f} GiB, the steps' tensors {figures['steps_over_plan']:.2f} of it, "
            f"highest of any phase {figures['peak_gib']:.2f} GiB"
        )


def _share(figures: Figures) -> str:
    return f"{figures['bf16_share']:.1%} of the bf16 rate"


def _memory(found: dict[str, float]) -> str:
    parts = [f"{found['seconds']:7.1f} s"]
    for key, words in (("allocated_gib", "tensors"), ("reserved_gib", "held by torch"), ("card_gib", "whole card")):
        if key in found:
            parts.append(f"{words} {found[key]:.2f} GiB")
    return ", ".join([*parts, f"host {found['host_gib']:.2f} GiB"])

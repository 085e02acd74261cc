"""The model card: what a registered sampler is, what it was measured to do, and what it is not for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HEADLINES = ("fid", "fd", "kid", "kid_progress", "coverage", "class_accuracy", "saturation_w1")
"""Shown where they were measured; all the others are tags of the version."""
MEMORISATION = "memorisation/"
GATE = "## Gate"
DESCRIPTION_CHARACTERS = 5000
"""What MLflow keeps of a version's description on SQL stores."""
INTENDED_USE = """## Intended use
Drawing synthetic photographs of diabetic foot ulcers by class, to add to the training images of a classifier whose gain
is measured on real photographs of patients that neither model has seen.

## Limits
- Every picture is synthetic. None shows a patient, and none may be used for diagnosis, treatment or teaching as if it
  did.
- What the training photographs lack (skin tones, sites, stages, cameras) the pictures lack too, or show wrongly.
- The classes are prompts, not findings: `class_accuracy` says how often a classifier of real photographs agrees.
- Figures compare few photographs: read their intervals. Copies of training photographs are looked for, not excluded:
  look at memorisation below, and keep the pictures as confidential as the photographs unless it is clean."""


@dataclass(frozen=True)
class CardFacts:
    """What the card is made of.

    Attributes:
        name: registered model.
        bundle: content of the bundle's `sampler.json`.
        run_id: the training run.
        data_digest: of the photographs and the split, None where the run does not tell.
        figures: of the packaged weights, `eval/kid` with `eval/kid_low` and `eval/kid_high`, `memorisation/...`.
        tags: of the version, such as `epoch`, `verdict` and `metric_identity`.
    """

    name: str
    bundle: Mapping[str, Any]
    run_id: str
    data_digest: str | None
    figures: Mapping[str, float]
    tags: Mapping[str, str]


def model_card(facts: CardFacts) -> str:
    """Markdown."""
    bundle = facts.bundle
    adapter, base = bundle["adapter"], bundle["base"]
    method = f"LoRA of rank {adapter['rank']}" if adapter["method"] == "lora" else "full fine-tune of the UNet"
    digests = base.get("file_digests", base.get("digests", {}))
    kept = "packaged with it" if base["bundled"] else "by reference, checked by these hashes when it is loaded"
    lines = [
        f"# {facts.name}",
        f"{method} of {base['source']}, {bundle['shown']} weights, registered by run {facts.run_id}.",
        "",
        "## Model",
        *(f"- {key}: {value}" for key, value in facts.tags.items()),
        f"- base: {base['source']}, {kept}",
        *(f"- SHA-256 of the base's {part}: {digest}" for part, digest in digests.items()),
        f"- photographs and split: {facts.data_digest or 'not told by the run'}",
        "",
        "## Prompts",
        *(f"- {label}: {text}" for label, text in bundle["prompts"].items()),
        f"- negative: {bundle['negative_prompt'] or 'none'}",
        "",
        "## Sampling defaults",
        *(f"- {key}: {value}" for key, value in bundle["settings"].items()),
        "",
        "## Figures on held-out patients, with 95 % intervals",
        *_headlines(facts.figures, str(bundle["shown"])),
        "",
        INTENDED_USE,
        "",
        "## Memorisation",
        *_memorisation(facts.figures),
    ]
    return "\n".join(lines) + "\n"


def with_gate(card: str, sentences: Iterable[str]) -> str:
    """The card with what the gate said last; cut to what MLflow keeps of a description."""
    kept = card.partition(f"\n{GATE}")[0].rstrip("\n")
    gate = "\n".join([GATE, *(f"- {sentence}" for sentence in sentences)])
    room = DESCRIPTION_CHARACTERS - len(gate) - 2
    return f"{kept[: max(room, 0)]}\n\n{gate}"[:DESCRIPTION_CHARACTERS]


def _headlines(figures: Mapping[str, float], shown: str) -> list[str]:
    group = "eval_ema" if shown == "ema" and any(name.startswith("eval_ema/") for name in figures) else "eval"
    found = [_figure(figures, f"{group}/{name}") for name in HEADLINES if f"{group}/{name}" in figures]
    return found or ["- none was measured"]


def _memorisation(figures: Mapping[str, float]) -> list[str]:
    names = [name for name in figures if name.startswith(MEMORISATION) and not name.endswith(("_low", "_high"))]
    later = "- not measured at registration: `promote` measures it and writes it to the tags `gate/memorisation/...`"
    return [_figure(figures, name) for name in names] or [later]


def _figure(figures: Mapping[str, float], name: str) -> str:
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
    return f"- {name}: {figures[name]:.4g}{interval}"

"""Class label -> prompt, by style. The texts are those of the founding analysis (its P and R in the same manner)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dfu_mlflow.config.schema import PromptsConfig
from dfu_mlflow.errors import UserError

MINIMAL: Mapping[str, str] = MappingProxyType(
    {
        "I": "diabetic foot ulcer, inflammatory phase",
        "P": "diabetic foot ulcer, proliferative phase",
        "R": "diabetic foot ulcer, remodeling phase",
    }
)
DETAILED: Mapping[str, str] = MappingProxyType(
    {
        "I": "Close-up clinical photograph of diabetic foot ulcer wound in inflammatory phase, "
        "acute open wound with redness erythema and swelling edema around wound margins, "
        "early wound response showing tissue inflammation and wound debridement stage, "
        "detailed wound bed texture with surrounding inflamed tissue, "
        "professional medical documentation, high resolution, sharp focus, clinical lighting",
        "P": "Close-up clinical photograph of diabetic foot ulcer wound in proliferative phase, "
        "open wound with red granulation tissue and new blood vessels filling the wound bed, "
        "active wound response showing tissue growth and wound contraction stage, "
        "detailed wound bed texture with surrounding healthy tissue, "
        "professional medical documentation, high resolution, sharp focus, clinical lighting",
        "R": "Close-up clinical photograph of diabetic foot ulcer wound in remodeling phase, "
        "closed wound with pale pink scar tissue and new epithelium over wound margins, "
        "late wound response showing tissue maturation and wound closure stage, "
        "detailed scar surface texture with surrounding healed tissue, "
        "professional medical documentation, high resolution, sharp focus, clinical lighting",
    }
)


def resolve_style(config: PromptsConfig) -> str:
    """`custom` where prompts were given, else what was asked for, else `minimal`."""
    return config.style or ("custom" if config.phase_prompts else "minimal")


def resolve_prompts(config: PromptsConfig, classes: Sequence[str]) -> dict[str, str]:
    """The prompt of each class. `minimal` covers any label; the other styles need one written for each class.

    Raises:
        UserError: naming the classes without a prompt.
    """
    style = resolve_style(config)
    if style == "minimal":
        return {label: MINIMAL.get(label, f"diabetic foot ulcer, {label}") for label in classes}
    known = (
        DETAILED if style == "detailed" else {k: " ".join(v.split()) for k, v in (config.phase_prompts or {}).items()}
    )
    missing = [label for label in classes if not known.get(label)]
    if missing:
        raise UserError(
            f"no prompt for class {', '.join(missing)} in prompts.style {style} (it has {', '.join(known)}): add "
            f"--prompts.phase_prompts.{missing[0]} '...' with --prompts.style custom"
        )
    return {label: known[label] for label in classes}

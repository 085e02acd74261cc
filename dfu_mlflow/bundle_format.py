"""What a sampler bundle says of itself: read without loading any network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.shared_unet import FineTune
from dfu_mlflow.base.weight_files import FileDigests
from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.documents import read_document
from dfu_mlflow.errors import UserError

BUNDLE = "sampler.json"


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn.

    Attributes:
        guidance_scale: w of classifier-free guidance, e(none) + w (e(prompt) - e(none)); 1 and below use the prompt
            alone.
        num_inference_steps: solver steps.
        scheduler: `base` (the base's own), `ddim`, `euler`, `dpmpp_2m` or `unipc`.
        guidance_rescale: share of the contrast restored after guidance.
        resolution_px: edge of the square image.
        original_size_px: (height, width) told to the model.
        prediction_type: what the UNet predicts; None is the base's own.
    """

    guidance_scale: float
    num_inference_steps: int
    resolution_px: int
    original_size_px: tuple[int, int]
    scheduler: str = "base"
    guidance_rescale: float = 0.0
    prediction_type: str | None = None

    @property
    def guided(self) -> bool:
        """Whether the unconditional prediction is needed."""
        return self.guidance_scale > 1

    def fits(self, other: Settings) -> bool:
        """Whether pictures of both can be drawn in one batch: guidance may differ from picture to picture."""
        return self.guided == other.guided and replace(self, guidance_scale=other.guidance_scale) == other


def read_settings(file: Path) -> Settings:
    """The defaults in a bundle's `sampler.json`."""
    settings = dict(read_document(file, "sampler")["settings"])
    settings["original_size_px"] = tuple(settings["original_size_px"])
    return Settings(**settings)


def require_same_base(base: BaseModel, facts: Mapping[str, Any], adapter: AdapterConfig) -> None:
    """A base that a bundle refers to must be the one it was trained on: a name on a hub can come to mean another.

    Args:
        facts: the bundle's on its base; earlier versions wrote `digests`, of tensors instead of files.

    Raises:
        UserError: naming the parts that differ.
    """
    known: Mapping[str, str] = facts.get("file_digests", facts.get("digests", {}))
    digest = base.digest if "file_digests" in facts else base.tensor_digest
    needed = [part for part in known if part != "unet" or adapter.method == "lora"]
    other = [part for part in needed if digest(part) != known[part]]
    if other:
        raise UserError(
            f"base {facts['source']} is another one than this model was trained on: {', '.join(other)} differ"
        )


@dataclass(frozen=True)
class Bundle:
    """What `dfu_mlflow.bundle.write_bundle` wrote, with no network loaded.

    Attributes:
        base: what was fine-tuned.
        tuned: the weights that learned.
        prompts: class label -> prompt.
        negative_prompt: empty for none.
        settings: sampling defaults.
        batch_size: pictures drawn at a time.
        mixed_precision: that training evaluated it in.
        shown: `live` or `ema`.
    """

    base: BaseModel
    tuned: FineTune
    prompts: Mapping[str, str]
    negative_prompt: str
    settings: Settings
    batch_size: int
    mixed_precision: str
    shown: str


def open_bundle(folder: Path, digests: FileDigests | None = None) -> Bundle:
    """Read a bundle's facts.

    Args:
        digests: of weight files; None remembers them in this call alone.

    Raises:
        UserError: when the folder is no bundle, or its base is missing or another one.
    """
    facts = read_document(folder / BUNDLE, "sampler")
    own = facts["base"]
    base = BaseModel(str(folder / "base") if own["bundled"] else own["source"], digests)
    adapter = AdapterConfig.model_validate(facts["adapter"])
    if not own["bundled"]:
        require_same_base(base, own, adapter)
    return Bundle(
        base=base,
        tuned=FineTune(adapter, folder / "weights.safetensors"),
        prompts=facts["prompts"],
        negative_prompt=facts["negative_prompt"],
        settings=read_settings(folder / BUNDLE),
        batch_size=int(facts["batch_size"]),
        mixed_precision=str(facts.get("mixed_precision", "no")),
        shown=str(facts["shown"]),
    )

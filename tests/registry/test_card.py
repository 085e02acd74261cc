"""The model card stands in the model and in the version's description; a base by reference is held to its hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from dfu_mlflow.base.load import PARTS, BaseModel
from dfu_mlflow.errors import UserError
from dfu_mlflow.sampling import Sampler
from registry.card import DESCRIPTION_CHARACTERS, GATE, CardFacts, model_card, with_gate
from registry.package import CARD, RegisteredSampler

BUNDLE_FACTS = {
    "base": {"bundled": False, "source": "clinic/base", "digests": {"unet": "ab" * 32}},
    "adapter": {"method": "lora", "rank": 8},
    "shown": "ema",
    "prompts": {"I": "inflamed", "R": "healed"},
    "negative_prompt": "",
    "settings": {"guidance_scale": 3.0},
}
FIGURES = {"eval/kid": 9.0, "eval_ema/kid": 0.25, "eval_ema/kid_low": 0.125, "eval_ema/kid_high": 0.375}


def card(figures: dict[str, float]) -> str:
    return model_card(CardFacts("dfu-sampler", BUNDLE_FACTS, "run", "d1ce", figures, {"epoch": "2"}))


def test_card_says_what_was_trained_and_how_it_did() -> None:
    text = card(FIGURES)
    for said in (
        "LoRA of rank 8 of clinic/base, ema weights",
        f"- SHA-256 of the base's unet: {'ab' * 32}",
        "- photographs and split: d1ce",
        "- I: inflamed",
        "- eval_ema/kid: 0.25 [0.125, 0.375]",
        "none may be used for diagnosis",
        "not measured at registration",
    ):
        assert said in text
    assert "eval/kid: 9" not in text, "the figures of the weights that were packaged, not of the others"
    assert "memorisation/membership_auc: 0.55 [0.5, 0.6]" in card(
        FIGURES | {f"memorisation/membership_auc{end}": value for end, value in AUC.items()}
    )


AUC = {"": 0.55, "_low": 0.5, "_high": 0.6}


def test_the_gates_last_word_replaces_the_one_before_and_fits() -> None:
    twice = with_gate(with_gate(card(FIGURES), ["FAILED quality"]), ["passed quality"])
    assert twice.count(GATE) == 1
    assert "FAILED" not in twice
    long = with_gate("x" * 9000, ["passed"] * 20)
    assert len(long) == DESCRIPTION_CHARACTERS
    assert long.endswith("- passed")


def test_registered_version_carries_its_card(registered: RegisteredSampler) -> None:
    version = MlflowClient().get_model_version(registered.name, str(registered.version))
    assert version.description.startswith("# dfu-sampler\nfull fine-tune of the UNet")
    (file,) = Path(mlflow.artifacts.download_artifacts(registered.uri)).rglob(f"artifacts/*/{CARD}")
    assert file.read_text(encoding="utf-8").startswith(version.description[:1000])


@pytest.mark.parametrize("key", ["file_digests", "digests"])
@pytest.mark.parametrize(
    ("part", "method", "held"), [("vae", "full", True), ("unet", "lora", True), (None, "full", False)]
)
def test_a_base_by_reference_is_held_to_its_hash(
    bundle: Path, tmp_path: Path, part: str | None, method: str, held: bool, key: str
) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    base = Path(shutil.copytree(bundle / "base", tmp_path / "base"))
    facts = json.loads((other / "sampler.json").read_text())
    model = BaseModel(str(base))
    digest = model.digest if key == "file_digests" else model.tensor_digest  # of earlier versions
    digests = {name: digest(name) for name in PARTS}
    if part is not None:
        digests[part] = "0" * 64
    facts["base"] = {"bundled": False, "source": str(base), key: digests}
    facts["adapter"]["method"] = method
    (other / "sampler.json").write_text(json.dumps(facts))
    if not held:
        assert Sampler.load(other, "cpu").classes == ("I", "P", "R")
        return
    with pytest.raises(UserError, match=f"is another one than this model was trained on: {part} differ"):
        Sampler.load(other, "cpu")

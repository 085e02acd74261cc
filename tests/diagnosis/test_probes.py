"""Faults that only the model, the photographs or the pictures show, on the random base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dfu_mlflow.base.autoencoder import VaeEncoder
from dfu_mlflow.conditioning import encode_prompts
from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.data import RowCache, encode_latents, evaluation_pixels
from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.checks.guidance_too_high import saturated
from dfu_mlflow.diagnosis.checks.memorisation import Memorisation
from dfu_mlflow.diagnosis.checks.metric_input_broken import MetricInputBroken
from dfu_mlflow.diagnosis.checks.noisy_validation import NoisyValidation
from dfu_mlflow.diagnosis.checks.patient_leakage import PatientLeakage
from dfu_mlflow.diagnosis.checks.prompt_prior import PromptPrior
from dfu_mlflow.diagnosis.checks.resolution_off_native import ResolutionOffNative
from dfu_mlflow.diagnosis.checks.stale_cache import StaleCache
from dfu_mlflow.diagnosis.checks.text_mismatch import TextMismatch
from dfu_mlflow.diagnosis.diagnose import diagnose
from dfu_mlflow.diagnosis.finding import CannotRun, Finding, Healthy, Outcome
from dfu_mlflow.diagnosis.text_variants import text_variants
from dfu_mlflow.diagnosis.weights import WeightFiles
from dfu_mlflow.types import Record
from dfu_mlflow.validation import grid_rows

NO_WEIGHTS = "no checkpoint was given"


def run(check: Check, config: RunConfig, **parts: Any) -> Outcome:
    bench = Bench(config, NO_WEIGHTS, **parts)
    return check.run(Case("a run", flatten(config), bench=bench, lacking={"curves": "none"}))


def changed(config: RunConfig, change: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, merge(config.model_dump(mode="json"), change))


def names_nobody(found: Finding, bench: Bench) -> None:
    """Findings go to MLflow: no file's name, nor a patient's as the names of files carry it."""
    told = json.dumps(found.document())
    records = bench.split.train + bench.split.held_out
    assert records
    for record in records:
        assert record.path.stem not in told
        assert record.path.stem[:4] not in told  # P000


def write_pictures(folder: Path, records: tuple[Record, ...], images: np.ndarray) -> Path:
    for number, (record, image) in enumerate(zip(records, images, strict=True)):
        path = folder / record.label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.mark.parametrize("name", ["final_layer", "first_ids_into_second", "encoded_empty"])
def test_embeddings_of_another_encoding_are_named(name: str, small_config: RunConfig, tmp_path: Path) -> None:
    bench = Bench(small_config, NO_WEIGHTS)
    with bench.text_encoders() as pipe:
        right = encode_prompts(pipe, bench.material.source.prompts, "")
        variants = {variant.name: variant for variant in text_variants(pipe, right)}
    names = ("embeddings", "pooled", "empty_embeddings", "empty_pooled")
    save_file({each: getattr(right, each).contiguous() for each in names}, tmp_path / "right.safetensors")
    assert isinstance(run(TextMismatch(), small_config, embeddings=tmp_path / "right.safetensors"), Healthy)
    if name not in variants:  # the random base has one tokenizer for both encoders
        assert name == "first_ids_into_second"
        return
    wrong = variants[name]
    save_file({each: getattr(wrong.told, each).contiguous() for each in names}, tmp_path / "wrong.safetensors")
    found = run(TextMismatch(), small_config, embeddings=tmp_path / "wrong.safetensors")
    assert isinstance(found, Finding)
    assert found.severity == "blocker"
    assert wrong.words in found.explanation


def test_other_classes_than_were_trained_are_no_other_encoding(small_config: RunConfig, tmp_path: Path) -> None:
    bench = Bench(small_config, NO_WEIGHTS)
    right = encode_prompts(bench.material.base, bench.material.source.prompts, "")
    save_file({"embeddings": right.embeddings[:2].contiguous()}, tmp_path / "two.safetensors")
    told = run(TextMismatch(), small_config, embeddings=tmp_path / "two.safetensors")
    assert isinstance(told, CannotRun)
    assert "2 classes were trained, 3 are here" in told.reason
    save_file({"embeddings": right.embeddings[:, :50].contiguous()}, tmp_path / "short.safetensors")
    assert isinstance(run(TextMismatch(), small_config, embeddings=tmp_path / "short.safetensors"), Finding)


def test_a_card_that_is_too_small_leaves_the_curves(small_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for once: every try takes minutes."""
    tries: list[int] = []

    def too_large(*_: object) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dfu_mlflow.diagnosis.bench.prepare", too_large)
    bench = Bench(small_config, NO_WEIGHTS)
    curves = {"ema/coverage": {1: 0.02}}
    case = Case("a run", flatten(small_config), curves, bench=bench)
    found = diagnose(case, "full")
    assert [each.id for each in found.findings if each.severity == "blocker"] == ["ema_lag"]
    assert "--device cpu" in found.unable["memorisation"]
    assert len(tries) == 1


def test_a_single_held_out_photograph_does_not_break_the_metric(small_config: RunConfig) -> None:
    bench = Bench(small_config, NO_WEIGHTS)
    bench.photograph_features = bench.photograph_features[:1]
    bench.photographs = bench.photographs[:1]
    assert MetricInputBroken()._blind(bench, {}) is None


def wrapped(images: np.ndarray) -> np.ndarray:
    """Scaled to 255 twice."""
    return (images.astype(np.float64) * 255).astype(np.int64).astype(np.uint8)


@pytest.mark.parametrize(
    ("break_them", "ill"),
    [(lambda images: images, False), (wrapped, True), (lambda images: 255 - images, True), (lambda x: x // 255, True)],
    ids=["sound", "wrapped", "inverted", "not scaled"],
)
def test_broken_pictures_are_found(
    break_them: Callable[[np.ndarray], np.ndarray], ill: bool, small_config: RunConfig, tmp_path: Path
) -> None:
    held = Bench(small_config, NO_WEIGHTS).split.held_out
    images = break_them(evaluation_pixels(held, small_config.data).numpy())
    outcome = run(MetricInputBroken(), small_config, folder=write_pictures(tmp_path / "pictures", held, images))
    assert isinstance(outcome, Finding if ill else Healthy)


@pytest.mark.parametrize("seed", range(4))
def test_a_metric_that_knows_no_negatives_is_found_and_a_sound_one_is_not(seed: int, small_config: RunConfig) -> None:
    bench = Bench(changed(small_config, {"seed": seed}), NO_WEIGHTS)
    found = MetricInputBroken().run(Case("a run", flatten(bench.config), bench=bench, lacking={"curves": "none"}))
    assert isinstance(found, Healthy)
    extract = bench.extractor
    bench.extractor = lambda images: extract(torch.minimum(images, 255 - images))  # type: ignore[assignment]
    del bench.photograph_features
    found = MetricInputBroken().run(Case("a run", flatten(bench.config), bench=bench, lacking={"curves": "none"}))
    assert isinstance(found, Finding)
    assert "do not tell negatives from photographs" in found.explanation


def test_colours_that_the_metric_did_not_see_are_found(small_config: RunConfig) -> None:
    """What a wrapped array between sampler and metric leaves in the curves of the untouched base."""
    bench = Bench(small_config, NO_WEIGHTS)
    seen = {"saturation": 0.95, "clipped_share": 0.2, "contrast": 0.4, "brightness": 0.5}
    curves = {f"eval/{name}": {0: value} for name, value in seen.items()}
    outcome = MetricInputBroken().run(Case("a run", flatten(small_config), curves, bench=bench))
    assert isinstance(outcome, Finding)
    assert "drawn again" in outcome.explanation


@pytest.mark.parametrize(
    ("high", "low", "found"),
    [(0.06, 0.01, True), (0.06, 0.05, False), (0.01, 0.005, False)],
    ids=["clips", "clips at the lower one too", "hardly clips"],
)
def test_clipping_is_guidances_where_less_guidance_clips_less(high: float, low: float, found: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    at_scale, at_best = (
        torch.tensor([0.4, clipped, 0.15, 0.4]) + 0.002 * torch.randn(48, 4, generator=generator)
        for clipped in (high, low)
    )
    assert saturated(at_scale, at_best, torch.tensor([0.4, 0.002, 0.14, 0.4])) is found


class Forgetful:
    """Another autoencoder under the name of this one: what a cache keyed by arguments reuses."""

    def __init__(self, encoder: VaeEncoder) -> None:
        self.encoder, self.identity = encoder, encoder.identity

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return 1.3 * self.encoder(pixels)


def test_a_stale_cache_is_found(small_config: RunConfig, tmp_path: Path) -> None:
    assert isinstance(run(StaleCache(), small_config), Healthy)
    other = changed(small_config, {"data": {"cache_dir": str(tmp_path / "other")}})
    material = Bench(other, NO_WEIGHTS).material
    cache = RowCache(tmp_path / "stale")
    encode_latents(material.source.split.train, other.data, other.seed, cache, Forgetful(material.encoder))
    stale = changed(small_config, {"data": {"cache_dir": str(tmp_path / "stale")}})
    found = run(StaleCache(), stale)
    assert isinstance(found, Finding)
    assert found.evidence["stale_share"].value == 1.0


def test_a_split_by_image_is_found(small_config: RunConfig) -> None:
    assert isinstance(run(PatientLeakage(), small_config), Healthy)
    found = run(PatientLeakage(), changed(small_config, {"data": {"group_by": "none"}}))
    assert isinstance(found, Finding)
    names_nobody(found, Bench(small_config, NO_WEIGHTS))
    mended = changed(small_config, {"data": {"group_by": found.fix["data.group_by"]}})
    assert isinstance(run(PatientLeakage(), mended), Healthy)


def test_copies_are_found(small_config: RunConfig, tmp_path: Path) -> None:
    config = changed(small_config, {"memorisation": {"neighbours": 20}, "data": {"validation_fraction": 0.4}})
    bench = Bench(config, NO_WEIGHTS)
    for side, kind in ((bench.split.train, Finding), (bench.split.held_out, Healthy)):
        chosen = side[:: max(1, len(side) // 24)]
        images = evaluation_pixels(chosen, config.data).numpy()
        folder = write_pictures(tmp_path / kind.__name__, chosen, images)
        outcome = run(Memorisation(), config, folder=folder)
        assert isinstance(outcome, kind), outcome
        if isinstance(outcome, Finding):
            names_nobody(outcome, bench)
            assert outcome.fix == {"train.epochs": config.train.epochs // 2}
            assert "held_out_side" not in outcome.evidence
            foreign = {"split": "not known"}
            once = run(Memorisation(), changed(config, {"train": {"epochs": 1}}), folder=folder, unnamed=foreign)
            assert isinstance(once, Finding)
            assert "assumed unseen" in str(once.evidence["held_out_side"].value)
            assert once.fix == {"train.learning_rate": config.train.learning_rate / 2}


def test_a_finding_does_not_depend_on_what_is_shown_beside_it(small_config: RunConfig, tmp_path: Path) -> None:
    """A fine-tune made elsewhere, with base and photographs named, but neither captions nor guidance."""
    unnamed = {"prompts": "its captions are not known", "sampling": "its guidance is not known"}
    tiny = changed(small_config, {"data": {"resolution_px": 16}})
    found = run(ResolutionOffNative(), tiny, unnamed=unnamed)
    assert isinstance(found, Finding)
    assert found.severity == "blocker"
    assert "captions" in str(found.evidence["base_kid"].value)
    curves = {"val/loss": dict(enumerate((0.109, 0.095, 0.081, 0.095, 0.105, 0.074), start=1))}
    bench = Bench(small_config, NO_WEIGHTS, unnamed=unnamed)
    noisy = NoisyValidation().run(Case("a run", flatten(small_config), curves, bench=bench))
    assert isinstance(noisy, Finding)
    assert "captions" in str(noisy.evidence["spread_over_redraws"].value)
    weights = {name: 1.01 * weight for name, weight in bench.base.unet().named_parameters()}
    save_file(weights, tmp_path / "weights.safetensors")
    photographs = bench.split.train[:: len(bench.split.train) // 24]
    folder = write_pictures(tmp_path / "drawn", photographs, evaluation_pixels(photographs, small_config.data).numpy())
    copies = Bench(
        small_config, WeightFiles(tmp_path / "weights.safetensors"), folder=folder, unnamed={"sampling": "not known"}
    )
    outcome = Memorisation().run(Case("a run", flatten(small_config), bench=copies))
    assert isinstance(outcome, Finding | Healthy)
    assert "membership_auc" in outcome.evidence


def test_prior_reliance_is_measured(small_config: RunConfig) -> None:
    sound = run(PromptPrior(), small_config)
    assert isinstance(sound, Healthy)
    assert sound.evidence["loss_over_short"].value == 0.0  # the minimal prompts are the shortest ones
    found = run(PromptPrior(), changed(small_config, {"prompts": {"style": "detailed"}}))
    assert isinstance(found, Finding)
    assert float(found.evidence["tokens"].value) > 40
    assert float(found.evidence["conditional_pull"].value) > 0
    assert {"loss_over_short", "loss_over_empty"} <= found.evidence.keys()
    assert any(name.startswith("pull_of.") for name in found.evidence)


def test_a_class_with_one_held_out_patient_keeps_what_needs_no_second_one(
    small_config: RunConfig, tmp_path: Path
) -> None:
    weights = {name: 1.5 * weight for name, weight in Bench(small_config, NO_WEIGHTS).base.unet().named_parameters()}
    save_file(weights, tmp_path / "weights.safetensors")
    small = changed(small_config, {"data": {"validation_fraction": 0.05}})
    bench = Bench(small, WeightFiles(tmp_path / "weights.safetensors"))
    assert min(len({each.patient for each in bench.split.held_out if each.label == name}) for name in "IPR") == 1
    outcome = PromptPrior().run(Case("a run", flatten(small), bench=bench))
    assert isinstance(outcome, Healthy)
    assert "two held-out patients" in str(outcome.evidence["prior_reliance"].value)
    assert float(outcome.evidence["moved_from_base"].value) > 0
    assert {"loss_over_short", "loss_over_empty", "conditional_pull"} <= outcome.evidence.keys()
    named_only = Case("a run", flatten(small), bench=Bench(small, NO_WEIGHTS, unnamed={"photographs": "none named"}))
    by_words = PromptPrior().run(named_only)
    assert isinstance(by_words, Healthy)
    assert by_words.evidence["losses"].value == "not measured: none named"


def test_photographs_of_one_patient_count_as_one(small_config: RunConfig, tmp_path: Path) -> None:
    bench = Bench(small_config, NO_WEIGHTS)
    rows = grid_rows(len(bench.material.held_out), small_config.evaluation.validation_images)
    owners = [bench.material.held_out.names[row][:4] for row in rows]  # P000
    values = torch.arange(len(rows), dtype=torch.float64)
    wanted = [float(values[[each == owner for each in owners]].mean()) for owner in sorted(set(owners))]
    assert 1 < len(wanted) < len(rows)
    assert bench.by_patient(torch.stack([values - 1, values + 1], dim=1)).tolist() == wanted
    weights = {name: 1.5 * weight for name, weight in bench.base.unet().named_parameters()}
    save_file(weights, tmp_path / "weights.safetensors")
    moved = Bench(small_config, WeightFiles(tmp_path / "weights.safetensors"))
    outcome = TextMismatch().run(Case("a run", flatten(small_config), bench=moved))
    assert isinstance(outcome, CannotRun), "that no wrong encoding is understood better is no clean bill"
    assert "give --embeddings" in outcome.reason
    alone = Bench(changed(small_config, {"evaluation": {"validation_images": 1}}), moved.files)
    assert "two held-out patients" in str(TextMismatch().run(Case("a run", flatten(alone.config), bench=alone)))
    told = PromptPrior().run(Case("a run", flatten(alone.config), bench=Bench(alone.config, NO_WEIGHTS)))
    assert isinstance(told, Healthy)
    assert "loss_over_short" in told.evidence
    assert "loss_over_short_low" not in told.evidence


def test_moved_weights_draw_other_pictures(small_config: RunConfig, tmp_path: Path) -> None:
    """The bench's fine-tuned network is the base plus the change, and the base stays as it was."""
    base = Bench(small_config, NO_WEIGHTS).base.unet()
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    save_file({name: 1.5 * weight for name, weight in before.items()}, tmp_path / "weights.safetensors")
    bench = Bench(small_config, WeightFiles(tmp_path / "weights.safetensors"))
    moved = dict(bench.unet("live").named_parameters())
    assert all(torch.allclose(moved[name], 1.5 * weight) for name, weight in before.items())
    assert all(torch.equal(weight, before[name]) for name, weight in bench.unet("base").named_parameters())
    assert not torch.equal(bench.losses("live"), bench.losses("base"))

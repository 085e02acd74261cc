"""All classes look the same."""

from __future__ import annotations

from dataclasses import replace

import torch

from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.metrics.classifier import class_accuracy, fit_classifier
from dfu_mlflow.metrics.intervals import proportion_estimate
from dfu_mlflow.photograph_features import PhotographFeatures
from dfu_mlflow.types import Estimate

ABOVE_CHANCE = 0.1
"""Accuracy above chance that the interval's upper end must reach; the untouched embedded base shows 0.07 [0.01,
0.14]."""
JUDGE = 0.25
"""Accuracy above chance that the classifier must have on photographs before it may judge."""
EARLY = 100
"""Updates before which it is too soon to tell: the embedded base draws classes apart after about 60."""


class ClassIgnored(Check):
    """A classifier on the samples; with the model a diffusion classifier on held-out photographs, and how far classes
    stand apart in the text embeddings."""

    id = "class_ignored"
    needs = ("eval/class_accuracy, or pictures and photographs",)
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Samples decide."""
        evidence: dict[str, Figure] = {}
        accuracy, judge, classes = self._accuracy(case)
        if classes < 2:
            raise Lacking("there is one class only")
        chance = 1 / classes
        evidence["class_accuracy"] = Figure(accuracy.value, f"well above {chance:.2g}, chance")
        evidence["class_accuracy_photographs"] = Figure(judge, "what the classifier reaches on photographs")
        if judge < chance + JUDGE:
            raise Lacking(f"the classifier itself names {judge:.0%} of photographs: it cannot judge samples")
        high = accuracy.value if accuracy.high is None else accuracy.high
        if high >= chance + ABOVE_CHANCE:
            return Healthy(evidence)
        if case.updates() < EARLY:
            raise Lacking(f"after {case.updates()} updates it is too soon to tell, {EARLY} are needed")
        if case.bench is not None and case.bench.has_weights:
            self._inside(case.bench, evidence)
        return self.found(
            "warning",
            0.85,
            evidence,
            f"A classifier that names {100 * judge:.0f} % of photographs names {100 * accuracy.value:.0f} % of the "
            "samples: the "
            "classes look alike. Give them prompts that differ in more than a word, and train text conditioning "
            "longer.",
            {"prompts.dropout": 0.1, "sampling.guidance_scale": 3.0, **self._longer(case)},
        )

    def _longer(self, case: Case) -> dict[str, int]:
        epochs = int(case.settings.get("train.epochs", 0))
        return {"train.epochs": 2 * epochs} if epochs else {}

    def _accuracy(self, case: Case) -> tuple[Estimate, float, int]:
        """Of the samples with its interval, of photographs, and the number of classes."""
        shown = "eval_ema" if case.tags.get("best.weights") == "ema" else "eval"
        if case.curves.get(f"{shown}/class_accuracy") and case.curves.get("eval/class_accuracy_reconstructed"):
            value = case.last(f"{shown}/class_accuracy")
            ends = [case.curves.get(f"{shown}/class_accuracy_{end}") for end in ("low", "high")]
            low, high = (end[max(end)] if end else None for end in ends)
            return Estimate(value, low, high), case.last("eval/class_accuracy_reconstructed"), case.classes()
        return self._judged(case.ready())

    def _judged(self, bench: Bench) -> tuple[Estimate, float, int]:
        material, split = bench.material, bench.material.source.split
        if len(bench.classes) < 2:
            return Estimate(1.0), 1.0, 1
        features = PhotographFeatures(bench.extractor, bench.config, material)
        ids = [
            torch.tensor([bench.classes.index(each.label) for each in side]) for side in (split.train, split.held_out)
        ]
        judge = fit_classifier(features.reconstructions(split.train), ids[0])
        on_photographs = class_accuracy(judge, features.reconstructions(split.held_out), ids[1]).value
        pictures = bench.pictures
        shown = class_accuracy(judge, bench.extractor(torch.from_numpy(pictures.images)), pictures.class_ids)
        return shown, on_photographs, len(bench.classes)

    def _inside(self, bench: Bench, evidence: dict[str, Figure]) -> None:
        """Diffusion classifier (Li et al. 2023): the prompt with the lowest loss names the class."""
        told, ids = bench.material.conditioner, bench.grid().class_ids
        count = len(bench.classes)
        losses = []
        for number in range(count):
            same = replace(
                told,
                embeddings=told.embeddings[number : number + 1].expand(count, -1, -1),
                pooled=told.pooled[number : number + 1].expand(count, -1),
            )
            losses.append(bench.losses(bench.shown, same).mean(1))
        named = torch.stack(losses).argmin(0)
        right = proportion_estimate(int((named == ids).sum()), len(ids))
        evidence["diffusion_classifier"] = Figure(right.value, f"above {1 / count:.2g}, chance")
        pooled = told.pooled.double().cpu()
        apart = torch.pdist(pooled).mean() / pooled.norm(dim=1).mean()
        evidence["distance_of_pooled_prompts"] = Figure(float(apart), "well above 0, relative to their length")

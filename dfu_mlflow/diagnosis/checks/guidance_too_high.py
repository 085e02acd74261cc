"""Guidance so high that colours saturate."""

from __future__ import annotations

import torch

from dfu_mlflow.diagnosis.bench import Bench, Shown
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.metrics.catalogue import METRICS
from dfu_mlflow.metrics.extractors.pixels import STATISTICS, colour_statistics
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.pair import Pair, generated_rows

LADDER = (1.5, 3.0, 5.0, 7.5)
USUAL = 7.5
"""Highest guidance that pipelines ship as a default (5.0 for Stable Diffusion XL, 7.5 for its predecessors)."""
FAR = 0.6
"""The optimum is far below the setting when it is at most this share of it."""
WORSE = 1.15
"""And the setting's kernel distance is at least this many times the optimum's."""
EXCESSES = ("saturation", "clipped_share", "contrast")
"""Colour statistics that too much guidance raises."""
LAGS = 0.5
"""Share of the live weights' way below which their average is not swept."""
HARMLESS = 4.0
"""Settings up to here are not swept: what little they cost buys agreement with the class."""


class GuidanceTooHigh(Check):
    """A sweep without retraining: kernel distance, saturation, clipped pixels and contrast by guidance."""

    id = "guidance_too_high"
    needs = ("sampling.guidance_scale", "the model and photographs, for the sweep")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Sweep where the model is at hand, else say what the setting and the logged colours suggest."""
        scale = float(case.setting("sampling.guidance_scale"))
        evidence = {"guidance_scale": Figure(scale, f"at most {USUAL:g}")}
        if scale <= HARMLESS:
            return Healthy(evidence)
        if case.bench is not None and case.bench.has_weights:
            try:
                return self._sweep(case.bench, scale, evidence)
            except Lacking as reason:
                evidence["sweep"] = Figure(f"not made: {reason}"[:200])
        return self._by_setting(case, scale, evidence)

    def _by_setting(self, case: Case, scale: float, evidence: dict[str, Figure]) -> Finding | Healthy:
        excess = 0
        for name in EXCESSES:
            shown, real = (case.curves.get(f"eval/{key}") for key in (name, f"{name}_real"))
            if shown and real:
                value, usual = shown[max(shown)], real[max(real)]
                evidence[name] = Figure(value, f"about {usual:.3g}, as photographs")
                excess += value > 1.15 * usual
        if scale <= USUAL:
            return Healthy(evidence)
        return self._finding(evidence, 0.8 if excess >= 2 else 0.6, f"Guidance {scale:g} is above what", 3.0)

    def _sweep(self, bench: Bench, scale: float, evidence: dict[str, Figure]) -> Finding | Healthy:
        wanted = sorted({*(rung for rung in LADDER if rung < 0.9 * scale), scale})
        held = bench.material.source.split.held_out
        ids = torch.tensor([bench.classes.index(record.label) for record in held])
        real = FeatureRows(bench.photograph_features, ids, tuple(record.patient for record in held))
        colour = colour_statistics(bench.config.data.resolution_px, bench.material.device)
        wished = colour(bench.photographs).mean(0)
        shown = self._moved(bench)
        replicates, colours = {}, {}
        for rung in wanted:
            class_ids, images = bench.draw(bench.sampler(shown, bench.settings(guidance_scale=rung)))
            pixels = torch.from_numpy(images)
            pair = Pair(real, generated_rows(bench.extractor(pixels), class_ids))
            replicates[rung] = METRICS["kernel"].replicates(pair)["kid"]
            colours[rung] = colour(pixels).mean(0)
            evidence[f"kid_at_{rung:g}"] = Figure(replicates[rung].value)
        best = min(wanted, key=lambda rung: replicates[rung].value)
        gap = (replicates[scale] - replicates[best]).estimate()
        for column, name in enumerate(STATISTICS):
            there = f"{float(wished[column]):.3g} in photographs, {float(colours[best][column]):.3g} at {best:g}"
            evidence[name] = Figure(float(colours[scale][column]), there)
        evidence["best_guidance"] = Figure(best, f"above {FAR * scale:.2g}")
        clear = gap.low is not None and gap.low > 0
        much = replicates[scale].value > WORSE * replicates[best].value
        if best > FAR * scale or not clear or not much:
            return Healthy(evidence)
        return self._finding(
            evidence, 0.95, f"KID is {gap.value:.3g} worse at guidance {scale:g} than at {best:g}, and", best
        )

    def _moved(self, bench: Bench) -> Shown:
        """The weights to sweep: what guidance does to an average that has hardly left the base says nothing."""
        if bench.shown == "ema" and bench.movement("ema").displacement < LAGS * bench.movement("live").displacement:
            return "live"
        return bench.shown

    def _finding(self, evidence: dict[str, Figure], confidence: float, start: str, better: float) -> Finding:
        sentence = (
            "pipelines use: colours saturate and the prompt's cartoon wins."
            if start.endswith("what")
            else "colours go with it."
        )
        return self.found(
            "warning",
            confidence,
            evidence,
            f"{start} {sentence} Nothing needs to be trained again: sample at {better:g}.",
            {"sampling.guidance_scale": better},
        )

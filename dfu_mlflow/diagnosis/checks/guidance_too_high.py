"""Guidance so high that colours saturate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy import stats

from dfu_mlflow.diagnosis.bench import PICTURES, Bench, Shown
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.metrics.catalogue import METRICS
from dfu_mlflow.metrics.extractors.pixels import STATISTICS, colour_statistics
from dfu_mlflow.metrics.intervals import Replicates
from dfu_mlflow.metrics.matching import FeatureRows, proportional_counts
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
CLIPPED, TWICE, SURE = 0.015, 2.0, 3.0
"""Clipping is guidance's where its share exceeds the photographs' by so much, by so many times what it does at the
better guidance, and differs from that by so many standard errors over equal seeds.

Measured on the embedded base after 240 updates: 0.05 to 0.09 at guidance 12, 0.005 to 0.011 at 3, 0.002 in photographs.
"""
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
        reason = f"Guidance {scale:g} is above what pipelines use: colours saturate and the prompt's cartoon wins."
        return self._finding(evidence, 0.8 if excess >= 2 else 0.6, reason, 3.0)

    def _sweep(self, bench: Bench, scale: float, evidence: dict[str, Figure]) -> Finding | Healthy:
        ladder = sorted({*(rung for rung in LADDER if rung < 0.9 * scale), scale})
        kid, colours = self._climb(bench, ladder)
        evidence |= {f"kid_at_{rung:g}": Figure(kid[rung].value) for rung in ladder}
        best = min((rung for rung in ladder if rung <= FAR * scale), key=lambda rung: kid[rung].value)
        wished = colour_statistics(bench.config.data.resolution_px, bench.material.device)(bench.photographs).mean(0)
        at_scale, at_best = (colours[rung].mean(0) for rung in (scale, best))
        for name, here, there, photographs in zip(STATISTICS, at_scale, at_best, wished, strict=True):
            evidence[name] = Figure(float(here), f"{photographs:.3g} in photographs, {there:.3g} at {best:g}")
        evidence["best_guidance"] = Figure(best, f"of those up to {FAR * scale:.2g}")
        gap = (kid[scale] - kid[best]).estimate()
        widened = 0.0 if gap.low is None else gap.value - (gap.value - gap.low) * _widening(len(ladder) - 1)
        worse = kid[scale].value > WORSE * kid[best].value
        if worse and widened > 0:
            reason = f"KID is {gap.value:.3g} worse at guidance {scale:g} than at {best:g}, and colours go with it."
            return self._finding(evidence, 0.95, reason, best)
        doubtful = worse or (scale > USUAL and gap.value > 0)
        if doubtful and saturated(colours[scale], colours[best], wished):
            reason = f"Pixels clip at guidance {scale:g} that do not at {best:g}, and KID is no better for it."
            return self._finding(evidence, 0.85, reason, best)
        return Healthy(evidence)

    def _climb(
        self, bench: Bench, ladder: Sequence[float]
    ) -> tuple[dict[float, Replicates], dict[float, torch.Tensor]]:
        """Kernel distance, and colour statistics [N, 4], of pictures from equal seeds at each guidance."""
        held = bench.material.source.split.held_out
        ids = torch.tensor([bench.classes.index(record.label) for record in held])
        real = FeatureRows(bench.photograph_features, ids, tuple(record.patient for record in held))
        colour = colour_statistics(bench.config.data.resolution_px, bench.material.device)
        shown = self._moved(bench)
        # drawn in the photographs' proportions: the more guidance parts the classes, the more unlike ones would cost
        counts = proportional_counts(ids, PICTURES)
        class_ids = torch.cat([torch.full((count,), label) for label, count in sorted(counts.items())])
        kid, colours = {}, {}
        for rung in ladder:
            _, images = bench.draw(bench.sampler(shown, bench.settings(guidance_scale=rung)), class_ids=class_ids)
            pixels = torch.from_numpy(images)
            pair = Pair(real, generated_rows(bench.extractor(pixels), class_ids))
            kid[rung] = METRICS["kernel"].replicates(pair)["kid"]
            colours[rung] = colour(pixels)
        return kid, colours

    def _moved(self, bench: Bench) -> Shown:
        """The weights to sweep: what guidance does to an average that has hardly left the base says nothing."""
        if bench.shown == "ema" and bench.movement("ema").displacement < LAGS * bench.movement("live").displacement:
            return "live"
        return bench.shown

    def _finding(self, evidence: dict[str, Figure], confidence: float, reason: str, better: float) -> Finding:
        said = f"{reason} Nothing needs to be trained again: sample at {better:g}."
        return self.found("warning", confidence, evidence, said, {"sampling.guidance_scale": better})


def _widening(looked_at: int) -> float:
    """What makes a 95 % interval hold for the best of so many guidances (Bonferroni)."""
    return float(stats.norm.ppf(1 - 0.025 / looked_at) / stats.norm.ppf(0.975))


def saturated(high: torch.Tensor, low: torch.Tensor, photographs: torch.Tensor) -> bool:
    """Is the clipping guidance's?

    Args:
        high, low: `colour_statistics` of pictures from equal seeds at the setting and at a lower guidance, [N, 4] each.
        photographs: mean of the same over photographs, [4].
    """
    column = STATISTICS.index("clipped_share")
    change = high[:, column] - low[:, column]
    excess, other = (float(values[:, column].mean() - photographs[column]) for values in (high, low))
    sure = float(change.mean()) > SURE * float(change.std()) / len(change) ** 0.5
    return sure and excess > max(CLIPPED, TWICE * other)

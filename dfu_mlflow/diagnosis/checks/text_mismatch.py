"""Training text embeddings that differ from sampling's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from scipy import stats

from dfu_mlflow.conditioning import Conditioner, encode_prompts
from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.prior_reliance import nothing
from dfu_mlflow.diagnosis.text_variants import TextVariant, text_variants
from dfu_mlflow.diagnosis.weights import read_tensors

DIFFERENT = 0.02
"""Relative distance of embeddings from which they are others; storage in bfloat16 makes 0.004."""
BETTER = 0.004
"""How much less the fine-tuned network's loss must be under a wrong encoding than under sampling's, relative to it and
beyond what the base shows."""
WHO: tuple[Literal["live", "base"], ...] = ("live", "base")
LEVEL = 0.01
"""Two-sided, of each test: three wrong encodings are tried."""


class TextMismatch(Check):
    """Embeddings that the run trained on beside `pipe.encode_prompt`; where they are not at hand, whether the
    fine-tuned network understands a wrong encoding better than the right one."""

    id = "text_mismatch"
    needs = ("base", "prompts", "a file of embeddings, or the checkpoint and photographs")
    cost = "probe"

    def examine(self, case: Case) -> Finding | Healthy:
        """Direct comparison where it can be made."""
        bench = case.ready()
        evidence: dict[str, Figure] = {}
        material = bench.material
        bench.require("prompts")
        with bench.text_encoders() as pipe:
            right = encode_prompts(pipe, material.source.prompts, "")
        used = self._used(bench, right)
        for name, value in used.items():
            wanted = getattr(right, name)
            if len(value) != len(wanted) and not name.startswith("empty"):
                raise Lacking(
                    f"{len(value)} classes were trained, {len(wanted)} are here: give the photographs and prompts it "
                    "was trained on"
                )
            if value.shape != wanted.shape:
                evidence[name] = Figure(str(list(value.shape)), str(list(wanted.shape)))
                return self._finding(evidence, f"{name} have another shape", 0.99)
            gap = float((value - wanted).norm() / wanted.norm().clamp(min=1e-6))
            evidence[name] = Figure(gap, f"below {DIFFERENT}, relative to encode_prompt's")
        wrong = [name for name, figure in evidence.items() if float(figure.value) > DIFFERENT]
        if wrong:
            return self._finding(evidence, self._explain(bench, wrong[0], used[wrong[0]], right), 0.98)
        if bench.embeddings is None and bench.has_weights:
            return self._by_loss(bench, right, evidence)
        if not used:
            raise Lacking("neither the text embeddings it trained on (--embeddings) nor weights are at hand")
        return Healthy(evidence)

    def _used(self, bench: Bench, right: Conditioner) -> dict[str, torch.Tensor]:
        """What the run trained on: the given file's rows, else what this project's cache holds."""
        names = ("embeddings", "pooled", "empty_embeddings", "empty_pooled")
        if bench.embeddings is None and "cache" in bench.unnamed:
            return {}
        if bench.embeddings is None:
            kept = bench.material.conditioner.to(torch.device("cpu"))
            return {name: getattr(kept, name) for name in names}
        stored = read_tensors(bench.embeddings)
        found = {name: stored[name].float() for name in names if name in stored}
        if not found:
            raise Lacking(f"{bench.embeddings.name} holds none of {', '.join(names)} (rows by class, sorted by label)")
        return found

    def _explain(self, bench: Bench, name: str, value: torch.Tensor, right: Conditioner) -> str:
        with bench.text_encoders() as pipe:
            variants = text_variants(pipe, right)
        gaps = {variant: float((getattr(variant.told, name) - value).norm() / value.norm()) for variant in variants}
        closest = min(gaps, key=lambda variant: gaps[variant])
        return closest.words if gaps[closest] < DIFFERENT else f"{name} are not what the pipeline encodes"

    def _by_loss(self, bench: Bench, right: Conditioner, evidence: dict[str, Figure]) -> Finding:
        """Loss under each wrong encoding less loss under the right one, fine-tuned less base, paired by patient.

        Raises:
            Lacking: where none is understood better. That is no clean bill: a small fine-tune that was trained on
                another encoding is often not better under it either.
        """
        found: list[tuple[float, TextVariant]] = []
        with bench.text_encoders() as pipe:
            variants = text_variants(pipe, right)
        seen = {who: _losses(bench, who, right, variants) for who in WHO}
        for number, variant in enumerate(variants):
            (plain_now, wrong_now), (plain_before, wrong_before) = seen["live"][number], seen["base"][number]
            gain = bench.by_patient(plain_now - wrong_now)
            if len(gain) < 2:
                raise Lacking("whether a wrong encoding is understood better takes two held-out patients")
            own = bench.by_patient(plain_before - wrong_before)
            mean, error = float(gain.mean()), float((gain - own).std()) / len(gain) ** 0.5
            beyond = float((gain - own).mean())
            scale = float(plain_now.mean())
            evidence[f"better_under.{variant.name}"] = Figure(mean / scale, "below 0")
            errors = float(stats.t.ppf(1 - LEVEL / 2, len(gain) - 1))
            if mean > BETTER * scale and beyond > max(errors * error, BETTER * scale):
                found.append((mean / scale, variant))
        if not found:
            raise Lacking(
                "the fine-tuned network understands none of the usual wrong encodings better, which does not say that "
                "it was trained on the right one: give --embeddings, what it was trained on"
            )
        return self._finding(evidence, max(found, key=lambda pair: pair[0])[1].words, 0.85)

    def _finding(self, evidence: dict[str, Figure], what: str, confidence: float) -> Finding:
        return self.found(
            "blocker",
            confidence,
            evidence,
            f"The network was trained on other text embeddings than it is sampled with: {what}. It then answers "
            "prompts it has never seen. No setting mends this: the code that encodes captions for training is wrong; "
            "train again on what the pipeline's encode_prompt gives.",
            {},
        )


def _losses(
    bench: Bench, who: Literal["live", "base"], right: Conditioner, variants: Sequence[TextVariant]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses [M, T] under the right encoding and under each wrong one, of one set of weights at a time."""
    device = bench.material.device
    empty = nothing(right).to(device)
    found = []
    for variant in variants:
        told = variant.told.to(device)
        plain = bench.losses(who, empty) if variant.unconditional else bench.losses(who)
        found.append((plain, bench.losses(who, nothing(told) if variant.unconditional else told)))
    return found

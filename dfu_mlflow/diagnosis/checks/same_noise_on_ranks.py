"""Every rank draws the same noise and timesteps, so that more cards add nothing."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import DRAWS, Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking


class SameNoiseOnRanks(Check):
    """Digests of each rank's first draws; without them, whether one seed is set on all ranks alike."""

    id = "same_noise_on_ranks"
    needs = ("tags draws.rankN, or runtime.num_processes and runtime.seed_by_rank",)
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Measured draws decide; a configuration only makes it likely."""
        digests = [value for name, value in sorted(case.tags.items()) if name.startswith(DRAWS)]
        if len(digests) > 1:
            evidence = {
                "ranks": Figure(float(len(digests))),
                "distinct_draws": Figure(float(len(set(digests))), "as many as ranks"),
            }
            return Healthy(evidence) if len(set(digests)) == len(digests) else self._finding(evidence, 0.98)
        ranks = case.ranks()
        if ranks == 1:
            return Healthy({"ranks": Figure(1.0)})
        if "runtime.seed_by_rank" not in case.settings:
            raise Lacking(f"{ranks} processes, and neither draws by rank nor runtime.seed_by_rank are known")
        evidence = {
            "ranks": Figure(float(ranks)),
            "seed_by_rank": Figure(str(bool(case.settings["runtime.seed_by_rank"])), "True"),
        }
        return Healthy(evidence) if case.settings["runtime.seed_by_rank"] else self._finding(evidence, 0.7)

    def _finding(self, evidence: dict[str, Figure], confidence: float) -> Finding:
        return self.found(
            "warning",
            confidence,
            evidence,
            "All ranks draw the same noise and timesteps: each update sees one card's worth of them, however many "
            "cards "
            "there are. No setting mends this: the code that draws must make its seed depend on the rank.",
            {},
        )

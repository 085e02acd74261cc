"""How fast is an evaluation? `python -m benchmarks.evaluation` prints ratios measured side by side in one run.

The Frechet distance at N = 300, 1,000 and 3,000 x 2,048 against clean-fid's `frechet_distance` on the same features,
both from the features on (means and covariances included); then every embedded metric of 300 pictures, sampling apart.
`--sizes 300` measures one size alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from cleanfid.fid import frechet_distance as cleanfid_distance

from benchmarks.machine import machine
from dfu_mlflow.data.phantom import render
from dfu_mlflow.metrics.catalogue import metrics_of
from dfu_mlflow.metrics.extractors.base import NetworkExtractor
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.extractors.pixels import colour_statistics, pixel_values
from dfu_mlflow.metrics.frechet import frechet_distance
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.reference import RealFeatures, Reference, ReferenceSettings

WIDTH = 2048
TARGETS = {300: 25.0, 1000: 10.0, 3000: 3.0}
EVALUATION_TARGET_S = 30.0
PICTURES = 300


def features(rows: int, seed: int) -> torch.Tensor:
    """float64 [rows, 2048], not negative, with the falling spectrum of Inception's features: eigenvalues as 1/k."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    drawn = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return (0.4 + drawn * torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.5 @ turn).clamp(min=0)


def cleanfid_from_features(real: torch.Tensor, fake: torch.Tensor) -> float:
    """What clean-fid does with features."""
    moments = [(side.mean(0), np.cov(side, rowvar=False)) for side in (real.numpy(), fake.numpy())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy's deprecation of a parameter, at each call
        return float(cleanfid_distance(*moments[0], *moments[1]))


def timed(work: Callable[[], float], repeats: int) -> tuple[float, float]:
    """(result, seconds of the fastest of `repeats`)."""
    fastest, result = float("inf"), 0.0
    for _ in range(repeats):
        start_s = time.perf_counter()
        result = work()
        fastest = min(fastest, time.perf_counter() - start_s)
    return result, fastest


def compare_frechet(size: int) -> bool:
    """Print one line; True where the ratio and the values are as they must be."""
    real, fake = features(size, 1), features(size, 2) * 1.1
    ours, ours_s = timed(lambda: frechet_distance(real, fake), 3)
    theirs, theirs_s = timed(lambda: cleanfid_from_features(real, fake), 1)
    ratio, apart = theirs_s / ours_s, abs(ours - theirs) / abs(theirs)
    good = ratio >= TARGETS.get(size, 1.0) and apart < 1e-6
    print(
        f"FD {size:>5} x {WIDTH}: {ours_s:8.3f} s, clean-fid {theirs_s:8.2f} s: {ratio:7.1f} times as fast"
        f" (at least {TARGETS.get(size, 1.0):g} wanted), values apart by {apart:.1e} {'ok' if good else 'MISSED'}",
        flush=True,
    )
    return good


def phantoms(first_patient: int) -> torch.Tensor:
    """uint8 [300, 64, 64, 3], three pictures a patient."""
    drawn = [render(first_patient + row // 3, 0, row % 3, "IPR"[row // 3 % 3]) for row in range(PICTURES)]
    return torch.from_numpy(np.stack(drawn))


def time_evaluation() -> bool:
    """Every metric of the embedded extractors on 300 generated pictures, the real side's features being cached."""
    sets = [phantoms(first) for first in (0, 1000, 2000)]
    ids = torch.arange(PICTURES) // 3 % 3
    extractors = {
        "efficientnet_lite0": efficientnet_lite0(96),
        "colour": colour_statistics(64),
        "pixels": pixel_values(),
    }
    total_s = 0.0
    for name, extractor in extractors.items():
        total_s += time_panel(name, extractor, sets, ids)
    good = total_s < EVALUATION_TARGET_S
    outcome = "ok" if good else "MISSED"
    print(f"all of {PICTURES} pictures: {total_s:.1f} s (under {EVALUATION_TARGET_S:g} wanted) {outcome}")
    return good


def time_panel(name: str, extractor: NetworkExtractor, sets: Sequence[torch.Tensor], ids: torch.Tensor) -> float:
    """Seconds to build the reference and to extract and report one set of pictures."""
    people = tuple(str(row // 3) for row in range(PICTURES))
    held_out, training = (FeatureRows(extractor(pictures), ids, people) for pictures in sets[:2])
    settings = ReferenceSettings(extractor.identity, PICTURES, metrics=metrics_of(name, thorough=True), judge=False)
    start_s = time.perf_counter()
    reference = Reference(RealFeatures(("I", "P", "R"), held_out, training), settings)
    built_s = time.perf_counter() - start_s
    found = extractor(sets[2])
    extracted_s = time.perf_counter() - start_s - built_s
    figures = len(reference.report(found, ids).values)
    seconds = time.perf_counter() - start_s
    print(
        f"{name:>20}: floors {built_s:.2f} s, features {extracted_s:.2f} s, {figures} figures with intervals"
        f" {seconds - built_s - extracted_s:.2f} s",
        flush=True,
    )
    return seconds


def main(arguments: Sequence[str]) -> int:
    """Run everything; 0 where all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=sorted(TARGETS))
    sizes = parser.parse_args(arguments).sizes
    print(machine("torch", "numpy", "scipy", "clean-fid"))
    good = [compare_frechet(size) for size in sizes]
    return 0 if all([*good, time_evaluation()]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

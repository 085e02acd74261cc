"""Every metric by name, and which of them an extractor's features are good for."""

from __future__ import annotations

from collections.abc import Mapping

from dfu_mlflow.metrics.cmmd import CMMD
from dfu_mlflow.metrics.colour import COLOUR
from dfu_mlflow.metrics.frechet import frechet_from_gram
from dfu_mlflow.metrics.intervals import Replicates, kernel_replicates
from dfu_mlflow.metrics.kernel import kernel_from_gram, paired_kernel_from_gram
from dfu_mlflow.metrics.lpips_distance import LPIPS
from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.neighbours import NEIGHBOURS
from dfu_mlflow.metrics.pair import Pair
from dfu_mlflow.metrics.ssim import SSIM
from dfu_mlflow.metrics.vendi import VENDI


def _frechet(pair: Pair) -> dict[str, float]:
    return {"fd": frechet_from_gram(pair.products)}


def _kernel(pair: Pair) -> dict[str, float]:
    return {"kid": kernel_from_gram(pair.products)}


def _paired_kernel(pair: Pair) -> dict[str, float]:
    return {"kid": paired_kernel_from_gram(pair.products)}


def _kernel_replicates(pair: Pair) -> dict[str, Replicates]:
    return {"kid": kernel_replicates(pair.products, pair.patients)}


FRECHET = Metric({"fd": "smaller"}, _frechet, None, (), ("fd",), ("fd",), _frechet)
"""Not by class: with few pictures its bias drowns the figure."""
KERNEL = Metric({"kid": "smaller"}, _kernel, _kernel_replicates, ("kid",), ("kid",), ("kid",), _paired_kernel)

METRICS: Mapping[str, Metric] = {
    "frechet": FRECHET,
    "kernel": KERNEL,
    "neighbours": NEIGHBOURS,
    "vendi": VENDI,
    "cmmd": CMMD,
    "colour": COLOUR,
    "ssim": SSIM,
    "lpips": LPIPS,
}

ALWAYS: Mapping[str, tuple[str, ...]] = {
    "efficientnet_lite0": ("frechet", "kernel", "neighbours"),
    "colour": ("colour",),
    "pixels": ("ssim",),
    "inception": ("frechet",),
    "lpips": ("lpips",),
    "dinov2": ("frechet", "kernel", "neighbours"),
    "clip": ("cmmd",),
}
"""Extractor -> metrics after each epoch."""
THOROUGH: Mapping[str, tuple[str, ...]] = {
    "efficientnet_lite0": ("vendi",),
    "inception": ("kernel", "neighbours", "vendi"),
    "dinov2": ("vendi",),
}
"""What `evaluate` adds."""
SUFFIXES: Mapping[str, str] = {"inception": "_inception", "dinov2": "_dinov2"}
"""Ends the names of figures that another extractor gives as well; the plain ones are the embedded extractor's."""


def metrics_of(extractor: str, thorough: bool) -> tuple[str, ...]:
    """Names of the metrics to compute on the features of `extractor` (a key of `ALWAYS`)."""
    return ALWAYS[extractor] + (THOROUGH.get(extractor, ()) if thorough else ())


def figure_names(extractor: str, metrics: tuple[str, ...]) -> dict[str, str]:
    """Figure -> the name it is reported under, where that is another: `fid` is only ever Inception's."""
    suffix = SUFFIXES.get(extractor, "")
    names = {figure: f"{figure}{suffix}" for metric in metrics for figure in METRICS[metric].figures if suffix}
    return {**names, "fd": "fid"} if extractor == "inception" else names

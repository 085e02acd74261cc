"""Photographs -> records, views, cached latents. Start at `load_split`."""

from dfu_mlflow.data.audit import Audit, ClassCount, Problem
from dfu_mlflow.data.cache import RowCache, default_cache_dir
from dfu_mlflow.data.dataset import (
    LatentEncoder,
    encode_evaluation_latents,
    encode_latents,
    evaluation_pixels,
)
from dfu_mlflow.data.images import load_rgb
from dfu_mlflow.data.load import load_split
from dfu_mlflow.data.order import epoch_order
from dfu_mlflow.data.split import dataset_digest
from dfu_mlflow.data.views import evaluation_view, view

__all__ = [
    "Audit",
    "ClassCount",
    "LatentEncoder",
    "Problem",
    "RowCache",
    "dataset_digest",
    "default_cache_dir",
    "encode_evaluation_latents",
    "encode_latents",
    "epoch_order",
    "evaluation_pixels",
    "evaluation_view",
    "load_rgb",
    "load_split",
    "view",
]

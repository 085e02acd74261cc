"""Networks that turn pictures into features."""

from dfu_mlflow.metrics.extractors.base import Extractor
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.extractors.inception import Unavailable, inception

__all__ = ["Extractor", "Unavailable", "efficientnet_lite0", "inception"]

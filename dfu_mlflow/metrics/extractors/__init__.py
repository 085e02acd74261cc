"""Networks that turn pictures into features."""

from dfu_mlflow.metrics.extractors.base import Extractor, NetworkExtractor
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.extractors.inception import Unavailable, inception

__all__ = ["Extractor", "NetworkExtractor", "Unavailable", "efficientnet_lite0", "inception"]

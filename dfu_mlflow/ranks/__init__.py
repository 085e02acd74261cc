"""Several processes on one run."""

from dfu_mlflow.ranks.ranks import RankLost, Ranks, is_main_process, joined, uses_deepspeed

__all__ = ["RankLost", "Ranks", "is_main_process", "joined", "uses_deepspeed"]

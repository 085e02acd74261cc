"""Several processes on one run."""

from dfu_mlflow.ranks.ranks import RankLost, Ranks, is_main_process, joined, uses_deepspeed, uses_fsdp

__all__ = ["RankLost", "Ranks", "is_main_process", "joined", "uses_deepspeed", "uses_fsdp"]

"""`train -P launch=ddp`: the same command again, in several processes under accelerate's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dfu_mlflow.errors import UserError

FOLDER = Path(__file__).resolve().parent / "config" / "launch"
NONE = "none"


def launch_names() -> list[str]:
    """What `--launch` takes besides `none`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def launch_command(launch: str, processes: str, device: str) -> list[str] | None:
    """The start of the launcher's command line, to be followed by a module and its arguments.

    Args:
        launch: `none`, or one of `launch_names`.
        processes: how many, as typed; empty is one a GPU.
        device: `cpu` takes no GPU.

    Returns:
        None for `none`, and in a process that a launcher has started already.

    Raises:
        UserError: for an unknown launch or a number of processes that makes no sense.
    """
    if "LOCAL_RANK" in os.environ:
        return None
    if launch == NONE:
        if processes:
            raise UserError(f"--processes {processes} needs --launch: one of {', '.join(launch_names())}")
        return None
    if launch not in launch_names():
        raise UserError(f"--launch {launch}: unknown; {NONE}, {', '.join(launch_names())} are known")
    count = _count(processes, device)
    options = ["--config_file", str(FOLDER / f"{launch}.yaml"), "--num_processes", str(count)]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def replace_process(command: Sequence[str], device: str) -> None:
    """Become the launcher, so that signals and the exit code are its own; returns to nobody."""
    environment = dict(os.environ)
    if device == "cpu":
        # DeepSpeed picks an accelerator by what is installed, not by what it is told.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    sys.stdout.flush()
    os.execvpe(command[0], list(command), environment)


def _count(processes: str, device: str) -> int:
    if processes and (not processes.isdecimal() or int(processes) < 2):
        raise UserError(f"--processes {processes}: a whole number from 2 is needed")
    import torch

    cards = 0 if device == "cpu" else torch.cuda.device_count()
    if processes:
        if 0 < cards < int(processes):
            raise UserError(f"--processes {processes}: each needs a GPU of its own, and there are {cards}")
        return int(processes)
    if cards < 2:
        raise UserError(f"--launch finds {cards} GPUs: say how many processes are wanted with --processes 2")
    return cards

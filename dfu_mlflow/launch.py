"""`train -P launch=ddp`: the same command again, in several processes under accelerate's launcher."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dfu_mlflow.entry import INTERRUPTED_CODE, LAST_WORDS
from dfu_mlflow.errors import UserError

FOLDER = Path(__file__).resolve().parent / "config" / "launch"
NONE = "none"


def launch_names() -> list[str]:
    """What `--launch` takes besides `none`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def launch_options(launch: str, processes: str, device: str) -> list[str] | None:
    """What accelerate's launcher is to be told, to be followed by a module and its arguments.

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
    return ["--config_file", str(FOLDER / f"{launch}.yaml"), "--num_processes", str(count)]


def run_launcher(command: Sequence[str], device: str, patience_s: float) -> int:
    """Be the launcher: start the processes, hand signals on, and end as they end.

    Args:
        command: `launch_options`, then `-m`, a module and its arguments.
        device: `cpu` hides the GPUs.
        patience_s: what processes have to end by themselves (write a checkpoint) before they are killed.

    Returns:
        The exit code of the run: what its processes say on ending is shown once.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    codes: list[int] = []
    with TemporaryDirectory() as folder:
        environment = {LAST_WORDS: folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(patience_s))}
        if device == "cpu":
            # DeepSpeed picks an accelerator by what is installed, not by what it is told.
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        logging.disable(logging.ERROR)  # torchelastic tells in twenty lines what the processes say in one
        try:
            with patch_environment(**environment):
                launch_command(launch_command_parser().parse_args(list(command)))
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
        except SignalException:
            codes = [INTERRUPTED_CODE]
        finally:
            logging.disable(logging.NOTSET)
        return _ending(Path(folder), codes)


def _ending(folder: Path, codes: list[int]) -> int:
    """Show the last words of the first process that left any, and give back the run's exit code.

    Args:
        folder: of the last words.
        codes: of the processes that ended first, none where all is well.
    """
    words = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.iterdir())]
    lines = [word["line"] for word in words if word["line"]]
    if lines:
        print(lines[0], file=sys.stderr)
    if any(word["code"] == 1 for word in words):  # a defect: its stack trace has been shown
        return 1
    if words:
        return int(words[0]["code"])
    if codes and codes[0] != INTERRUPTED_CODE:
        print(f"error: processes ended without a word, with exit code {codes} (-9: out of memory?)", file=sys.stderr)
        return 1
    return codes[0] if codes else 0


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

"""Runs a program as it is and writes when its optimizer stepped: `step_clock_child.py TIMES.json PROGRAM ARGUMENTS`.

PROGRAM is a file, or `-m MODULE`. The clock is PyTorch's own global hook behind every optimizer's step, so two programs
that train are timed alike and neither is edited. Times are pairs: wall clock, and processor time of this process.
"""

import json
import resource
import runpy
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

times: list[tuple[float, float]] = []
encoding: list[tuple[float, float]] = []


def time_encoding() -> None:
    """Add up what the program spends in `Dataset.map`, where it is a user of `datasets`: its encoding passes."""
    try:
        from datasets import Dataset
    except ImportError:
        return
    inner = Dataset.map

    def timed(*arguments: object, **options: object) -> object:
        begun_s, begun_cpu_s = time.time(), time.process_time()
        try:
            return inner(*arguments, **options)
        finally:
            encoding.append((time.time() - begun_s, time.process_time() - begun_cpu_s))

    Dataset.map = timed


result, program, *arguments = sys.argv[1:]
register_optimizer_step_post_hook(lambda *_: times.append((time.time(), time.process_time())))
time_encoding()
try:
    if program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
finally:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(result).write_text(json.dumps({"times_s": times, "encoding_s": encoding, "peak_kib": peak_kib}))

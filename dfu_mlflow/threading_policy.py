"""How OpenMP's threads wait for each other: awake on an idle machine, asleep beside other work.

torch splits an operation between threads, which meet again at its end. libgomp lets those that come first spin for a
few milliseconds. While each thread has a core, nothing is faster; where another program has taken one, the spinning
keeps the core from the very thread that is waited for, thousands of times a second. No fixed GOMP_SPINCOUNT is right
for both, and libgomp reads it once. But it stops spinning while there are more OpenMP threads than processors (its
manual, under GOMP_SPINCOUNT). So a thread of this process measures how long the process's threads wait for a
processor, and keeps an idle OpenMP team while that is long. What is computed, and by how many threads, does not change.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables that say how to wait; where one is set, it decides."""
PERIOD_S = 0.5
CONTENDED = 0.1
"""Seconds that threads wait for a processor, per second, from which the machine is busy."""
PATIENCE_S = 2.0
MAX_PATIENCE_S = 60.0
NAME = "openmp-waiting"
TASKS = "/proc/self/task"
MAPS = Path("/proc/self/maps")


class Waiting:
    """Decides, from one measurement to the next, whether threads wait asleep.

    They do from the first sign of contention until there has been none for a while. Where spinning brings it back,
    that while is doubled.
    """

    def __init__(self) -> None:
        self.asleep = False
        self._patience_s = PATIENCE_S
        self._since_s = -MAX_PATIENCE_S  # of the last contention while asleep, of waking up while awake

    def decide(self, contended: bool, now_s: float) -> bool:
        """True to wait asleep.

        Args:
            contended: threads had to wait for a processor since the last call.
            now_s: of a clock that never goes back.
        """
        if contended:
            if not self.asleep:
                relapsed = now_s - self._since_s < self._patience_s
                self._patience_s = min(2 * self._patience_s, MAX_PATIENCE_S) if relapsed else PATIENCE_S
            self.asleep, self._since_s = True, now_s
        elif self.asleep and now_s - self._since_s >= self._patience_s:
            self.asleep, self._since_s = False, now_s
        return self.asleep


class SpareTeam:
    """An idle team of OpenMP threads in each libgomp of this process, one thread more than there are processors."""

    def __init__(self) -> None:
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"{NAME}-team", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let it go: libgomp ends the team with the thread that made it."""
        self._released.set()
        self._thread.join()

    def _keep(self) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing, without the GIL
        for library in libgomps():
            library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel(nothing, None, library.omp_get_num_procs() + 1, 0)
        self._released.wait()


def adapt_waiting() -> None:
    """From now on in this process, unless the user has said how threads are to wait. Other systems keep their own."""
    started = any(thread.name == NAME for thread in threading.enumerate())
    if started or user_has_chosen(os.environ) or not sys.platform.startswith("linux"):
        return
    threading.Thread(target=_watch, name=NAME, daemon=True).start()


def user_has_chosen(environment: Mapping[str, str]) -> bool:
    """Whether how to wait is set, or there is nobody to wait for."""
    return any(name in environment for name in CHOSEN_BY_USER) or environment.get("OMP_NUM_THREADS") == "1"


def libgomps() -> Iterable[ctypes.CDLL]:
    """Those that are loaded: wheels bring their own, torch and scikit-learn one each."""
    mapped = (line.split(maxsplit=5) for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines())
    paths = {fields[5] for fields in mapped if len(fields) == 6 and Path(fields[5]).name.startswith("libgomp")}
    return [ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY) for path in sorted(paths)]


def run_delays_ns() -> dict[str, int]:
    """Thread -> how long it has been ready to run without running; empty where the kernel does not tell."""
    delays = {}
    for task in os.listdir(TASKS):
        try:
            with open(f"{TASKS}/{task}/schedstat", encoding="ascii") as file:
                delays[task] = int(file.read().split()[1])
        except (OSError, IndexError):  # it has ended, or the kernel has no such figures
            continue
    return delays


def _watch() -> None:
    waiting, team = Waiting(), None
    before, then_s = run_delays_ns(), time.monotonic()
    while before:
        time.sleep(PERIOD_S)
        if "torch" not in sys.modules:
            continue
        now, now_s = run_delays_ns(), time.monotonic()
        waited_s = sum(delay - before.get(task, 0) for task, delay in now.items()) / 1e9
        asleep = waiting.decide(waited_s > CONTENDED * (now_s - then_s), now_s)
        before, then_s = now, now_s
        if asleep and team is None:
            team = SpareTeam()
        elif not asleep and team is not None:
            team.release()
            team = None

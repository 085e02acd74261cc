"""Program of `test_aliases`: moves aliases in processes that are killed before a write, or that race each other.

Usage: alias_writes_child.py STORE kill|race. Prints a JSON list, one entry a model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import mlflow
from mlflow import MlflowClient

from registry.aliases import PREVIOUS, Overtaken, crown, roll_back, version_at

TAGS = {"gate.status": "promoted", "gate/eval/kid": "0.1"}
WRITES = ("set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias")


def in_a_fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def kill_before(number: int) -> None:
    """Let this process be killed where it is about to do its write `number` (0 is the first)."""
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return original(*args, **kwargs)

        return call

    for name in WRITES:
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))


def killed(work: Callable[[], object], number: int) -> bool:
    def die() -> int:
        kill_before(number)
        work()
        return 0

    status = os.waitpid(in_a_fork(die), 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def state(name: str) -> list[int | None]:
    return [version_at(name, "champion"), version_at(name, PREVIOUS)]


def kill(models: list[str]) -> list[dict[str, Any]]:
    """Version 2 takes the place of 1, then 3 that of 2; the second process dies before its write n; then again."""
    rows = []
    for number, name in enumerate(models):
        crown(name, 1, None, TAGS)
        crown(name, 2, 1, TAGS)
        dead = killed(lambda name=name: crown(name, 3, 2, TAGS), number)
        row = {"killed": dead, "after": state(name)}
        if dead:
            crown(name, 3, 2, TAGS)
        row["again"] = state(name)
        row["back_killed"] = killed(lambda name=name: roll_back(name), number)
        row["back_after"] = state(name)
        rows.append(row)
    return rows


def race(models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in models:
        crown(name, 1, None, TAGS)

        def take(version: int, name: str = name) -> int:
            try:
                crown(name, version, 1, TAGS)
            except Overtaken:
                return 7
            return version

        pids = [in_a_fork(lambda version=version: take(version)) for version in (2, 3)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        rows.append({"codes": codes, "after": state(name)})
    return rows


def main(store: str, what: str) -> None:
    mlflow.set_tracking_uri(store)
    client = MlflowClient()
    models = [f"{what}-{number}" for number in range(7 if what == "kill" else 5)]
    for name in models:
        client.create_registered_model(name)
        for _ in range(3):
            client.create_model_version(name, source=os.getcwd())
    print(json.dumps(kill(models) if what == "kill" else race(models)))


if __name__ == "__main__":
    main(*sys.argv[1:])

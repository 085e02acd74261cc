"""Run by tests in a process of its own: comes to the end of a study, and takes a while over it.

Globals: the database's URL, LOG, a file that gets a line for each beginning and each end, and whether it HANGS.
"""

import os
import time
from pathlib import Path

import optuna

from dfu_mlflow.config.tuning import TuneConfig
from tuning.claims import open_database, retry
from tuning.ending import end_once

storage = open_database(globals()["URL"], TuneConfig(heartbeat_s=1), lambda study, trial: retry(study, trial))


def note(word: str) -> None:
    with Path(globals()["LOG"]).open("a", encoding="utf-8") as file:
        file.write(f"{word} {os.getpid()}\n")


def conclude() -> None:
    note("begun")
    time.sleep(600 if globals()["HANGS"] else 0.5)
    note("ended")


end_once(optuna.load_study(study_name="one", storage=storage), storage, 3, conclude, lambda: None)
note("left")

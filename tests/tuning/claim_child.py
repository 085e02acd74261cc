"""Run by tests in a process of its own: takes trials until none is left, and writes slowly to their rows.

Globals: the database's URL, the BUDGET, and a file that its numbers are written to, the ANSWER.
"""

import time
from pathlib import Path

import optuna
import sqlalchemy

from dfu_mlflow.config.tuning import TuneConfig
from tuning.claims import claim, open_database

storage = open_database(globals()["URL"], TuneConfig(), lambda study, trial: None)


@sqlalchemy.event.listens_for(storage.engine, "before_cursor_execute")
def slow(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
    if statement.startswith("UPDATE trials"):
        time.sleep(0.05)


study = optuna.load_study(study_name="one", storage=storage)
taken = []
while (number := claim(study, storage, globals()["BUDGET"])) is not None:
    taken.append(number)
    study.tell(number, float(number))
Path(globals()["ANSWER"]).write_text(" ".join(map(str, taken)), encoding="utf-8")

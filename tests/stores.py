"""Fresh tracking stores: MLflow makes the tables of one in several seconds, and a copy takes none."""

from __future__ import annotations

import atexit
import shutil
import sqlite3
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path

from mlflow import MlflowClient


def new_store(folder: Path) -> str:
    """URI of an empty SQLite store `mlflow.db` in a folder, beside which the artifacts of its first experiment go."""
    file = folder / "mlflow.db"
    shutil.copy(_template(), file)
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", (str(folder / "mlruns" / "0"),))
    return f"sqlite:///{file}"


@cache
def _template() -> Path:
    folder = tempfile.mkdtemp(prefix="dfu-mlflow-store-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder, "mlflow.db")
    MlflowClient(f"sqlite:///{file}").search_experiments(max_results=1)
    return file

"""A study in MLflow: one run for the study, a nested run for each trial, in the states that the trials end in."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import optuna
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

from dfu_mlflow.tracking import REASON_TAG, masked
from dfu_mlflow.tracking_store import NAME_TAG, PARENT_TAG, experiment_id, prepare_store, set_tags

RUN_ATTRIBUTE = "mlflow_run_id"
"""Of the study (its parent run) and of each trial (its nested run)."""
STUDY_TAG, NUMBER_TAG, STATE_TAG = "optuna.study", "optuna.trial", "optuna.state"
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}
PARENT_WAIT_S = 30.0
CONFIG = "config.yaml"


class StudyRuns:
    """The runs of one study; made by `open_runs`.

    Attributes:
        parent_id: the study's run.
    """

    def __init__(self, study_name: str, parent_id: str) -> None:
        self.study_name = study_name
        self.parent_id = parent_id
        self.client = MlflowClient()
        self.experiment_id = str(self.client.get_run(parent_id).info.experiment_id)

    def open_trial(self, number: int, retried: int | None) -> str:
        """A nested run for a trial that starts; gives back its id."""
        tags = {
            PARENT_TAG: self.parent_id,
            NAME_TAG: f"{self.study_name} trial {number}",
            STUDY_TAG: self.study_name,
            NUMBER_TAG: str(number),
            STATE_TAG: TrialState.RUNNING.name,
        }
        if retried is not None:
            tags["optuna.retry_of"] = str(retried)
        return str(self.client.create_run(self.experiment_id, tags=tags).info.run_id)

    def values(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Log what the sampler chose, under `trial/`: what runs of a study are compared by."""
        for name, value in values.items():
            self.client.log_param(run_id, f"trial/{name}", value)

    def close_trial(self, run_id: str, state: TrialState, reason: str) -> None:
        """End a nested run as its trial ended; one that has ended keeps its status and its reason."""
        run = self.client.get_run(run_id)
        kept = run.data.tags.get(REASON_TAG, masked(reason))
        set_tags(self.client, run_id, {STATE_TAG: state.name, REASON_TAG: kept})
        if run.info.status == "RUNNING":
            self.client.set_terminated(run_id, STATUS[state])

    def close_orphans(self, study: optuna.Study) -> None:
        """End the runs of trials that nobody works on: their worker died before it could."""
        states = {trial.number: trial.state for trial in study.get_trials(deepcopy=False)}
        for run in self.running():
            state = states[int(run.data.tags[NUMBER_TAG])]
            if state in STATUS:
                self.close_trial(str(run.info.run_id), state, "its worker died")

    def running(self) -> list[Run]:
        """Nested runs that have not ended."""
        wanted = f"tags.`{PARENT_TAG}` = '{self.parent_id}' AND attributes.status = 'RUNNING'"
        found = self.client.search_runs([self.experiment_id], wanted, max_results=1000)
        return [run for run in found if NUMBER_TAG in run.data.tags]

    def is_fresh(self) -> bool:
        """Was nothing written to the study's run yet?"""
        return not any(file.path == CONFIG for file in self.client.list_artifacts(self.parent_id))

    def describe(self, config: str, facts: Mapping[str, Any]) -> None:
        """Say what the study is: its configuration, and what it runs on."""
        self.client.log_text(self.parent_id, config, CONFIG)
        set_tags(self.client, self.parent_id, facts)

    def close_again(self, study: optuna.Study) -> None:
        """End the study's run as it was ended before: who joins a study that is over opens it once more."""
        info = self.client.get_run(self.parent_id).info
        if info.status == "RUNNING" and not study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            self.client.set_terminated(self.parent_id, "FINISHED" if complete else "FAILED")

    def close(self, status: str, reason: str) -> None:
        """End the study's own run."""
        set_tags(self.client, self.parent_id, {REASON_TAG: masked(reason)})
        self.client.set_terminated(self.parent_id, status)


def open_runs(study: optuna.Study, created: bool, experiment: str) -> StudyRuns:
    """Make the study's run, or go on in the one it has.

    The process that made the study makes its run; others wait for it, and make it themselves if that process is gone.
    A run that `mlflow run` made for this process becomes the study's, or hangs below it.
    """
    prepare_store()
    client = MlflowClient()
    given = os.environ.pop("MLFLOW_RUN_ID", None)
    deadline = time.monotonic() + (0.0 if created else PARENT_WAIT_S)
    while RUN_ATTRIBUTE not in study.user_attrs and time.monotonic() < deadline:
        time.sleep(0.5)
    if RUN_ATTRIBUTE not in study.user_attrs:
        run_id = given or str(client.create_run(experiment_id(experiment)).info.run_id)
        set_tags(client, run_id, {NAME_TAG: study.study_name, STUDY_TAG: study.study_name})
        study.set_user_attr(RUN_ATTRIBUTE, run_id)
        return StudyRuns(study.study_name, run_id)
    run_id = str(study.user_attrs[RUN_ATTRIBUTE])
    if given not in (None, run_id):
        set_tags(client, given, {PARENT_TAG: run_id, NAME_TAG: f"worker of {study.study_name}"})
    client.update_run(run_id, status="RUNNING")
    return StudyRuns(study.study_name, run_id)

"""Who ends a study: one process, whoever crashes."""

from __future__ import annotations

import time
from collections.abc import Callable

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from tuning.claims import claim, give_up_dead, heartbeat, retry

POLL_S = 1.0
ENDED = "ended"
"""Attribute of a study: the largest budget it was ended at; a smaller one is over as well."""


def end_once(
    study: optuna.Study,
    storage: RDBStorage,
    budget: int,
    conclude: Callable[[], None],
    check_stop: Callable[[], None],
) -> bool:
    """Run `conclude` in one of the processes that come here; the others stay until it is done.

    Invariant: for each budget of a study exactly one call of `conclude` ever returns, and no process leaves before it
    has. Who ran which trial, and how it ended, does not enter.

    Why it holds: the ending is itself the only trial of a study of its own, so the database grants it to one process
    (`claim`). While that process lives its heartbeat keeps it; when it dies, or `conclude` raises, the trial is queued
    again, without limit, for whoever waits or comes later. What a killed process had written is written again; of a
    process killed after its last write and before its mark that includes the registered version.

    Args:
        budget: trials of the study; a larger one is another ending.
        conclude: writes what the study came to.
        check_stop: called while waiting; raises to stop.

    Returns:
        Was it this process?
    """
    token = optuna.create_study(
        storage=storage, study_name=f"{study.study_name}: ending at {budget} trials", load_if_exists=True
    )
    study_id = storage.get_study_id_from_name(token.study_name)
    while study.user_attrs.get(ENDED, 0) < budget and not token.get_trials(
        deepcopy=False, states=(TrialState.COMPLETE,)
    ):
        check_stop()
        give_up_dead(token, storage)
        number = claim(token, storage, budget=1)
        if number is None:
            time.sleep(POLL_S)
            continue
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        with heartbeat(storage, trial_id, storage.heartbeat_interval or POLL_S):
            try:
                conclude()
            except BaseException:
                token.tell(number, state=TrialState.FAIL, skip_if_finished=True)
                retry(token, token.get_trials(deepcopy=False)[number])
                raise
            token.tell(number, 0.0, skip_if_finished=True)
            study.set_user_attr(ENDED, budget)
        return True
    return False

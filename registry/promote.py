"""What the `promote` entry point does: evaluate, ask the gate, move the alias or say why not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import Tree, merge, parse_flags, read_tree
from dfu_mlflow.config.section import Section
from dfu_mlflow.contest import Contender, Contest, run_contest
from dfu_mlflow.diagnosis.report import BUDGET_TAG, UPDATES_TAG
from dfu_mlflow.errors import UserError
from dfu_mlflow.evaluation_run import Origin
from dfu_mlflow.preparation import Material
from dfu_mlflow.subject import Subject, open_subject, with_settings
from registry.aliases import CHAMPION, GATE_TAG, Overtaken, crown, roll_back, version_at, write_tags
from registry.card import with_gate
from registry.clean_process import CleanTrial, try_version
from registry.evaluate import configuration
from registry.gates import Answer, Evidence, check_metrics, judge, loads
from registry.source import Located, locate, read_text, resolve_version

REFUSED_CODE = 3
"""Exit code of a refusal: 2 is input that cannot be worked with, 1 a defect."""
OUTPUT_DIR = "outputs/promote"
ATTEMPTS = 3
"""Times that a challenger is judged again because the champion changed meanwhile."""
FINDINGS = "findings.json"


class PromoteOptions(Section):
    """What the `promote` entry point takes beside the configuration."""

    model: str = "models:/dfu-sampler@challenger"
    """A registered version: `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    rollback: bool = False
    """Make the previous champion the champion again; nothing is evaluated."""


@dataclass(frozen=True)
class Promotion:
    """How it ended.

    Attributes:
        name: registered model.
        version: the one that is the champion now, or was refused.
        replaced: the champion before, None for none.
        promoted: whether the champion is `version`.
        answers: of the clauses; empty where nothing had to be judged.
        sentences: the same for a person.
    """

    name: str
    version: int
    replaced: int | None
    promoted: bool
    answers: tuple[Answer, ...]
    sentences: tuple[str, ...]


def promote(options: PromoteOptions, config_name: str | None, flags: Sequence[str]) -> Promotion:
    """Put a registered version through the gate and make it the champion, or go back to the one before.

    Args:
        config_name: preset or file; None takes the configuration that the version was trained with.
        flags: of the configuration; they win.

    Raises:
        UserError: for input that cannot be worked with.
    """
    if options.rollback:
        return _go_back(options.model)
    stated = merge(read_tree(config_name) if config_name else {}, parse_flags(flags))
    name, version = registered_version(options.model)
    for _ in range(ATTEMPTS):
        champion = version_at(name, CHAMPION)
        if champion == version:
            said = (f"{name} version {version} is the champion already",)
            return Promotion(name, version, version, True, (), said)
        try:
            return _challenge(name, version, champion, stated)
        except Overtaken as overtaken:
            print(f"{overtaken}: judging again", flush=True)
    raise UserError(f"--model {options.model}: the champion changed {ATTEMPTS} times while it was judged; run it again")


def promote_run(run_id: str, config: RunConfig) -> Promotion:
    """Put the version that a training run registered through the gate, under the run's own configuration.

    Raises:
        UserError: where the run registered no version.
    """
    wanted = f"name = '{config.registry.name}' and run_id = '{run_id}'"
    versions = [int(version.version) for version in MlflowClient().search_model_versions(wanted)]
    if not versions:
        raise UserError(f"--registry.promote: run {run_id} registered no version of {config.registry.name}")
    return promote(PromoteOptions(model=f"models:/{config.registry.name}/{max(versions)}"), None, [])


def registered_version(model: str) -> tuple[str, int]:
    """Name and number of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: when it is not registered, or named in another way.
    """
    try:
        name, _, number = resolve_version(model).rpartition("/")
        if not name or not number.isdecimal():
            raise UserError(f"--model {model}: give models:/NAME@ALIAS or models:/NAME/VERSION")
        MlflowClient().get_model_version(name, number)
    except MlflowException as error:
        raise UserError(f"--model {model} cannot be had: {str(error).splitlines()[0]}") from None
    return name, int(number)


def _challenge(name: str, version: int, champion: int | None, stated: Tree) -> Promotion:
    """Judge against this champion, write the figures, and crown what passes.

    Raises:
        Overtaken: the champion is another one by now.
    """
    uri = f"models:/{name}/{version}"
    challenger = locate(uri)
    tree = merge({"output_dir": OUTPUT_DIR}, stated)
    config = configuration(challenger, tree)
    check_metrics(config.gates)
    trial = try_version(uri, config.gates.loads.timeout_s) if config.gates.loads.enabled else None
    if trial is not None and not trial.passed:  # nothing else can be asked of it
        return _refuse(name, version, champion, (loads(Evidence(trial, config.memorisation), config.gates),), {})
    rival = None if champion is None else _located_champion(name, champion)
    contest = run_contest(config, _contender(uri, challenger, stated), rival)
    answers = judge(_evidence(config, trial, contest, challenger, champion), config.gates)
    tags = _contest_tags(contest, champion)
    if not all(answer.passed for answer in answers):
        return _refuse(name, version, champion, answers, tags)
    crown(name, version, champion, tags | _answer_tags(answers, "passed"))
    _describe(name, version, answers)
    before = f"in place of version {champion}, which is @previous" if champion else "the first one"
    said = (*_told(answers), f"{name} version {version} is the champion, {before}")
    return Promotion(name, version, champion, True, answers, said)


def _refuse(
    name: str, version: int, champion: int | None, answers: tuple[Answer, ...], tags: Mapping[str, str]
) -> Promotion:
    write_tags(name, version, dict(tags) | _answer_tags(answers, "refused"))
    _describe(name, version, answers)
    failed = ", ".join(answer.clause for answer in answers if not answer.passed)
    stays = "there is no champion" if champion is None else f"version {champion} stays the champion"
    said = (*_told(answers), f"refused by {failed}: {name} version {version} is not promoted, {stays}")
    return Promotion(name, version, champion, False, answers, said)


def _go_back(model: str) -> Promotion:
    name = model.removeprefix("models:/").partition("@")[0].partition("/")[0]
    if not model.startswith("models:/") or not name:
        raise UserError(f"--model {model}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        left, now = roll_back(name)
    except Overtaken as error:
        raise UserError(f"not rolled back, somebody else moved the champion meanwhile: {error}") from None
    said = f"{name}: version {now} is the champion again, version {left} was"
    return Promotion(name, now, left, True, (), (said,))


def _located_champion(name: str, version: int) -> Contender:
    uri = f"models:/{name}/{version}"
    try:
        return _contender(uri, locate(uri), {})
    except UserError as error:
        raise UserError(
            f"the champion cannot be evaluated ({error}): go back with --rollback true, or delete its alias with "
            f"MlflowClient().delete_registered_model_alias('{name}', '{CHAMPION}')"
        ) from None


def _contender(uri: str, located: Located, stated: Tree) -> Contender:
    """Settings that the user stated are the challenger's; a champion is measured as it is served."""

    def open_it(config: RunConfig, material: Material) -> Subject:
        subject = open_subject(located.folder, config, material)
        return with_settings(subject, {key: getattr(config.sampling, key) for key in stated.get("sampling", {})})

    return Contender(
        Origin(uri, located.run_id, located.model_id, located.version, located.data_digest),
        open_it,
    )


def _evidence(
    config: RunConfig, trial: CleanTrial | None, contest: Contest, challenger: Located, champion: int | None
) -> Evidence:
    return Evidence(
        trial=trial,
        figures=contest.result.figures,
        compared=contest.compared,
        rival=contest.rival,
        labels=contest.labels,
        first=champion is None,
        notes=contest.notes,
        findings=None if challenger.run_id is None else read_findings(challenger.run_id),
        findings_budget=None if challenger.run_id is None else findings_budget(challenger.run_id),
        memorisation=config.memorisation,
    )


def findings_budget(run_id: str) -> str | None:
    """How closely the run's findings were made; older ones than the run itself say so. None where it does not say."""
    client = MlflowClient()
    tags = client.get_run(run_id).data.tags
    told, seen = tags.get(BUDGET_TAG), tags.get(UPDATES_TAG)
    made = max((point.step for point in client.get_metric_history(run_id, "step/loss")), default=0)
    if told is None or seen is None or int(seen) >= made:
        return None if told is None else str(told)
    return f"{told} but of update {seen}, and the run has made {made}"


def read_findings(run_id: str) -> list[dict[str, Any]] | None:
    """`findings.json` of a run, None where it holds none.

    Raises:
        UserError: where it is no list of findings.
    """
    text = read_text(run_id, FINDINGS)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UserError(f"{FINDINGS} of run {run_id} is no list of findings: run diagnose on it again")
    return found


def _contest_tags(contest: Contest, champion: int | None) -> dict[str, str]:
    """Every figure of both sides, and what they were measured by; floors are the same for both."""
    own = {name: value for name, value in contest.rival_figures.items() if "_floor" not in name}
    return {
        "gate.protocol": contest.protocol,
        "gate.run_id": contest.result.run_id,
        "gate.rival": "base" if champion is None else str(champion),
        **{f"gate/{name}": repr(float(value)) for name, value in contest.result.figures.items()},
        **{f"gate/champion/{name}": repr(float(value)) for name, value in own.items()},
        **{f"gate.note.{name}": text for name, text in contest.notes.items()},
    }


def _answer_tags(answers: Sequence[Answer], status: str) -> dict[str, str]:
    tags = {
        f"gate.clause.{each.clause}": f"{'passed' if each.passed else 'failed'}: {each.sentence}" for each in answers
    }
    for answer in answers:
        tags |= {f"gate/{answer.clause}/{name}": repr(float(value)) for name, value in answer.figures.items()}
    return tags | {GATE_TAG: status}


def _describe(name: str, version: int, answers: Sequence[Answer]) -> None:
    """The gate's words join the model card in the version's description."""
    client = MlflowClient()
    card = client.get_model_version(name, str(version)).description or ""
    client.update_model_version(name, str(version), with_gate(card, _told(answers)))


def _told(answers: Sequence[Answer]) -> tuple[str, ...]:
    return tuple(f"{'passed' if each.passed else 'FAILED'}  {each.clause}: {each.sentence}" for each in answers)

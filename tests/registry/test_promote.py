"""The gate at work on real versions: worse, copying, broken and better ones, two at once, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from dfu_mlflow.config import RunConfig, dump_yaml
from dfu_mlflow.errors import UserError
from dfu_mlflow.preparation import Material
from entrypoints import train
from registry.aliases import version_at
from registry.clean_process import try_version
from registry.package import ROOT, RegisteredSampler
from registry.promote import PromoteOptions, Promotion, promote, promote_run
from tests.registry.contenders import (
    Weights,
    contest_config,
    damaged,
    damaged_base,
    material_of,
    overfitted,
    register,
    undamaged,
)
from tests.stores import new_store

NAME = "dfu-sampler"
QUICK = ["--gates.loads.enabled", "false"]


@dataclass(frozen=True)
class Arena:
    """A base with damaged weights, and what registers fine-tunes of it."""

    folder: Path
    config: RunConfig
    material: Material
    add: Callable[..., RegisteredSampler]


@pytest.fixture(scope="module")
def arena(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("arena")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(variable, raising=False)
        new_store(folder)
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        config = contest_config(folder, photographs, damaged_base(folder / "base", 0.5))
        material = material_of(config)

        def add(name: str, weights: Weights, guidance_scale: float = 3.0) -> RegisteredSampler:
            return register(folder / name, config, weights, material, guidance_scale)

        yield Arena(folder, config, material, add)
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def champion(arena: Arena) -> RegisteredSampler:
    return arena.add("champion", damaged(undamaged(), 0.15))


@pytest.fixture
def crowned(champion: RegisteredSampler) -> int:
    """The champion's version, put in place however the test before left things."""
    client = MlflowClient()
    client.set_registered_model_alias(NAME, "champion", str(champion.version))
    client.delete_registered_model_alias(NAME, "previous")
    return champion.version


def challenge(version: RegisteredSampler, flags: list[str]) -> Promotion:
    return promote(PromoteOptions(model=version.uri), None, flags)


def refused_by(outcome: Promotion) -> list[str]:
    return [answer.clause for answer in outcome.answers if not answer.passed]


@pytest.mark.slow
def test_the_first_champion_is_better_than_the_base(arena: Arena, champion: RegisteredSampler) -> None:
    MlflowClient().delete_registered_model_alias(NAME, "champion")
    worse_than_base = arena.add("hopeless", damaged(undamaged(), 1.0))
    outcome = challenge(worse_than_base, QUICK)
    assert not outcome.promoted
    assert refused_by(outcome)[0] == "quality"
    assert "against the untouched base, kid: " in outcome.answers[1].sentence
    assert version_at(NAME, "champion") is None

    outcome = challenge(champion, [*QUICK, "--gates.classes.enabled", "true"])
    assert refused_by(outcome) == ["classes"]
    assert "refused by classes" in outcome.sentences[-1]
    assert version_at(NAME, "champion") is None

    outcome = challenge(champion, [])
    assert outcome.promoted, outcome.sentences
    assert version_at(NAME, "champion") == champion.version
    tags = MlflowClient().get_model_version(NAME, str(champion.version)).tags
    assert tags["gate.status"] == "passed"
    assert tags["gate.rival"] == "base"
    assert tags["gate.clause.loads"].startswith("passed: models:/dfu-sampler/")
    assert 0 < float(tags["gate/eval/kid_progress"]) < 1
    assert float(tags["gate/quality/high"]) < 0
    run = MlflowClient().get_run(tags["gate.run_id"])
    assert run.data.metrics["eval/kid"] == float(tags["gate/eval/kid"])
    assert challenge(champion, QUICK).answers == (), "nothing is judged twice"


@pytest.mark.slow
def test_a_better_challenger_takes_the_place_and_goes_back(arena: Arena, crowned: int) -> None:
    better = arena.add("better", undamaged())
    outcome = challenge(better, QUICK)
    assert outcome.promoted, outcome.sentences
    assert (version_at(NAME, "champion"), version_at(NAME, "previous")) == (better.version, crowned)
    tags = MlflowClient().get_model_version(NAME, str(better.version)).tags
    assert tags["gate.rival"] == str(crowned)
    assert len(tags["gate.protocol"]) == 16
    assert float(tags["gate/champion/eval/kid"]) > float(tags["gate/eval/kid"])
    said = promote(PromoteOptions(model=f"models:/{NAME}@champion", rollback=True), None, []).sentences
    assert said == (f"{NAME}: version {crowned} is the champion again, version {better.version} was",)
    assert version_at(NAME, "champion") == crowned


@pytest.mark.slow
def test_a_worse_challenger_is_refused_with_its_figures(arena: Arena, crowned: int) -> None:
    worse = arena.add("worse", damaged(undamaged(), 0.5))
    outcome = challenge(worse, QUICK)
    assert not outcome.promoted
    assert "quality" in refused_by(outcome)
    assert "kid: worse (difference +" in outcome.sentences[1]
    assert outcome.sentences[-1].endswith(f"is not promoted, version {crowned} stays the champion")
    assert version_at(NAME, "champion") == crowned
    tags = MlflowClient().get_model_version(NAME, str(worse.version)).tags
    assert tags["gate.status"] == "refused"
    assert float(tags["gate/quality/low"]) > 0


@pytest.mark.slow
def test_a_copying_challenger_is_refused_for_it(arena: Arena, crowned: int) -> None:
    copying = arena.add("copying", overfitted(arena.material, 90), guidance_scale=1.0)
    outcome = challenge(copying, QUICK)
    assert not outcome.promoted
    assert "memorisation" in refused_by(outcome)
    (answer,) = (answer for answer in outcome.answers if answer.clause == "memorisation")
    assert "pixels/copy_excess is " in answer.sentence
    assert answer.figures["pixels/copy_excess_low"] > 0
    assert version_at(NAME, "champion") == crowned


@pytest.mark.slow
def test_a_broken_challenger_is_refused_before_anything_is_measured(arena: Arena, crowned: int) -> None:
    broken = arena.add("broken", {name: torch.full_like(weight, torch.nan) for name, weight in undamaged().items()})
    before = len(MlflowClient().search_runs(["0", "1"]))
    outcome = challenge(broken, [])
    assert refused_by(outcome) == ["loads"]
    assert outcome.sentences[0].endswith("draws class I, P, R as a picture of one colour")
    assert version_at(NAME, "champion") == crowned
    assert len(MlflowClient().search_runs(["0", "1"])) == before


@pytest.mark.slow
def test_findings_that_block_are_read_from_the_training_run(arena: Arena, crowned: int) -> None:
    version = arena.add("diagnosed", undamaged())
    run_id = MlflowClient().get_model_version(NAME, str(version.version)).run_id
    blocker = {"id": "patient_leakage", "severity": "blocker", "explanation": "3 patients on both sides", "fix": ""}
    MlflowClient().log_dict(run_id, [blocker], "findings.json")  # type: ignore[arg-type]
    outcome = promote_run(run_id, arena.config)
    assert refused_by(outcome) == ["findings"]
    assert "patient_leakage 3 patients on both sides" in " ".join(outcome.sentences)
    assert version_at(NAME, "champion") == crowned


@pytest.mark.slow
def test_two_promotions_at_once_leave_one_champion(arena: Arena, crowned: int) -> None:
    """Neither is worse than the champion; the one that comes second is judged against the first."""
    weights = undamaged()
    rivals = [arena.add(f"rival-{number}", weights) for number in range(2)]
    light = ["--memorisation.enabled", "false", "--gates.memorisation.enabled", "false"]
    command = [sys.executable, "-m", "entrypoints.promote", *QUICK, *light]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    start = partial(subprocess.Popen, cwd=arena.folder, env=environment, stdout=subprocess.PIPE, text=True)
    processes = [start([*command, "--model", rival.uri]) for rival in rivals]
    output = [process.communicate(timeout=400)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], output
    served, before = version_at(NAME, "champion"), version_at(NAME, "previous")
    assert {served, before} == {rival.version for rival in rivals}
    assert f"in place of version {before}, which is @previous" in output[[one.version for one in rivals].index(served)]


@pytest.mark.usefixtures("crowned")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("dfu-sampler", "give models:/NAME@ALIAS"),
        ("models:/dfu-sampler", "give models:/NAME@ALIAS"),
        ("models:/dfu-sampler@nobody", "cannot be had"),
        ("models:/dfu-sampler/999", "cannot be had"),
        ("models:/nothing/1", "cannot be had"),
        ("models:/m-0123456789abcdef", "give models:/NAME@ALIAS"),
    ],
)
def test_versions_that_do_not_exist_are_told(model: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        promote(PromoteOptions(model=model), None, [])
    assert "\n" not in str(caught.value)


def test_a_run_without_a_version_is_told(arena: Arena) -> None:
    with pytest.raises(UserError, match="registered no version of dfu-sampler"):
        promote_run("f" * 32, arena.config)


@pytest.mark.slow
def test_a_version_that_hangs_is_given_up(champion: RegisteredSampler) -> None:
    trial = try_version(champion.uri, timeout_s=0.5)
    assert not trial.passed
    assert "after 0.5 s (gates.loads.timeout_s)" in trial.sentence


@pytest.mark.slow
def test_a_pickle_in_the_bundle_is_not_opened(arena: Arena, crowned: int) -> None:
    version = arena.add("pickled", undamaged())
    (file,) = arena.folder.glob(f"mlruns/**/{arena_model(version)}/**/bundle/weights.safetensors")
    torch.save({"conv_in.weight": torch.zeros(1)}, file)
    outcome = challenge(version, [])
    assert refused_by(outcome) == ["loads"]
    assert "does not hold this model's weights" in outcome.sentences[0]


def arena_model(version: RegisteredSampler) -> str:
    source = MlflowClient().get_model_version(version.name, str(version.version)).source
    return str(source).removeprefix("models:/")


@pytest.mark.slow
def test_training_asks_the_same_gate_when_told_to(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps on random weights make nothing better than the base: trained and registered, but refused."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    (tmp_path / "config.yaml").write_text(dump_yaml(small_config_at(tmp_path)), encoding="utf-8")
    flags = ["--train.epochs", "1", "--registry.promote", "true", "--gates.memorisation.enabled", "false"]
    flags += ["--memorisation.enabled", "false", *QUICK]
    assert train.main(["--config", "config.yaml", *flags]) == 0
    version = MlflowClient().get_model_version_by_alias(NAME, "challenger")
    assert version.tags["gate.status"] == "refused"
    assert version.tags["gate.clause.quality"].startswith("failed: against the untouched base, kid: no verdict, 12")
    assert "FAILED  quality" in version.description
    assert version_at(NAME, "champion") is None

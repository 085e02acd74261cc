"""What cannot be searched is said in a sentence, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.config.load import preset_names
from dfu_mlflow.errors import UserError
from entrypoints.tune import main
from tuning.space import check_space
from tuning.study import join


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tune.space", '{"train.learnin_rate": [0.1, 0.2]}'], "train.learnin_rate: unknown .did you mean --train.l"),
        (["--tune.space", '{"train.batch_size": ["a", "b"]}'], "train.batch_size: .* got 'a'"),
        (["--tune.space", '{"train.learning_rate": {"low": 1, "high": 0.1}}'], "low 1 is above high 0.1"),
        (["--tune.space", '{"train.learning_rate": {"low": 0, "high": 1, "log": true}}'], "log scale"),
        (["--tune.space", '{"train.learning_rate": {"low": 0.1}}'], "needs either low and high"),
        (["--tune.space", '{"prompts.dropout": [0.1]}'], "at least two different"),
        (["--tune.space", '{"prompts.dropout": {"low": 0.1, "high": 1.5}}'], "prompts.dropout.* got 1.5"),
        (["--tune.space", '{"output_dir": ["a", "b"]}'], "output_dir must be the same"),
        (["--tune.space", '{"sampling.guidance_scale": {"low": 1, "high": 9}}'], "guidance is swept by tune.guidance"),
        (["--tune.kind", "sampling", "--tune.sampling_space.train.learning_rate", "[0.1, 0.2]"], "needs a training"),
        (
            ["--tune.space", '{"adapter.rank": {"choices": [2, 4], "when": {"adapter.method": "lora"}}}'],
            "when names adapter.method",
        ),
        (["--tune.trials", "0"], "tune.trials"),
        (["--tune.kind", "both"], "tune.kind"),
    ],
)
def test_what_cannot_be_searched(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_space(load(RunConfig, "tiny", flags))


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/none", r"postgresql://me:\*\*\*@127.0.0.1:1/none cannot be opened"),
        ("sqlite:////no/such/folder/optuna.db", "cannot be opened"),
        ("nonsense", "nonsense cannot be opened"),
    ],
)
def test_storage_that_cannot_be_reached(storage: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        join(load(RunConfig, "tiny", ["--tune.storage", storage]), ("kid",))
    assert "secret" not in str(raised.value)


def test_a_study_of_something_else(tmp_path: Path) -> None:
    storage = ["--tune.storage", f"sqlite:///{tmp_path}/optuna.db", "--tune.study", "one"]
    assert join(load(RunConfig, "tiny", storage), ("kid",)).created
    assert not join(load(RunConfig, "tiny", storage), ("kid",)).created
    for flags, names, words in (
        (["--tune.space", '{"prompts.dropout": [0.1, 0.2]}'], ("kid",), "made for something else.*space was"),
        ([], ("fd",), r"objectives was \['kid'\], is \['fd'\]"),
        (["--train.batch_size", "3"], ("kid",), "--train.batch_size was 16, is 3"),
        (["--tune.epochs", "4"], ("kid",), "--tune.epochs was 3, is 4"),
    ):
        with pytest.raises(UserError, match=words):
            join(load(RunConfig, "tiny", [*storage, *flags]), names)


def test_wrong_flag_and_missing_source() -> None:
    with pytest.raises(UserError, match=r"tune.trails: unknown .did you mean --tune.trials"):
        main(["--tune.trails", "3"])
    with pytest.raises(UserError, match="no/such/model"):
        main(["--tune.kind", "sampling", "--tune.source", "no/such/model"])


def test_an_objective_that_is_no_figure(study_file: Callable[[Path], Path], tmp_path: Path) -> None:
    flags = ["--tune.kind", "sampling", "--tune.objectives", "beauty", "--tune.source", str(tmp_path)]
    with pytest.raises(UserError, match=r"--tune.objectives beauty: unknown; .* knows .*coverage"):
        main(["--config", str(study_file(tmp_path)), *flags])


@pytest.mark.parametrize("preset", preset_names())
def test_the_space_of_every_preset_fits_it(preset: str) -> None:
    for kind in ("training", "sampling"):
        check_space(load(RunConfig, preset, ["--tune.kind", kind]))

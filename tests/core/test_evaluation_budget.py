"""Which epochs are evaluated how, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.config.load import validate
from dfu_mlflow.evaluation_budget import Protocol, Quick, Workload, lay_out, plan, plan_evaluation
from dfu_mlflow.types import Record, Split

SMALL = Workload(
    epochs=20,
    training_passes=400_000,
    every_epochs=1,
    by_epoch=None,
    held_out={0: 100, 1: 100, 2: 100},
    pictures=240,
    grid_per_class=8,
    steps=20,
    guided=True,
    validation_passes=512,
    shown=2,
)
FULL = 240 * 20 * 2 + 512


def split(train: int, held_out: int) -> Split:
    def records(count: int, side: str) -> tuple[Record, ...]:
        return tuple(
            Record(Path(f"{side}{number}.png"), "IPR"[number % 3], f"{side}{number}", "", (64, 64))
            for number in range(count)
        )

    return Split(records(train, "t"), records(held_out, "h"))


def lora() -> RunConfig:
    return load(RunConfig, "sdxl_lora", ["--data.root", "somewhere", "--data.group_by", "none"])


def test_sdxl_lora_on_2860_photographs_spends_a_fifth_on_evaluation() -> None:
    config, photographs = lora(), split(2_145, 715)
    found = plan_evaluation(config, photographs)
    assert found.training_passes == 30 * 537 * 16 * 4  # 8,580 views in steps of 16, recomputed
    assert found.full_epochs == (0, 15, 30)
    assert found.full_passes == 5 * (500 * 30 * 2 + 512)
    assert found.confirmation_passes == 500 * 30 * 2 + 512
    assert found.share <= 0.20
    assert found.quick is not None
    assert found.quick.pictures >= 36
    assert len(found.quick_epochs) >= 9
    today = plan(Workload.of(config, photographs), None)
    assert today.full_epochs == tuple(range(31))
    assert today.share == pytest.approx(0.64, abs=0.01)


def test_without_a_budget_or_within_it_all_is_as_it_was() -> None:
    everything = plan(SMALL, None)
    assert everything.quick is None
    assert everything.full_epochs == tuple(range(21))
    assert everything.evaluation_passes == 41 * FULL
    assert plan(SMALL, (everything.evaluation_passes + 0.5) / SMALL.training_passes) == everything
    assert plan(SMALL, (everything.evaluation_passes - 1) / SMALL.training_passes) != everything
    rare = plan(replace(SMALL, every_epochs=8, by_epoch=5), None)
    assert rare.full_epochs == (0, 8, 16, 20)


def test_ladder() -> None:
    """The most telling rung that fits: pictures first, then solver steps, then epochs."""
    always = 4 * FULL  # base, last epoch live and EMA, and one confirmation

    def at(passes: int) -> tuple[int | None, Quick | None]:
        found = plan(SMALL, (passes + 0.5) / SMALL.training_passes)
        assert found.evaluation_passes <= passes
        return found.protocol.every, found.quick

    def cost(epochs: int, pictures: int, steps: int) -> int:
        extra = 3 * pictures * steps * 2 if steps != SMALL.steps else 0
        return always + 2 * epochs * (pictures * steps * 2 + 512) + extra

    assert at(cost(19, 200, 20)) == (1, Quick(200, 20))
    assert at(cost(19, 36, 20)) == (1, Quick(36, 20))
    every, quick = at(cost(19, 36, 20) - 1)
    assert every == 1
    assert quick is not None
    assert quick.steps == 10
    assert at(cost(19, 36, 10)) == (1, Quick(36, 10))
    every, quick = at(cost(19, 36, 10) - 1)
    assert every == 2
    assert quick is not None
    assert quick.steps == 20
    assert at(cost(3, 36, 20)) == (5, Quick(36, 20))
    assert at(cost(1, 36, 20)) == (10, Quick(36, 20))


def test_where_the_full_ones_overspend_the_others_get_half_of_the_budget() -> None:
    found = plan(replace(SMALL, epochs=2), 10_000 / SMALL.training_passes)
    assert found.full_passes > 10_000
    assert (found.quick_epochs, found.quick) == ((1,), Quick(49, 20))
    assert 5_000 - 80 < found.quick_passes <= 5_000
    poor = plan(replace(SMALL, epochs=2), 4_000 / SMALL.training_passes)
    assert (poor.full_epochs, poor.quick_epochs, poor.quick) == ((0, 2), (), None)
    assert poor.due(2)
    assert not poor.due(1)
    assert "no others" in poor.in_words()


def test_as_many_pictures_as_a_full_one_has_are_a_full_one() -> None:
    work = replace(SMALL, epochs=4)
    allowed = 5 * FULL  # base, last epoch twice, epoch 2 twice: nothing is left to be confirmed
    found = plan(work, allowed / work.training_passes)
    assert found.quick is None or found.quick != Quick(240, 20)
    assert found.evaluation_passes <= allowed
    whole = lay_out(work, Protocol(2, None))
    assert (whole.full_epochs, whole.confirmation_passes) == ((0, 2, 4), 0)


def test_every_epochs_bounds_how_often() -> None:
    found = plan(replace(SMALL, every_epochs=4, by_epoch=6), 8 * FULL / SMALL.training_passes)
    assert found.quick is not None
    assert found.full_epochs == (0, 6, 20)
    assert all(epoch % 4 == 0 for epoch in found.quick_epochs)


def test_without_an_average_the_budget_reaches_further() -> None:
    config = validate(RunConfig, {"train": {"epochs": 6}})
    live = validate(RunConfig, {"train": {"epochs": 6}, "ema": {"enabled": False}})
    photographs = split(700, 240)
    assert Workload.of(config, photographs).shown == 2
    assert Workload.of(live, photographs).shown == 1
    found, alone = plan_evaluation(config, photographs), plan_evaluation(live, photographs)
    assert found.quick is not None
    assert alone.quick is not None
    assert (alone.quick.pictures, alone.quick.steps) > (found.quick.pictures, found.quick.steps)


def test_rare_classes_fill_their_row_of_samples_too() -> None:
    work = replace(SMALL, held_out={0: 190, 1: 100, 2: 10})
    assert work.drawn(30) == 19 + 10 + 8
    assert work.drawn(0) == 24


def test_a_run_that_goes_on_keeps_its_protocol() -> None:
    photographs = split(700, 240)
    config = validate(RunConfig, {"train": {"epochs": 6}})
    began = plan_evaluation(config, photographs)
    state = {"evaluation": asdict(began.protocol), "config": config.model_dump(mode="json")}
    longer = validate(RunConfig, {"train": {"epochs": 60}})
    goes_on = plan_evaluation(longer, photographs, Protocol.of(state))
    assert goes_on.protocol == began.protocol
    assert goes_on.protocol != plan_evaluation(longer, photographs).protocol
    assert goes_on.full_epochs == (0, 60)
    del state["evaluation"]  # of a version without budgets
    assert plan_evaluation(config, photographs, Protocol.of(state)).full_epochs == tuple(range(7))

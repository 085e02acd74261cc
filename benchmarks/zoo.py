"""Does `diagnose` name the right cause? Each fault of the catalogue put into a small real run, at two strengths.

    python -m benchmarks.zoo [--faults ema_lag,nonfinite] [--seeds 0,1,2] [--strengths stronger] [--healthy 20]
                             [--pairs 6] [--jobs 2] [--out outputs/zoo] [--table docs/zoo.md]

Every run is diagnosed at the full budget. `OUT/journal.jsonl` holds a line a run; runs that stand there are not
repeated, so the same command goes on after a kill. Processes (`--jobs`) have stores and caches of their own.
Thresholds may be looked at on the first half of the seeds (the setting seeds) only; the others are held out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo_faults import FAULTS, HEALTHY, PAIRS
from benchmarks.zoo_lab import Exhibit, Injection, Lab
from dfu_mlflow import entry
from dfu_mlflow.diagnosis.diagnose import ENDED, Diagnosis
from dfu_mlflow.diagnosis.finding import Healthy
from dfu_mlflow.errors import Interrupted

STRENGTHS = ("weaker", "stronger")
WANTED = {"weaker": 0.8, "stronger": 0.95}
"""Share of the runs in which the right cause must stand first."""


@dataclass(frozen=True)
class Plan:
    """One run of the zoo.

    Attributes:
        kind: `fault`, `healthy` or `pair`.
        name: fault, number of the setting, or both faults.
        strength: of a fault, else empty.
        seed: of clinic and training.
        make: how it is made ill.
    """

    kind: str
    name: str
    strength: str
    seed: int
    make: Callable[[Lab, int], Injection]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.kind} {self.name} {self.strength} {self.seed}"

    def facts(self) -> dict[str, Any]:
        """What the journal knows it by."""
        names = {"kind": self.kind, "name": self.name, "strength": self.strength, "seed": self.seed}
        return {"key": self.key, **names}


def plans(options: argparse.Namespace) -> Iterator[Plan]:
    """Seed by seed, so that a first look at all faults comes early."""
    for seed in options.seeds:
        for name in options.faults:
            for strength in options.strengths:
                yield Plan("fault", name, strength, seed, FAULTS[name][STRENGTHS.index(strength)])
    for number in range(min(options.healthy, len(HEALTHY))):
        yield Plan("healthy", str(number), "", number, lambda lab, seed: Injection(HEALTHY[seed]))
    for one, other in PAIRS[: options.pairs]:
        yield Plan(
            "pair",
            f"{one}+{other}",
            "stronger",
            options.seeds[0],
            lambda lab, seed, one=one, other=other: FAULTS[one][1](lab, seed) + FAULTS[other][1](lab, seed),
        )


def examine(lab: Lab, plan: Plan) -> dict[str, Any]:
    """Make the run and diagnose it; seconds are the process's own, so that a shared core does not count."""
    started = time.process_time()
    injection = plan.make(lab, plan.seed)
    exhibit = (
        injection.doctored(lab, plan.seed) if injection.doctored else Exhibit(lab.train(plan.seed, injection, plan.key))
    )
    made = time.process_time()
    diagnosis, spent = lab.diagnose(exhibit)
    if not lab.is_shared(exhibit.run_id):
        lab.clear(exhibit.run_id)
    findings = [
        {"id": each.id, "severity": each.severity, "confidence": round(each.confidence, 3)}
        | {"evidence": {name: figure.value for name, figure in each.evidence.items()}}
        for each in diagnosis.findings
    ]
    return plan.facts() | {
        "findings": findings,
        "unable": diagnosis.unable,
        "own": own_figures(diagnosis, plan.name),
        "run_s": round(made - started, 1),
        "checks_s": spent,
        "diagnose_s": round(time.process_time() - made, 1),
    }


def attempt(lab: Lab, plan: Plan) -> dict[str, Any]:
    """`examine`; what it raises is a defect, to be counted as a wrong answer."""
    try:
        return examine(lab, plan)
    except Interrupted:
        raise
    except Exception as error:
        one = plan.facts() | {"findings": [], "unable": {}, "run_s": 0.0, "diagnose_s": 0.0}
        return one | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def attempts(options: argparse.Namespace, left: Sequence[Plan]) -> Iterator[dict[str, Any]]:
    """Journal lines of the plans, as they are done."""
    if options.jobs == 1:
        lab = Lab(options.out)
        yield from (attempt(lab, plan) for plan in left)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, open_lab, (options, context.Value("i", 0))) as pool:
        yield from (done.result() for done in as_completed([pool.submit(attempt_in_child, plan.key) for plan in left]))


CHILD: dict[str, Any] = {}
"""A child's laboratory and the plans by their keys."""


def open_lab(options: argparse.Namespace, opened: Any) -> None:
    """Begin a child."""
    with opened.get_lock():
        number = opened.value
        opened.value += 1
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    CHILD.update(lab=Lab(options.out / f"job-{number}"), plans={plan.key: plan for plan in plans(options)})


def attempt_in_child(key: str) -> dict[str, Any]:
    """A plan by its key: it cannot be sent itself."""
    return attempt(CHILD["lab"], CHILD["plans"][key])


def own_figures(diagnosis: Diagnosis, name: str) -> dict[str, Any]:
    """What the fault's own check measured, where it found nothing."""
    outcome = diagnosis.outcomes.get(name)
    if not isinstance(outcome, Healthy):
        return {}
    return {figure: value.value for figure, value in outcome.evidence.items()}


def told(entry_: Mapping[str, Any]) -> str:
    """A line for the terminal."""
    found = ", ".join(f"{each['id']} ({each['severity']} {each['confidence']:g})" for each in entry_["findings"])
    seconds = f"{entry_['run_s']:.0f} + {entry_['diagnose_s']:.0f} s"
    return f"{entry_['key']}: {found or entry_.get('error', 'nothing')} [{seconds}]"


def right(one: Mapping[str, Any]) -> bool:
    """Is what was put in named: a fault first, a pair in the top three, nothing above a note for a healthy run?"""
    names = [each["id"] for each in one["findings"]]
    if "error" in one or any(reason.startswith(ENDED) for reason in one.get("unable", {}).values()):
        return False
    if one["kind"] == "fault":
        return bool(names) and names[0] == one["name"]
    if one["kind"] == "pair":
        return set(one["name"].split("+")) <= set(names[:3])
    return all(each["severity"] == "note" for each in one["findings"])


def table(journal: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    seeds = sorted({one["seed"] for one in journal if one["kind"] == "fault"})
    setting = seeds[: max(1, len(seeds) // 2)]
    lines = [
        "# The zoo",
        "",
        "Each fault was put into an otherwise healthy small run (`python -m benchmarks.zoo`), which `diagnose` then "
        "examined at its full budget. Counts are runs in which the fault stands first among the findings, of all runs.",
        f"Setting seeds ({', '.join(map(str, setting))}) could be looked at when thresholds were set; held-out seeds "
        f"({', '.join(map(str, seeds[len(setting) :])) or 'none'}) could not.",
        "",
        "| fault | weaker, setting | weaker, held out | stronger, setting | stronger, held out | else named first |",
        "|---|---|---|---|---|---|",
    ]
    faults = [one for one in journal if one["kind"] == "fault"]
    for name in [name for name in FAULTS if any(one["name"] == name for one in faults)]:
        own = [one for one in faults if one["name"] == name]
        cells = [
            count([one for one in own if one["strength"] == strength and (one["seed"] in setting) == known])
            for strength in STRENGTHS
            for known in (True, False)
        ]
        other = sorted({(one["findings"] or [{"id": "nothing"}])[0]["id"] for one in own if not right(one)})
        lines.append(f"| `{name}` | {' | '.join(cells)} | {', '.join(other)} |")
    cells = [
        count([one for one in faults if one["strength"] == strength and (one["seed"] in setting) == known])
        for strength in STRENGTHS
        for known in (True, False)
    ]
    lines += [f"| all | {' | '.join(cells)} | |", ""]
    return "\n".join([*lines, *others(journal)]) + "\n"


def others(journal: Sequence[Mapping[str, Any]]) -> list[str]:
    """Goals, healthy runs, pairs and seconds."""
    lines = []
    for strength, wanted in WANTED.items():
        own = [one for one in journal if one["kind"] == "fault" and one["strength"] == strength]
        if own:
            share = sum(map(right, own)) / len(own)
            lines.append(f"- {strength}: {share:.0%} of {len(own)} runs name the fault first; wanted {wanted:.0%}")
    healthy = [one for one in journal if one["kind"] == "healthy"]
    lines.append(f"- healthy runs of varied settings without a finding above a note: {count(healthy)}; wanted 19/20")
    for one in healthy:
        if not right(one):
            grave = [each["id"] for each in one["findings"] if each["severity"] != "note"]
            lines.append(f"  - setting {one['name']} ({HEALTHY[int(one['name'])]}): {', '.join(grave)}")
    pairs = [one for one in journal if one["kind"] == "pair"]
    lines.append(f"- two faults at once, both in the top three: {count(pairs)}")
    for one in pairs:
        lines.append(f"  - {one['name']}: {', '.join(each['id'] for each in one['findings'][:3]) or 'nothing'}")
    if journal:
        run_s, diagnose_s = (sorted(one[key] for one in journal) for key in ("run_s", "diagnose_s"))
        middle = len(journal) // 2
        lines.append(f"- median processor seconds: {run_s[middle]:.0f} a run, {diagnose_s[middle]:.0f} a diagnosis")
    return lines


def count(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many are right, of how many."""
    return f"{sum(map(right, runs))}/{len(runs)}" if runs else "-"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the journal; one that a kill cut off is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=lambda text: [part for part in text.split(",") if part], default=list(FAULTS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--strengths", type=lambda text: text.split(","), default=list(STRENGTHS))
    parser.add_argument("--healthy", type=int, default=len(HEALTHY), help="how many of the healthy settings")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many of the pairs of faults")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument("--out", type=Path, default=Path("outputs/zoo"), help="store, cache, runs and journal")
    parser.add_argument("--table", type=Path, help="write the table there as well")
    options = parser.parse_args(arguments)
    unknown = sorted({*options.faults} - {*FAULTS} | {*options.strengths} - {*STRENGTHS})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; faults are {', '.join(FAULTS)}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Make what is missing, print the table."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "journal.jsonl"
    journal = read_journal(path)
    done = {one["key"] for one in journal}
    for one in attempts(options, [plan for plan in plans(options) if plan.key not in done]):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")
        journal.append(one)
        print(told(one), flush=True)
    order = {plan.key: number for number, plan in enumerate(plans(options))}
    text = table(sorted(journal, key=lambda one: order.get(one["key"], len(order))))
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))

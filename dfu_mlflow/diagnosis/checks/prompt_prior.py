"""A caption that pulls towards what the base already draws."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

from transformers import CLIPTokenizer

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.config.prompts import resolve_prompts
from dfu_mlflow.config.schema import PromptsConfig
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.prior_reliance import RELIANCE, PriorReliance, prior_reliance
from dfu_mlflow.diagnosis.prompt_linter import LIMIT, LONG, Lint, lint

STYLED = 3
"""Style words from which a caption asks for a look."""
HINDERS = 0.0
"""Rise of the base's loss over the shortest prompts', lower end of the interval, above which a caption misleads."""


class PromptPrior(Check):
    """Tokens and style words; with base and photographs the loss under long, short and no prompts, and the pull."""

    id = "prompt_prior"
    needs = ("prompts", "base and photographs, for losses and pull")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """The linter says what to suspect, the losses whether it is so."""
        measured, unsaid = self._measured(case)
        lints = measured.lints if measured else self._lints(case)
        longest = max(lints.values(), key=lambda each: each.tokens)
        styled = max(lints.values(), key=lambda each: len(each.style_words)).style_words
        evidence: dict[str, Figure] = {
            "tokens": Figure(float(longest.tokens), f"below {LONG}"),
            "tokens_cut_off": Figure(float(longest.cut_off), f"0: the encoders read {LIMIT}"),
            "style_words": Figure(", ".join(styled) or "none", "none"),
        }
        if measured:
            evidence |= _figures(measured)
        if unsaid:
            evidence[RELIANCE if measured else "losses"] = Figure(f"not measured: {unsaid}"[:200])
        suspicious = longest.tokens >= LONG and len(styled) >= STYLED
        if not suspicious and not longest.cut_off:
            return Healthy(evidence)
        return self._finding(evidence, longest, measured)

    def _finding(self, evidence: dict[str, Figure], longest: Lint, measured: PriorReliance | None) -> Finding:
        low = None if measured is None else measured.over_short.low
        hinders = low is not None and low > HINDERS
        told = ""
        if hinders:
            told = " On held-out photographs the base does worse with it than with the shortest prompt."
        elif low is not None:
            told = " On held-out photographs the base does no worse with it: it may stay, and be compared by `study`."
        cut = f", {longest.cut_off} of them cut off unread" if longest.cut_off else ""
        return self.found(
            "warning" if hinders or longest.cut_off or low is None else "note",
            0.9 if hinders or longest.cut_off else 0.6,
            evidence,
            f"The longest prompt has {longest.tokens} tokens{cut}, with words for a look that the base draws by "
            f"itself.{told} Name the thing and its class, and let the photographs say the rest.",
            {"prompts.style": "minimal", "prompts.phase_prompts": None},
        )

    def _measured(self, case: Case) -> tuple[PriorReliance | None, str]:
        """What can be measured, and why something or all of it cannot."""
        if case.bench is None:
            return None, ""
        try:
            measured = prior_reliance(case.bench)
        except Lacking as reason:
            return None, str(reason)
        return measured, measured.unsaid

    def _lints(self, case: Case) -> dict[str, Lint]:
        prompts = {
            "style": case.settings.get("prompts.style"),
            "phase_prompts": case.settings.get("prompts.phase_prompts"),
        }
        if "prompts.style" not in case.settings and "prompts.phase_prompts" not in case.settings:
            raise Lacking("the configuration does not say the prompts")
        classes = tuple(prompts["phase_prompts"] or ("I", "P", "R"))
        texts = resolve_prompts(PromptsConfig.model_validate(prompts), classes)
        folder = Path(resolve_base(str(case.setting("base_model")))) / "tokenizer"
        if not folder.is_dir():
            raise Lacking(f"the tokenizer of {case.setting('base_model')} is not on this machine")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        return {label: lint(text, tokenizer) for label, text in texts.items()}


def _figures(measured: PriorReliance) -> dict[str, Figure]:
    over = {"loss_over_short": measured.over_short, "loss_over_empty": measured.over_empty}
    figures = {name: Figure(each.value, "not above 0, relative") for name, each in over.items()}
    if measured.over_short.low is not None:
        figures["loss_over_short_low"] = Figure(measured.over_short.low)
    figures["conditional_pull"] = Figure(measured.pull, f"about {measured.pull_short:.3g}, the shortest prompts'")
    if measured.moved is not None:
        figures["moved_from_base"] = Figure(measured.moved, "near 1: as far as the photographs are")
    if measured.reliance is not None:
        value, low, high = astuple(measured.reliance)
        figures[RELIANCE] = Figure(value, "near 0; 1 is the untouched base")
        figures |= {f"{RELIANCE}_low": Figure(low), f"{RELIANCE}_high": Figure(high)}
    for word, pull in list(measured.words.items())[:3]:
        figures[f"pull_of.{word}"] = Figure(pull)
    return figures

"""Presets, YAML files and flags -> one validated configuration. All problems are reported together."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dfu_mlflow.errors import ConfigError, UserError

PRESETS = Path(__file__).resolve().parent / "presets"
WHOLE = ("phase_prompts", "space", "sampling_space")
"""Mappings that are one setting."""

SHORT_FORMS = {"lr": "train.learning_rate", "max_epochs": "train.epochs", "bs": "train.batch_size"}
"""What people type -> what it is called."""
Model = TypeVar("Model", bound=BaseModel)
Tree = dict[str, Any]


def preset_names() -> list[str]:
    """Names that `config` and `extends` understand besides paths."""
    return sorted(path.stem for path in PRESETS.rglob("*.yaml"))


def load(model: type[Model], config: str | None, flags: Sequence[str] = ()) -> Model:
    """Merge defaults, `config` (a preset's name or a YAML file) and flags (`--section.field value`), then validate.

    Raises:
        ConfigError: listing every unknown key, wrong type and impossible combination.
        UserError: for a file that cannot be read.
    """
    tree = read_tree(config) if config else {}
    return validate(model, merge(tree, parse_flags(flags)))


def read_tree(config: str, _chain: tuple[Path, ...] = ()) -> Tree:
    """Read a preset or a file together with everything it `extends`; later entries win.

    A path in `extends` starts at the file it stands in.
    """
    path = _locate(config, _chain[-1].parent if _chain else Path())
    if path in _chain:
        raise UserError(f"configuration {config} extends itself: {' -> '.join(map(str, (*_chain, path)))}")
    tree = _read_file(path)
    parents = tree.pop("extends", [])
    merged: Tree = {}
    for parent in parents if isinstance(parents, list) else [parents]:
        merged = merge(merged, read_tree(str(parent), (*_chain, path)))
    return merge(merged, tree)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> Tree:
    """`change` over `base`, section by section; prompts and search spaces are replaced whole, never mixed."""
    merged = dict(base)
    for key, value in change.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in WHOLE
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def parse_flags(flags: Sequence[str]) -> Tree:
    """`--a.b value` or `--a.b=value` -> {"a": {"b": value}}; a flag without a value is true."""
    tree: Tree = {}
    for name, value in _pairs(flags):
        node = tree
        *sections, key = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError([f"--{name}: {section} was given a value and a field of its own"])
        node[key] = _flag_value(name, value)
    return tree


def validate(model: type[Model], tree: Tree) -> Model:
    """Validate a nested mapping; on failure, also look behind the first errors for impossible combinations."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(model, dict(item)) for item in error.errors()]
        rest = _without(tree, [tuple(item["loc"]) for item in error.errors()])
        try:
            model.model_validate(rest)
        except ValidationError as behind:
            problems += [_describe(model, dict(item)) for item in behind.errors()]
        raise ConfigError(list(dict.fromkeys(problems))) from None


def described(model: type[BaseModel]) -> list[str]:
    """Every setting with its default, one a line, as flags."""
    defaults = flatten(model.model_construct())
    return [f"  --{name} {'(not set)' if value is None else value}" for name, value in defaults.items()]


def known_part(model: type[Model], tree: Tree) -> tuple[Tree, tuple[str, ...]]:
    """The tree of another version without the settings, or values, that the model does not know; and their names.

    Raises:
        ConfigError: for a combination that the model refuses: which of its settings to drop nobody can tell.
    """
    try:
        model.model_validate(tree)
    except ValidationError as error:
        strange = [tuple(item["loc"]) for item in error.errors() if not _is_combination(dict(item))]
        rest = _without(tree, strange)
        validate(model, rest)
        return rest, tuple(".".join(map(str, location)) for location in strange)
    return tree, ()


def _is_combination(item: dict[str, Any]) -> bool:
    """Is the error one of a section's settings together, not of one of them?"""
    return item["type"] == "value_error" and isinstance(item["input"], Mapping)


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one, but for passwords in addresses."""
    return yaml.safe_dump(_shown(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=100)


def without_password(text: str) -> str:
    """Text in which addresses (`scheme://user:password@host`, `?password=`) show no password."""
    return re.sub(r"([?&]password=)[^&\s]+", r"\1***", re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text))


def _shown(tree: Any) -> Any:
    """The same tree without passwords: what is dumped goes to MLflow."""
    if isinstance(tree, Mapping):
        return {key: _shown(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_shown(value) for value in tree]
    return without_password(tree) if isinstance(tree, str) else tree


def flatten(config: BaseModel) -> dict[str, Any]:
    """{"section.field": value}; None and mappings stay as they are."""
    return dict(_leaves(_shown(config.model_dump(mode="json"))))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in WHOLE:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _locate(config: str, folder: Path) -> Path:
    if config in preset_names():
        return PRESETS / f"{config}.yaml"
    path = folder / config
    if not path.is_file():
        raise UserError(f"configuration {config!r} is neither a preset ({', '.join(preset_names())}) nor a file")
    return path


def _read_file(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"configuration {path} cannot be read: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path} must hold sections, not a {type(tree).__name__}")
    return tree


def _pairs(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(flags):
        flag = flags[position]
        position += 1
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError([f"{flag!r} is not a flag: write --section.field value"])
        if "=" in flag:
            name, value = flag[2:].split("=", 1)
        elif position < len(flags) and not flags[position].startswith("--"):
            name, value = flag[2:], flags[position]
            position += 1
        else:
            name, value = flag[2:], "true"
        yield name, value


def _flag_value(name: str, value: str) -> Any:
    """Text stays text for the schema to convert; lists, mappings and null are read as YAML."""
    if value.strip() in ("null", "~"):
        return None
    if value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        if "(" in value or "\\" in value:  # a pattern over file names, such as [A-Z](\d+)
            return value
        raise ConfigError([f"--{name}: {value!r} is not a YAML list or mapping"]) from None


def _describe(model: type[BaseModel], item: dict[str, Any]) -> str:
    flag = "--" + ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        location, value = tuple(map(str, item["loc"])), item["input"]
        while isinstance(value, Mapping) and value:  # a section that there is not: what was to be set in it
            key, value = next(iter(value.items()))
            location += (str(key),)
        return f"--{'.'.join(location)}: unknown{_suggestion(model, location)}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{flag}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _suggestion(model: type[BaseModel], location: tuple[str, ...]) -> str:
    known = list(_field_names(model))
    close = [SHORT_FORMS[location[-1]]] if SHORT_FORMS.get(location[-1]) in known else []
    last = [name for name in known if name.rsplit(".", 1)[-1] == location[-1]]
    inside = [name for name in last if name.startswith(f"{location[0]}.")]
    close = close or inside or difflib.get_close_matches(".".join(location), known, n=1, cutoff=0.6)
    hint = next(iter(close or last), None)
    return f" (did you mean --{hint}?)" if hint else ""


def _field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Of what can be set: sections are named by what is in them."""
    for name, info in model.model_fields.items():
        kinds = (info.annotation, *get_args(info.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            yield prefix + name
        for section in sections:
            yield from _field_names(section, f"{prefix}{name}.")


def _without(tree: Tree, locations: Sequence[tuple[Any, ...]]) -> Tree:
    """A copy of the tree without the keys at fault, so that what they hide can be checked too."""
    rest = copy.deepcopy(tree)
    for location in locations:
        node = rest
        for depth, part in enumerate(location, start=1):
            inner = node.get(part)
            if depth == len(location) or not isinstance(inner, dict):
                node.pop(part, None)  # of a list the whole: its rest would be another setting
                break
            node = inner
    return rest

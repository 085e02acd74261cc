"""Estimates that take a processor a minute at the real size, kept in the cache by everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data.cache import default_cache_dir
from dfu_mlflow.phases import phase

FORMAT = 1
"""Change it when the same facts would give another figure."""
LIBRARIES = ("torch", "diffusers", "peft", "accelerate")


def remembered(data: DataConfig, facts: Mapping[str, Any], compute: Callable[[], float]) -> float:
    """What `compute` gives, or gave before for the same facts.

    Args:
        data: names the cache's folder.
        facts: what the figure depends on beside the libraries; JSON.
    """
    own = {"format": FORMAT, **{name: metadata.version(name) for name in LIBRARIES}, **facts}
    name = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    place = default_cache_dir(data) / "memory" / f"{name}.json"
    try:
        return float(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        with phase("estimating the memory it takes"):
            value = float(compute())
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = place.with_suffix(f".{id(facts)}")
        beside.write_text(json.dumps(value), encoding="utf-8")
        beside.replace(place)
    except OSError:  # a folder that is closed costs the same minute next time
        pass
    return value

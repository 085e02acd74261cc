"""What a benchmark ran on, for the first line of its output, and what its outcomes are called."""

from __future__ import annotations

import platform
from importlib import metadata

import torch


def machine(*distributions: str) -> str:
    """Processor, threads, Python's version and those of the distributions, on one line."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in distributions)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def said(good: bool) -> str:
    """What a bar's outcome is called."""
    return "ok" if good else "MISSED"

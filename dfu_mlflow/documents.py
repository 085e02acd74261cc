"""JSON files of the project's own, with a format number: checkpoints and bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dfu_mlflow.errors import UserError

FORMAT = 1


def read_document(path: Path, what: str) -> dict[str, Any]:
    """The content of `path`; `what` names its folder in messages, such as `checkpoint`.

    Raises:
        UserError: when it is missing, unreadable, or of another format.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise UserError(f"{path.parent} is no {what}: it has no readable {path.name}") from None
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}, this version reads {FORMAT}")
    return content

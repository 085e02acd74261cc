"""OpenAPI -> one plain page, without the scripts that FastAPI's own page loads from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1c2b33}"
    "code,pre{font-family:ui-monospace,monospace}pre{background:#eef3f5;padding:1rem;overflow:auto}"
    "h2{margin-top:2.5rem;border-top:1px solid #c9d5da;padding-top:1rem}"
)
EXAMPLE = (
    "curl -H 'Authorization: Bearer TOKEN' -H 'Content-Type: application/json' \\\n"
    '  -d \'{"rows": [{"phase": "I", "seed": 1}], "params": {"guidance_scale": 3}}\' \\\n'
    "  http://127.0.0.1:8000/v1/images"
)


def documentation(schema: Mapping[str, Any]) -> str:
    """Every path with its method, words, answers and, below, the shapes."""
    operations = "".join(
        _operation(path, method, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    )
    shapes = "".join(
        f"<h3><code>{escape(name)}</code></h3><pre>{escape(json.dumps(shape, indent=1, ensure_ascii=False))}</pre>"
        for name, shape in schema["components"]["schemas"].items()
    )
    title = escape(str(schema["info"]["title"]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: HTTP</title><style>{STYLE}</style>'
        f'<h1>{title}: HTTP</h1><p>For programs: <a href="/openapi.json">/openapi.json</a>. '
        f'For people: <a href="/">the page</a>.</p><pre>{escape(EXAMPLE)}</pre>{operations}<h2>Shapes</h2>{shapes}'
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    takes = f"<p>Takes <code>{escape(body['$ref'].rsplit('/', 1)[-1])}</code>.</p>" if "$ref" in body else ""
    answers = "".join(
        f"<li><code>{escape(status)}</code> {escape(answer['description'])}</li>"
        for status, answer in operation["responses"].items()
    )
    return (
        f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
        f"<p>{escape(operation.get('description', ''))}</p>{takes}<ul>{answers}</ul>"
    )

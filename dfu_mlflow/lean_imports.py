"""What a process has no use for is not imported by the libraries it does use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class TritonFinder(MetaPathFinder):
    """Keeps triton out of a process without an accelerator: 67 MiB of resident memory.

    torch's dynamo, which transformers loads, imports triton wherever it is installed. Only then, with torch at hand,
    is it known whether there is an accelerator; on a CPU `torch.compile` generates C++.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Mark triton as absent (None, as the import system has it) when dynamo is about to be loaded."""
        if name == "torch._dynamo" and not sys.modules["torch"].accelerator.is_available():
            sys.modules.setdefault("triton", None)  # type: ignore[arg-type]


def leave_out_triton() -> None:
    """From now on, in this process."""
    if not any(isinstance(finder, TritonFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TritonFinder())

"""Libraries load as fast as they can, and what a process has no use for is not loaded."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from types import ModuleType

from dfu_mlflow.phases import phase


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


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/dfu-mlflow`, or `~/.cache/dfu-mlflow`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dfu-mlflow"


def keep_bytecode() -> None:
    """Compile libraries once, not in every process, where they were installed without bytecode and none may be written.

    Container images set PYTHONDONTWRITEBYTECODE, and uv installs sources alone: each command then spends three
    quarters of a minute on compiling torch and its like. What is compiled goes to the user's cache, not beside the
    sources; PYTHONPYCACHEPREFIX names another folder, and with it nothing is done here.
    """
    if not sys.dont_write_bytecode or sys.pycache_prefix is not None or _compiled("torch"):
        return
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(user_cache() / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix  # of processes that are started from here
    del os.environ["PYTHONDONTWRITEBYTECODE"]


def _compiled(library: str) -> bool:
    spec = find_spec(library)
    return spec is None or spec.origin is None or Path(cache_from_source(spec.origin)).exists()


@contextmanager
def loading_libraries() -> Iterator[None]:
    """A phase for imports, without Python's search for cycles, which finds none and takes a fifth of the time.

    Afterwards it leaves their half a million objects alone: each full search is 0.6 s faster.
    """
    with phase("loading the libraries"):
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
    if not gc.get_freeze_count():
        gc.freeze()

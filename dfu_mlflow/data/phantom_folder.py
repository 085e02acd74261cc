"""The phantom photographs on disk: rendered on first use, shared by all later runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data import phantom
from dfu_mlflow.data.cache import default_cache_dir
from dfu_mlflow.data.packs import make_private_folder, storage_error
from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import file_digest

SMALLEST_PX = 64
"""Below this side the phantom's texture would alias: smaller resolutions are resized from it."""


def render_phantom(config: DataConfig) -> Path:
    """Folder of class folders with the phantom pictures.

    Its name holds everything the pictures depend on, the renderer's source included. It appears whole or not at all.

    Raises:
        UserError: where the cache cannot be written.
    """
    size_px = max(SMALLEST_PX, config.resolution_px)
    version = file_digest(Path(phantom.__file__))[:12]
    parent = default_cache_dir(config) / "phantom"
    make_private_folder(parent.parent)
    make_private_folder(parent)
    folder = parent / f"{config.phantom.patients}-patients-seed-{config.phantom.seed}-{size_px}px-{version}"
    if folder.is_dir():
        return folder
    temporary = Path(tempfile.mkdtemp(prefix=".rendering-", dir=parent))
    try:
        with phase("rendering the phantom"):
            phantom.write_phantom(temporary, config.phantom.patients, config.phantom.seed, size_px)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise storage_error(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

"""The version that is served: loaded before the first request, exchanged when the alias moves."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from mlflow.exceptions import MlflowException

from dfu_mlflow.bundle_format import BUNDLE
from dfu_mlflow.config.serving import ServeConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import pick_device, release_memory
from dfu_mlflow.sampling import Sampler
from registry.memory import require_room
from registry.serving.meters import Meters
from registry.source import resolve_version, version_files

log = logging.getLogger(__name__)

RETRY_S = 60.0
"""A version that could not be loaded is tried again after this: a network comes back, a broken model does not."""


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded version.

    Attributes:
        name: `NAME/VERSION`, which answers carry.
        sampler: draws at most its `batch_size` pictures at a time.
    """

    name: str
    sampler: Sampler


def load_version(name: str, config: ServeConfig) -> Served:
    """Load `NAME/VERSION` and draw with it once, so that nobody's request is the first to find it broken.

    Raises:
        UserError: for a model that is no sampler of this project.
        MlflowException, OSError: when it cannot be had.
    """
    with phase(f"loading {name}"), version_files(name) as files:
        bundles = sorted(files.rglob(BUNDLE))
        if not bundles:
            raise UserError(f"models:/{name} holds no sampler of this project ({BUNDLE})")
        require_room(bundles[0].parent, pick_device(config.device))
        sampler = Sampler.load(bundles[0].parent, config.device)
        sampler.batch_size = min(sampler.batch_size, config.serve.batch_size)
        sampler.draw(sampler.classes[:1], [0], num_inference_steps=1)
    return Served(name, sampler)


class Versions:
    """Holds the version that is served and follows the alias.

    A version that cannot be loaded leaves the old one serving.

    Raises:
        UserError: when the first version cannot be loaded.
    """

    def __init__(self, config: ServeConfig, meters: Meters) -> None:
        self.config = config
        self.meters = meters
        try:
            self.current = load_version(resolve_version(config.model), config)
        except (MlflowException, OSError) as error:
            raise UserError(f"--model {config.model} cannot be loaded: {str(error).splitlines()[0]}") from None
        meters.show_model(self.current.name)
        self._failed, self._retry_s = "", 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow alias", daemon=True)

    def start(self) -> None:
        """Begin to look the alias up."""
        self._thread.start()

    def close(self) -> None:
        """Look no more; a version that is being loaded is left to the process's end."""
        self._ending.set()

    def look(self) -> None:
        """Exchange the version if the alias has moved. Requests that were accepted keep theirs."""
        try:
            name = resolve_version(self.config.model)
        except Exception as error:  # an unreachable registry is no reason to stop serving
            log.warning("%s cannot be looked up, %s goes on: %s", self.config.model, self.current.name, error)
            return
        if name == self.current.name or (name == self._failed and time.monotonic() < self._retry_s):
            return
        try:
            self.current = load_version(name, self.config)
        except Exception:  # files of a version are outside input: whatever is wrong with them, the old one serves
            log.exception("%s cannot be loaded, %s goes on", name, self.current.name)
            self._failed, self._retry_s = name, time.monotonic() + RETRY_S
            self.meters.loads.labels("failed").inc()
            return
        release_memory()  # what no request holds of the old one
        log.warning("now serving %s", name)
        self.meters.show_model(name)
        self.meters.loads.labels("loaded").inc()

    def _follow(self) -> None:
        while not self._ending.wait(self.config.serve.poll_s):
            self.look()

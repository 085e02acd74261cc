"""The real server, on a free port of this process, over the small registered bundle."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from dfu_mlflow.config.serving import ServeConfig
from registry.package import RegisteredSampler
from registry.serving.app import Service
from registry.serving.run import build_server, listen


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def pictures(self) -> list[np.ndarray]:
        return [decoded(base64.b64decode(row["image"], validate=True)) for row in self.json["rows"]]


def decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    port: int
    service: Service

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, body: object, path: str = "/v1/images", **headers: str) -> Answer:
        return self.ask("POST", path, json.dumps(body).encode(), Content_Type="application/json", **headers)

    def draw(self, phase: str, seed: int, **params: float) -> Answer:
        return self.post({"rows": [{"phase": phase, "seed": seed}], "params": params})


Serving = Callable[..., AbstractContextManager[Running]]


@contextmanager
def running(model: str, token: str | None, device: str = "cpu", **limits: object) -> Iterator[Running]:
    config = ServeConfig.model_validate(
        {"model": model, "device": device, "serve": {"port": 0, "poll_s": 0.2, "timeout_s": 60, **limits}}
    )
    with listen(config.serve) as listener:
        server = build_server(config, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline_s = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive(), "the server ended"
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            yield Running(listener.getsockname()[1], server.config.app.state.service)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="module")
def alias(registered: RegisteredSampler) -> str:
    """`models:/NAME@champion`, set to the registered version."""
    MlflowClient().set_registered_model_alias(registered.name, "champion", str(registered.version))
    return f"models:/{registered.name}@champion"


@pytest.fixture(scope="module")
def serving(alias: str) -> Serving:
    """`with serving(token=None, **limits) as server:` with limits of the section `serve`."""

    def start(token: str | None = None, **limits: object) -> AbstractContextManager[Running]:
        return running(alias, token, **limits)

    return start


@pytest.fixture(scope="module")
def server(serving: Serving) -> Iterator[Running]:
    """One server for all tests of a module that leave it as it was."""
    with serving() as made:
        yield made

"""What the `serve` entry point does: load, listen, answer until it is told to end."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import uvicorn

from dfu_mlflow.config.serving import ServeConfig, ServeSection
from dfu_mlflow.errors import UserError
from registry.serving.app import Service, create_app
from registry.serving.batching import Batcher
from registry.serving.meters import Meters
from registry.serving.versions import Versions

TOKEN = "DFU_TOKEN"
SHUTDOWN_S = 10


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: for an address that cannot be had or should not be without a token, or a model that does not load.
    """
    token = read_token(config.serve)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # bars would bury the log's lines
    with listen(config.serve) as listener:
        server = build_server(config, token)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"{config.model} is served at http://{shown}:{port}/ (page), /docs, /v1/images; "
            f"{'token of DFU_TOKEN' if token else 'no token'}",
            flush=True,
        )
        server.run(sockets=[listener])


def build_server(config: ServeConfig, token: str | None) -> uvicorn.Server:
    """Load the model and put the application around it.

    Raises:
        UserError: for a model that does not load.
    """
    meters = Meters()
    versions = Versions(config, meters)
    limits = config.serve
    batcher = Batcher(limits.queue_length, limits.batch_window_ms / 1000, meters)
    meters.watch_queue(lambda: batcher.waiting)
    app = create_app(Service(limits, versions, batcher, meters), token)
    return _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=limits.max_connections,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
    )


class _Server(uvicorn.Server):
    """Ends by telling those who wait, before it waits for them."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the drawing, then what uvicorn does."""
        app: Any = self.config.app
        await asyncio.to_thread(app.state.service.batcher.close)
        await super().shutdown(sockets)


def read_token(limits: ServeSection) -> str | None:
    """The token out of the environment.

    Raises:
        UserError: where other machines can reach the server and none is set.
    """
    token = os.environ.get(TOKEN, "").strip() or None
    if token is not None and not token.isascii():
        raise UserError(f"{TOKEN} must be plain ASCII: HTTP headers carry nothing else")
    if token is None and not limits.loopback and not limits.allow_anonymous:
        raise UserError(
            f"--serve.host {limits.host} lets other machines in: set {TOKEN}, or say --serve.allow_anonymous true"
        )
    return token


def listen(limits: ServeSection) -> socket.socket:
    """A listening socket, taken before the model is loaded.

    Raises:
        UserError: for an address that is taken, not this machine's, or not allowed.
    """
    family = socket.AF_INET6 if ":" in limits.host else socket.AF_INET
    try:
        return socket.create_server((limits.host, limits.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"--serve.host {limits.host} --serve.port {limits.port} cannot be listened on: {error.strerror or error}"
        ) from None

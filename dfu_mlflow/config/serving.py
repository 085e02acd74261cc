"""What the server allows, and how it shares the model among those who ask."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Self

from pydantic import Field, model_validator

from dfu_mlflow.config.section import NotNegative, Positive, Section

Seconds = Annotated[float, Field(gt=0.0)]


class ServeSection(Section):
    """Address, limits and batching."""

    host: str = "127.0.0.1"
    """Address to listen on. Another than this machine's own needs DFU_TOKEN, or `allow_anonymous`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one; the server prints which."""
    allow_anonymous: bool = False
    """Listen to other machines without a token: whoever reaches the port uses the model."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that the server is called by, e.g. behind a proxy; on loopback others are refused, so that a
    foreign web page cannot point its own name at this machine."""
    max_images: Positive = 16
    """Pictures a request."""
    max_steps: Annotated[int, Field(ge=1, le=1000)] = 100
    max_guidance_scale: NotNegative = 50.0
    max_body_bytes: Annotated[int, Field(ge=1024)] = 65_536
    max_connections: Positive = 1024
    """Open connections; more get 503."""
    queue_length: Positive = 64
    """Pictures that may wait; a request that does not fit gets 429 with Retry-After."""
    batch_size: Positive = 8
    """Pictures drawn at a time, at most the model's own. A picture asked for alone is drawn alone."""
    batch_window_ms: NotNegative = 20.0
    """Longest wait for another picture, until as many are there as the last batch left asking, and at most a tenth of
    that batch's time; a lone client does not wait."""
    timeout_s: Seconds = 120.0
    """A request not answered by then is stopped and gets 504."""
    body_timeout_s: Seconds = 10.0
    """A body not received by then gets 408."""
    poll_s: Seconds = 5.0
    """How often the alias is looked up."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_images > self.queue_length:
            raise ValueError(
                f"--serve.max_images {self.max_images} never fits --serve.queue_length {self.queue_length}: raise it"
            )
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the host."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class ServeConfig(Section):
    """What the `serve` entry point takes."""

    model: str = "models:/dfu-sampler@champion"
    """`models:/NAME@ALIAS`, which is followed, or `models:/NAME/VERSION`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` …"""
    serve: ServeSection = ServeSection()

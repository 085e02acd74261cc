"""The HTTP surface of the server."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dfu_mlflow.config.serving import ServeSection
from registry.picture import picture_facts, png
from registry.serving.batching import Batcher, Closed, DrawingFailed, QueueFull, Ticket
from registry.serving.documentation import documentation
from registry.serving.guards import BodyGuard, TokenGuard
from registry.serving.meters import Meters
from registry.serving.versions import Versions
from registry.serving.wire import ImageRequest, Invocation, Picture, Pictures, Predictions, Problem, tickets

PAGE = Path(__file__).with_name("page.html")
CLIENT_GONE = 499
"""Nobody reads this answer; the meters count it."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
SAID = {
    401: "no token, or a wrong one",
    413: "the body is too long",
    422: "what was asked for cannot be drawn; `error` says why",
    429: "the queue is full; Retry-After says when to ask again",
    504: "not drawn in time; the work was stopped",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": sentence} for status, sentence in SAID.items()
}


@dataclass(frozen=True)
class Service:
    """What answers requests."""

    limits: ServeSection
    versions: Versions
    batcher: Batcher
    meters: Meters

    async def draw(self, wanted: ImageRequest, request: Request) -> list[tuple[Ticket, np.ndarray]]:
        """Queue a request and wait for its pictures; a client that leaves, or the time limit, stops the work.

        Raises:
            HTTPException: for what cannot be drawn, or not in time.
        """
        start_s, status = time.monotonic(), 200
        try:
            asked = tickets(wanted, self.versions.current, self.limits)
            self.batcher.submit(asked)
            images = await self._wait(asked, request)
        except QueueFull as error:
            status = 429
            raise HTTPException(status, str(error), {"Retry-After": str(error.retry_after_s)}) from None
        except Closed as error:
            status = 503
            raise HTTPException(status, str(error)) from None
        except DrawingFailed as error:
            status = 500
            raise HTTPException(status, str(error)) from None
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.meters.requests.labels(str(status)).inc()
        self.meters.request_s.observe(time.monotonic() - start_s)
        return list(zip(asked, images, strict=True))

    async def _wait(self, asked: Sequence[Ticket], request: Request) -> list[np.ndarray]:
        drawing = asyncio.ensure_future(_drawn(asked))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({drawing, gone}, timeout=self.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if drawing.done():
                return drawing.result()
            if gone.done():
                raise HTTPException(CLIENT_GONE, "the client has left")
            raise HTTPException(504, f"not drawn within {self.limits.timeout_s:g} s: ask for fewer pictures or steps")
        finally:
            drawing.cancel()
            gone.cancel()

    async def rows(self, wanted: ImageRequest, request: Request) -> list[Picture]:
        """Pictures as answer rows; compressing a large one takes a third of a second, so not on the event loop."""
        drawn = await self.draw(wanted, request)
        return await asyncio.to_thread(lambda: [_row(ticket, image) for ticket, image in drawn])


def create_app(service: Service, token: str | None) -> FastAPI:
    """The application: routes, guards, and threads that live as long as it does.

    Args:
        token: what clients must show, None for none.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        service.versions.start()
        yield
        service.versions.close()

    # FastAPI's own pages load scripts from a content delivery network: /docs is ours.
    app = FastAPI(title="dfu-mlflow", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(_probes)
    app.include_router(_drawing)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(Exception, _broken)
    limits = service.limits
    app.add_middleware(BodyGuard, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
    app.add_middleware(TokenGuard, token=token)
    if limits.loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, limits.host, *limits.allowed_hosts])
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


_Service = Annotated[Service, Depends(_service)]
_probes = APIRouter()
_drawing = APIRouter(responses=PROBLEMS)


@_probes.get("/", response_class=HTMLResponse, include_in_schema=False)
def page() -> str:
    """The page to look at pictures."""
    return PAGE.read_text(encoding="utf-8")


@_probes.get("/docs", response_class=HTMLResponse, include_in_schema=False)
def docs(request: Request) -> str:
    """What the server answers, as a page."""
    return documentation(request.app.openapi())


@_probes.get("/health")
@_probes.get("/ping", include_in_schema=False)
def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@_probes.get("/ready")
def ready(response: Response, service: _Service) -> dict[str, str]:
    """200 while pictures can be drawn, else 503."""
    if not service.batcher.alive:
        response.status_code = 503
        return {"status": "nothing draws: start the server again"}
    return {"status": "ready"}


@_drawing.get("/metrics", response_class=Response)
def metrics(service: _Service) -> Response:
    """Meters in Prometheus's text format."""
    return Response(service.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@_drawing.get("/v1/model")
def model(service: _Service) -> dict[str, Any]:
    """The version that draws, its classes, its settings, and what a request may ask for."""
    served, limits = service.versions.current, service.limits
    return {
        "model": served.name,
        "phases": served.sampler.classes,
        "defaults": served.sampler.defaults,
        "limits": {
            "images": limits.max_images,
            "num_inference_steps": limits.max_steps,
            "guidance_scale": limits.max_guidance_scale,
        },
    }


@_drawing.post(
    "/v1/images",
    response_model=Pictures,
    responses={200: {"content": {"image/png": {}}, "description": "rows; or the picture, where one is asked for"}},
)
async def images(wanted: ImageRequest, request: Request, service: _Service) -> Any:
    """Draw synthetic pictures. With `Accept: image/png` a single one comes as it is, seed and model in headers."""
    if request.headers.get("accept", "").split(",")[0].split(";")[0].strip() != "image/png":
        return Pictures(rows=await service.rows(wanted, request))
    if sum(row.count for row in wanted.rows) != 1:
        raise HTTPException(422, "image/png holds one picture: ask for one, or take application/json")
    ((ticket, image),) = await service.draw(wanted, request)
    headers = {"X-DFU-Seed": str(ticket.seed), "X-DFU-Model": quote(ticket.served.name)}
    return Response(await asyncio.to_thread(_png, ticket, image), media_type="image/png", headers=headers)


@_drawing.post("/invocations")
async def invocations(wanted: Invocation, request: Request, service: _Service) -> Predictions:
    """The same for programs written for `mlflow models serve`."""
    return Predictions(predictions=await service.rows(wanted.request(), request))


async def _drawn(asked: Sequence[Ticket]) -> list[np.ndarray]:
    """All pictures, or the first error once nothing is left waiting; cancelling it gives the tickets up."""
    found = await asyncio.gather(*(asyncio.wrap_future(ticket.picture) for ticket in asked), return_exceptions=True)
    images = []
    for image in found:
        if isinstance(image, BaseException):
            raise image
        images.append(image)
    return images


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _row(ticket: Ticket, image: np.ndarray) -> Picture:
    encoded = base64.b64encode(_png(ticket, image)).decode("ascii")
    return Picture(image=encoded, phase=ticket.phase, seed=ticket.seed, model=ticket.served.name)


def _png(ticket: Ticket, image: np.ndarray) -> bytes:
    return png(image, picture_facts(ticket.phase, ticket.seed, ticket.settings, ticket.served.name))


def _invalid(_: Request, error: Any) -> JSONResponse:
    """What is wrong and where, without repeating what was sent."""
    found = error.errors()[:10]
    if found[0]["type"] == "json_invalid":
        return JSONResponse({"error": "the body is not JSON"}, 400)
    places = (".".join(str(part) for part in item["loc"] if part != "body")[:80] for item in found)
    sentence = "; ".join(
        f"{place or 'body'}: {item['msg'][:1].lower()}{item['msg'][1:]}"
        for place, item in zip(places, found, strict=True)
    )
    return JSONResponse({"error": sentence}, 422)


def _refused(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)


def _broken(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "a defect of the server; its log says which"}, 500)

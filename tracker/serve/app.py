"""The API: streams, their counters, pictures, numbers, and whether the run is alive. JSON in and out."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from tracker.addresses import MAX_LENGTH, redacted
from tracker.counting import MAX_CORNERS, MAX_NAME, Shape
from tracker.errors import TrackerError
from tracker.live import LiveSession
from tracker.serve.metrics import registry_for
from tracker.serve.video import Video
from tracker.sources.live import State
from tracker.streams import MAX_STREAMS, LiveStream

STATIC = Path(__file__).with_name("static")
STUCK_SECONDS = 15.0  # the loop turns four times a second; an engine's first batch may take long
RECENT_AGES = 120  # what the page's curve shows
_NO_STORE = {"cache-control": "no-store"}

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class NewStream(BaseModel):
    """address: rtsp(s):// or http(s)://. name: made of the address if empty."""

    model_config = ConfigDict(extra="forbid", strict=True)
    address: str = Field(min_length=1, max_length=MAX_LENGTH)
    name: str = Field(default="", max_length=64)


class NewCounter(BaseModel):
    """A line or zone: see `counting.Shape`. points: x and y as shares of the picture."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["line", "zone"]
    name: str = Field(min_length=1, max_length=MAX_NAME)
    points: list[tuple[Share, Share]] = Field(min_length=2, max_length=MAX_CORNERS)

    def shape(self) -> Shape:
        return Shape(kind=self.kind, name=self.name, points=tuple(self.points))


_FIELDS = {*NewStream.model_fields, *NewCounter.model_fields, "stream", "fps", "number"}


class _Static(StaticFiles):
    """Files that a browser asks about before it uses its own copy: they change with the package."""

    def file_response(self, *arguments: Any, **named: Any) -> Response:
        response = super().file_response(*arguments, **named)
        response.headers["cache-control"] = "no-cache"
        return response


def make_app(session: LiveSession, *, drawing: Executor, stopping: threading.Event) -> FastAPI:
    """The API of one run. drawing: where pictures are drawn. stopping: set when watchers have to leave."""
    app = FastAPI(title="track", docs_url=None, redoc_url=None)
    streams = session.streams
    registry = registry_for(session)

    @app.exception_handler(TrackerError)
    def _refuse(request: Request, error: TrackerError) -> Response:
        return JSONResponse({"error": redacted(error)}, 400, _NO_STORE)

    @app.exception_handler(AnyHTTPException)
    def _say(request: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": redacted(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def _correct(request: Request, error: RequestValidationError) -> Response:
        """Where and what; never what was sent, which may hold a password."""
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"] if isinstance(step, int) or step in _FIELDS)
        words = f"{where}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse({"error": redacted(words)}, 422, _NO_STORE)

    @app.get("/livez")
    def alive() -> Response:
        silent = time.monotonic() - session.beat
        good = silent < STUCK_SECONDS
        return JSONResponse(
            {"alive": good, "silent_seconds": round(silent, 1)}, 200 if good else 503, _NO_STORE
        )

    @app.get("/readyz")
    def ready() -> Response:
        """Whether frames are tracked, or would be: streams that all are away are not ready."""
        states = [stream.source.state for stream in streams.all()]
        live = states.count(State.LIVE)
        good = time.monotonic() - session.beat < STUCK_SECONDS and (live > 0 or not states)
        body = {"ready": good, "streams": len(states), "live": live}
        return JSONResponse(body, 200 if good else 503, _NO_STORE)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), headers=_NO_STORE, media_type=CONTENT_TYPE_LATEST)

    @app.get("/streams")
    def list_streams() -> Response:
        recent = {stream.name: stream.ages.recent()[-RECENT_AGES:] for stream in streams.all()}
        shown = [
            {
                **status.to_json(),
                "recent_age_ms": [round(1000 * age, 1) for age in recent.get(status.name, ())],
            }
            for status in streams.statuses()
        ]
        engine = Path(session.options.engine).name
        return JSONResponse(
            {"engine": engine, "tracker": session.tracker, "streams": shown}, headers=_NO_STORE
        )

    @app.post("/streams", status_code=201)
    def add_stream(new: NewStream) -> dict[str, str]:
        name = streams.add(new.address, name=new.name, trusted=False)
        return {"name": name, "address": streams.get(name).address}

    @app.delete("/streams/{name}", status_code=204)
    def remove_stream(name: str) -> None:
        find(name)
        streams.remove(name)

    @app.post("/streams/{name}/counters", status_code=201)
    def add_counter(name: str, new: NewCounter) -> dict[str, int]:
        return {"number": find(name).counters.add(new.shape())}

    @app.put("/streams/{name}/counters/{number}", status_code=204)
    def change_counter(name: str, number: int, new: NewCounter) -> None:
        """Another name goes on counting; another shape begins anew."""
        find(name, number).counters.replace(number, new.shape())

    @app.delete("/streams/{name}/counters/{number}", status_code=204)
    def remove_counter(name: str, number: int) -> None:
        find(name, number).counters.remove(number)

    @app.get("/video")
    def video(
        stream: Annotated[list[str], Query(min_length=1, max_length=MAX_STREAMS)],
        fps: Annotated[float, Query(ge=0.1, le=60, allow_inf_nan=False)] = 10.0,
    ) -> Response:
        """Annotated pictures of those of these streams that there are, in one response: see `video`."""
        there = {each.name for each in streams.all()}
        names = [name for name in dict.fromkeys(stream) if name in there]
        if not names:
            raise HTTPException(404, "there is no stream of that name")
        return Video(streams, names, rate=fps, drawing=drawing, stopping=stopping)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/static", _Static(directory=STATIC))

    def find(name: str, number: int | None = None) -> LiveStream:
        for stream in streams.all():
            if stream.name == name:
                if number is None or any(each["number"] == number for each in stream.counters.to_json()):
                    return stream
                raise HTTPException(404, f"stream {name} has no counter of that number")
        raise HTTPException(404, "there is no stream of that name")

    return app

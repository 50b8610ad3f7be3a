"""The HTTP application: OpenAI's paths, figures, and a page.

Whatever goes wrong has OpenAI's form and a fitting status: 400 what was asked, 401 the key, 403 a name that is not this
machine's (without a key), 404 the model, 413 too much, 429 too many, 503 not now. Somebody who leaves, in a stream or
before, has nothing computed any longer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from avalab.lab.errors import InputError, LabError, Unavailable
from avalab.serve.policy.queue import QueueFull
from avalab.serve.policy.settings import Settings
from avalab.serve.web import addresses, forms, log, stores
from avalab.serve.web.answering import Answer, Answering
from avalab.serve.web.figures import Figures
from avalab.serve.web.forms import Asked
from avalab.serve.workers.dispatch import Dispatcher
from avalab.serve.workers.pool import Served, WorkerDied

PAGE = Path(__file__).with_name("page.html")

OPEN_PATHS = ("/health", "/")  # without a key

MOST_TEXTS = 256  # of one request for embeddings

DRAIN_SECONDS = 30.0


class TooLarge(LabError):
    """A body of more bytes than the limit."""


def create_app(models: dict[str, Served], settings: Settings) -> FastAPI:
    """The application; its workers live from its start to its end."""
    dispatcher, figures = Dispatcher(models, settings), Figures()
    most = int(settings.answers_mb * 2**20)
    answering = Answering(dispatcher, _stores(settings, most), stores.Layers([stores.Memory(most // 4)]), figures)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        handler = log.log_to(settings.log_file)
        await dispatcher.start()
        try:
            yield
        finally:
            await dispatcher.stop(DRAIN_SECONDS)
            answering.kept.close()
            log.end_log(handler)

    app = FastAPI(title="AVA Lab", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.dispatcher, app.state.answering, app.state.settings = dispatcher, answering, settings
    app.add_middleware(_Front, settings=settings, figures=figures)
    _add_openai(app, answering, settings)
    _add_figures(app, answering, figures)
    return app


def _stores(settings: Settings, most: int) -> stores.Layers:
    found: list = [stores.Memory(most)]
    if settings.cache_dir:
        found.append(stores.Disk(Path(settings.cache_dir), most))
    if settings.redis_url:
        found.append(stores.Shared(settings.redis_url))
    return stores.Layers(found)


class _Front:
    """What every request passes: the key, the log line, the counters. Pure ASGI, so that streams stay streams."""

    def __init__(self, app: Callable, settings: Settings, figures: Figures) -> None:
        self.app, self.settings, self.figures = app, settings, figures

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, scope["state"] = time.monotonic(), [0], {"told": {}}

        async def told(message: dict) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            if not self.settings.api_key and not addresses.is_loopback(host := _host(scope)):
                body = forms.error_body(f"Host {host[:60]!r} is not this machine", kind="permission_error")
                await JSONResponse(body, 403)(scope, receive, told)
            elif self._may(scope):
                await self.app(scope, receive, told)
            else:
                body = forms.error_body("the API key is missing or wrong", kind="authentication_error")
                await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, told)
        finally:
            seconds = time.monotonic() - began
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.figures.requests.labels(path, str(status[0] or 499)).inc()
            if scope["method"] == "POST":
                self.figures.seconds.observe(seconds)
                line = {"path": scope["path"][:100], "status": status[0] or 499, "ms": round(seconds * 1000, 1)}
                log.requests.info(line | scope["state"]["told"])

    def _may(self, scope: dict) -> bool:
        if not self.settings.api_key or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, f"Bearer {self.settings.api_key}".encode())


def _host(scope: dict) -> str:
    """The host that a client named: of a page elsewhere whose name was pointed here, not this machine's."""
    named = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1")
    return named[1 : named.find("]")] if named.startswith("[") else named.partition(":")[0]


def _failed(error: Exception) -> JSONResponse:
    """The status and body of what went wrong."""
    message = " ".join(str(error).split())
    if isinstance(error, TooLarge):
        return JSONResponse(forms.error_body(message), 413)
    if isinstance(error, QueueFull):
        return JSONResponse(forms.error_body(message, kind="rate_limit_error"), 429, {"Retry-After": "1"})
    if isinstance(error, Unavailable | WorkerDied | TimeoutError):
        said = message or "the answer took longer than request_timeout_s allows"
        return JSONResponse(forms.error_body(said, kind="server_error"), 503, {"Retry-After": "1"})
    if message.startswith("model_not_found"):
        return JSONResponse(forms.error_body(message, code="model_not_found"), 404)
    if isinstance(error, InputError):
        return JSONResponse(forms.error_body(message), 400)
    log.server.error("a request failed: %s", message, exc_info=None if isinstance(error, LabError) else error)
    return JSONResponse(forms.error_body(message or type(error).__name__, kind="server_error"), 500)


async def _body(request: Request, settings: Settings) -> dict:
    most, raw = int(settings.max_body_mb * 2**20), bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > most:
            raise TooLarge(f"the body is larger than {settings.max_body_mb:g} MiB")
    return forms.read_body(bytes(raw))


async def _while_there(request: Request, work: Coroutine, seconds: float) -> Any:
    """What `work` returns, unless the client leaves before or the time is over: then it is cancelled."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise TimeoutError if not watch.done() else Unavailable("the client has left")
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


# --- OpenAI's paths --------------------------------------------------------------------------------------------------


def _add_openai(app: FastAPI, answering: Answering, settings: Settings) -> None:
    async def answer(request: Request, read: Callable[[dict], Asked]) -> Response:
        try:
            asked = read(await _body(request, settings))
            if len(asked.said) > settings.max_prompt_chars:
                raise InputError(
                    f"context_length_exceeded: the prompt has {len(asked.said):,} characters, and "
                    f"{settings.max_prompt_chars:,} are allowed"
                )
            await answering.sha256(asked.model)
            if asked.stream:
                return await _stream(request, answering, asked, settings)
            return await _while_there(request, _whole(request, answering, asked), settings.request_timeout_s)
        except Exception as error:
            return _failed(error)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, forms.read_chat)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, forms.read_completion)

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        try:
            body = await _body(request, settings)
            work = _embedded(answering, body, settings.max_prompt_chars)
            return await _while_there(request, work, settings.request_timeout_s)
        except Exception as error:
            return _failed(error)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(name) for name in answering.dispatcher.models]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name in answering.dispatcher.models:
            return JSONResponse(_model(name))
        return _failed(InputError(f"model_not_found: no model {name!r}"))


def _model(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "avalab"}


async def _whole(request: Request, answering: Answering, asked: Asked) -> Response:
    """All answers of a request at once."""

    async def one(index: int) -> Answer:
        answer = Answer()
        async for _ in answering.pieces(asked, index, answer):
            pass
        return answer

    found = await asyncio.gather(*map(one, range(asked.answers)))
    _note(request, answering, asked, found)
    choices = [forms.choice_of(asked, at, a.text, a.end, a.logprobs) for at, a in enumerate(found)]
    body = forms.envelope(asked, forms.new_id(asked.is_chat), stream=False)
    body |= {"choices": choices, "usage": forms.usage_of([a.end for a in found])}
    return JSONResponse(body, headers={"X-Avalab-Cache": found[0].source})


def _note(request: Request, answering: Answering, asked: Asked, found: list[Answer]) -> None:
    """What the log and the figures say of an answer."""
    answering.figures.first.observe(found[0].first_s)
    request.scope["state"]["told"] = {
        "model": asked.model, "cache": found[0].source, "priority": asked.priority, "agent": asked.agent[:60],
        "prompt_tokens": found[0].end.get("prompt_tokens"),
        "completion_tokens": sum(a.end.get("completion_tokens", 0) for a in found),
        "cached_tokens": found[0].end.get("cached_tokens"), "first_token_ms": round(found[0].first_s * 1000, 1),
    }  # fmt: skip


async def _stream(request: Request, answering: Answering, asked: Asked, settings: Settings) -> Response:
    """Answers as events. The first piece is waited for, so that a refusal still has a status of its own."""
    if asked.answers != 1:
        raise InputError(f"n is {asked.answers}; a stream has one answer")
    answer = Answer()
    pieces = answering.pieces(asked, 0, answer)
    first = await _while_there(request, anext(pieces, None), settings.request_timeout_s)
    frame = forms.envelope(asked, forms.new_id(asked.is_chat), stream=True)
    held = asked.has_tools  # whether a text is a call is known at its end

    def line(**more: Any) -> str:
        return f"data: {json.dumps(frame | more, ensure_ascii=False)}\n\n"

    async def told() -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                yield line(choices=[forms.delta_of(asked, 0, "", None, first=True)])
                if first and not held:
                    yield line(choices=[forms.delta_of(asked, 0, *first, first=False)])
                async for text, logprobs in pieces:
                    if not held:
                        yield line(choices=[forms.delta_of(asked, 0, text, logprobs, first=False)])
            found = forms.called(answer.text, answer.end["finish_reason"]) if held else []
            if held and not found and answer.text:
                yield line(choices=[forms.delta_of(asked, 0, answer.text, answer.logprobs, first=False)])
            yield line(choices=[forms.last_delta(asked, 0, found, answer.end["finish_reason"])])
            if asked.with_usage:
                yield line(choices=[], usage=forms.usage_of([answer.end]))
            _note(request, answering, asked, [answer])
        except (LabError, TimeoutError) as error:
            yield f"data: {_failed(error).body.decode()}\n\n"
        finally:
            await pieces.aclose()
        yield "data: [DONE]\n\n"

    headers = {"X-Avalab-Cache": answer.source, "Cache-Control": "no-store"}
    return StreamingResponse(told(), media_type="text/event-stream", headers=headers)


async def _embedded(answering: Answering, body: dict, most_chars: int) -> Response:
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError("input is missing; it is a text that is not empty, or a list of such texts")
    if len(texts) > MOST_TEXTS or sum(map(len, texts)) > most_chars:
        raise InputError(f"input holds {len(texts)} texts; {MOST_TEXTS} and {most_chars:,} characters are allowed")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        raise InputError(f"encoding_format is {body['encoding_format']!r}; it is float or base64")
    if not isinstance(body.get("model"), str):
        raise InputError("model is missing; /v1/models lists what there is")
    vectors = await answering.embeddings(body["model"], texts)
    rows = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
    if body.get("encoding_format") == "base64":
        for row in rows:
            packed = struct.pack(f"<{len(row['embedding'])}f", *row["embedding"])
            row["embedding"] = base64.b64encode(packed).decode()
    tokens = sum(len(text.encode()) // 4 + 1 for text in texts)  # an estimate: the engine tells none
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "model": body["model"], "data": rows, "usage": usage})


# --- figures ---------------------------------------------------------------------------------------------------------


def _add_figures(app: FastAPI, answering: Answering, figures: Figures) -> None:
    dispatcher = answering.dispatcher

    @app.get("/health")
    async def health() -> Response:
        ready = not dispatcher.is_draining
        return JSONResponse({"status": "ok" if ready else "draining"}, 200 if ready else 503)

    @app.get("/api/v1/cache/stats")
    async def cache_stats() -> dict:
        return {
            "answers": answering.kept.stats(),
            "embeddings": answering.vectors.stats(),
            "prefixes": await dispatcher.worker_stats(),
            "models": dispatcher.stats()["models"],
        }

    @app.get("/api/v1/batch/metrics")
    async def batch_metrics() -> dict:
        return dispatcher.stats()

    @app.get("/metrics")
    async def metrics() -> Response:
        kept = {f"answers_{name}": value for name, value in answering.kept.stats().items()}
        now = dispatcher.stats() | kept | await dispatcher.worker_stats()
        return Response(figures.text(now), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        policy = "default-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'"
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy})

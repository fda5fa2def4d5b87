"""The HTTP server: OpenAI's chat protocol over an engine, and the page."""

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, aclosing, contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from twelve.engine import ContextLengthError, Engine
from twelve.errors import InputError
from twelve.serve import protocol
from twelve.serve.answer import Answer, log, server_error, stream_events, whole_answer
from twelve.serve.conversation import read_prompt
from twelve.serve.protocol import ApiError
from twelve.serve.web import OwnPagesOnly, page

BODY_SECONDS = 30  # for all of a body to come
MAX_BODY_BYTES = 8 * 2**20  # a prompt of about two million tokens
# Answers that are being made or wait, n of a request: each holds a thread and its prompt. Four times as many as the
# engine runs together, and twice what one of OpenAI's clients asks at a time: more would wait longer than clients do.
MAX_ANSWERS = 2048
RETRY_SECONDS = 10


def app(engine: Engine, model_name: str) -> Starlette:
    """The web application that serves `engine` under the name `model_name`."""
    api = Api(engine, model_name)
    return Starlette(
        routes=[
            Route("/", page()),
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
        ],
        middleware=[Middleware(OwnPagesOnly)],
        exception_handlers={HTTPException: http_error, ApiError: api_error},
    )


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A listening socket; port 0 takes a free one. InputError if there is none to have: ask before loading a model."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would share a port in use; here it passes over connections just closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except (OSError, OverflowError, UnicodeError) as error:  # the last for what can be no name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}:{port} ({reason}): choose another with --port") from None
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(engine: Engine, model_name: str, host: str = "127.0.0.1", port: int = 8000, sock: socket.socket | None = None):
    """Serve until Ctrl-C or SIGTERM, on `sock` if given (see `bind`)."""
    sock = sock or bind(host, port)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    url = url_of(sock)
    print(f"{model_name}: page at {url}/, OpenAI API at {url}/v1; Ctrl-C ends it", flush=True)
    config = uvicorn.Config(
        app(engine, model_name), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    try:
        Server(config).run(sockets=[sock])
    except KeyboardInterrupt:
        pass


class Server(uvicorn.Server):
    def handle_exit(self, sig, frame) -> None:
        """An answer that is cut off because a person ends the server is no error worth a traceback."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


class Places:
    """As many answers as there may be at a time; for the event loop's thread alone."""

    def __init__(self, count: int):
        self.count = self.free = count

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold so many. ApiError (429) where there are too few."""
        if count > self.free:
            message = f"{self.count - self.free:,} of at most {self.count:,} answers are under way: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=RETRY_SECONDS)
        self.free -= count
        try:
            yield
        finally:
            self.free += count


class Api:
    """The endpoints. The event loop only passes messages; the engine works in a thread per request."""

    def __init__(self, engine: Engine, model_name: str):
        self.engine = engine
        self.places = Places(MAX_ANSWERS)
        self.card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "twelve",
            "context_length": engine.context,
            "chat": engine.tokenizer.chat_template is not None,
            "memory": getattr(engine.model, "memory", None) is not None,
        }

    async def health(self, http: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.card["id"]})

    async def models(self, http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.card]})

    async def model(self, http: Request) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self.card)

    async def chat(self, http: Request) -> Response:
        try:
            with ExitStack() as places:
                return await self._chat(http, places)
        except ApiError:
            raise
        except Exception as error:
            raise server_error(error) from None

    async def _chat(self, http: Request, places: ExitStack) -> Response:
        places.enter_context(self.places.taken(1))  # before there is a body to hold
        chat = protocol.parse(await read_body(http))
        places.enter_context(self.places.taken(chat.n - 1))
        if chat.model is not None:
            self._check_model(chat.model)
        if chat.memory_gates and not self.card["memory"]:
            raise ApiError(400, "memory_gates: this model has no memory", "memory_gates", "unsupported_parameter")
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.card["id"]}
        try:
            prompt = await asyncio.to_thread(read_prompt, self.engine, chat.messages)
            answers = [Answer(self.engine, prompt, chat, index) for index in range(chat.n)]
        except ContextLengthError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
        except InputError as error:
            raise ApiError(400, str(error), "messages") from None
        except RecursionError:
            raise ApiError(400, "messages are nested too deeply", "messages") from None
        if chat.stream:
            return EventStream(stream_events(head, chat, answers), places.pop_all())
        body = await unless_gone(http, whole_answer(head, answers))
        return Response(status_code=499) if body is None else JSONResponse(body)  # nobody reads a 499

    def _check_model(self, name: str) -> None:
        if name != self.card["id"]:
            message = f"the model {name[:100]!r} does not exist here; there is {self.card['id']!r}"
            raise ApiError(404, message, "model", "model_not_found")


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed, and whose places are free, as soon as the client is gone."""

    def __init__(self, events: AsyncIterator[str], places: ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._places = places

    async def __call__(self, scope, receive, send) -> None:
        with self._places:
            async with aclosing(self.body_iterator):
                await super().__call__(scope, receive, send)


async def unless_gone(http: Request, work: Coroutine[None, None, dict]) -> dict | None:
    """The result of `work`; it is cancelled, and the result None, when the client goes away."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def read_body(http: Request) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
    length = http.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:  # it holds a place
        raise ApiError(408, f"the body did not come within {BODY_SECONDS} s", code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away") from None
    return bytes(body)


async def api_error(http: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def http_error(http: Request, error: HTTPException) -> Response:
    codes = {404: "unknown_url", 405: "method_not_supported"}
    message = f"{error.detail}: {http.method} {http.url.path}"
    shown = ApiError(error.status_code, message, code=codes.get(error.status_code))
    return JSONResponse(shown.body, shown.status, headers=error.headers)

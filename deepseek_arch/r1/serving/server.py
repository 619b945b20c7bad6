"""A server for clients of OpenAI's protocol, with thoughts apart as `reasoning_content`."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .reasoner import Reasoner

__all__ = ["make_server"]

LARGEST_BODY = 16 * 2**20
_NUMBERS = {"max_tokens": int, "max_completion_tokens": int, "temperature": (int, float), "top_p": (int, float),
            "seed": int}  # fmt: skip


def make_server(
    reasoner: Reasoner, host: str = "127.0.0.1", port: int = 8000, name: str = "deepseek-reasoner"
) -> ThreadingHTTPServer:
    """Returns a server of /v1/chat/completions, streamed or not, and /v1/models; `serve_forever()` runs it.

    One response is generated at a time. For many users, serve the checkpoint with vLLM.

    Args:
        port: 0 for a free one, which `server_address` tells.
        name: of the model. Requests for another one get an error.
    """

    class Handler(_Handler):
        pass

    Handler.reasoner, Handler.name, Handler.lock = reasoner, name, threading.Lock()
    return ThreadingHTTPServer((host, port), Handler)


class _Handler(BaseHTTPRequestHandler):
    reasoner: Reasoner
    name: str
    lock: threading.Lock
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: requests hold what people wrote."""

    def do_GET(self) -> None:
        """Lists the only model."""
        if self.path.rstrip("/") != "/v1/models":
            self._error(404, f"expected /v1/models or /v1/chat/completions, got {self.path}")
            return
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "deepseek-arch"}
        self._send(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        """Answers a conversation."""
        if self.path.rstrip("/") != "/v1/chat/completions":
            self._error(404, f"expected /v1/models or /v1/chat/completions, got {self.path}")
            return
        try:
            request, options = self._request()
        except ValueError as error:
            self._error(400, str(error))
            return
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        with self.lock:
            try:
                if request.get("stream"):
                    self._stream(request, options, head)
                else:
                    self._answer(request, options, head)
            except ConnectionError:  # nobody reads any more
                self.close_connection = True

    def _request(self) -> tuple[dict[str, Any], dict[str, Any]]:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST_BODY:
            self.close_connection = True  # the body is not read
            raise ValueError(f"expected a body of at most {LARGEST_BODY} bytes, got {length}")
        try:
            request = json.loads(self.rfile.read(length))
        except ValueError as error:
            raise ValueError(f"expected JSON, got {error}") from error
        if not isinstance(request, dict):
            raise ValueError(f"expected an object, got {type(request).__name__}")
        if request.get("model", self.name) != self.name:
            raise ValueError(f"expected the model {self.name!r}, got {request['model']!r}")
        if request.get("n", 1) != 1 or request.get("tools"):
            raise ValueError("expected one choice without tools, got more or tools")
        for field, kinds in _NUMBERS.items():
            value = request.get(field)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value < 0):  # type: ignore[arg-type]
                raise ValueError(f"expected {field} that is a number from 0 on, got {value!r}")
        limit = request.get("max_completion_tokens", request.get("max_tokens"))
        return request, {
            "max_new_tokens": limit,
            "temperature": request.get("temperature"),
            "top_p": request.get("top_p"),
            "seed": request.get("seed"),
        }

    def _answer(self, request: Mapping[str, Any], options: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        try:
            reply = self.reasoner.respond(request.get("messages"), **options)  # type: ignore[arg-type]
        except ConnectionError:
            raise
        except Exception as error:  # a client waits for an answer, whatever it was
            self._fail(error)
            return
        message = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning_content}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
        usage = _usage(reply.prompt_tokens, reply.completion_tokens)
        self._send(200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _stream(self, request: Mapping[str, Any], options: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        begun = False

        def emit(kind: str, text: str) -> None:
            nonlocal begun
            if not begun:
                self._begin_stream()
                self._chunk({**head, **_delta({"role": "assistant", "content": ""})})
                begun = True
            self._chunk({**head, **_delta({kind: text})})

        try:
            reply = self.reasoner.respond(request.get("messages"), emit, **options)  # type: ignore[arg-type]
        except ConnectionError:
            raise
        except Exception as error:
            if begun:
                self._chunk({"error": _error_object(error)})
                self._end_stream()
            else:
                self._fail(error)
            return
        if not begun:
            self._begin_stream()
        usage = _usage(reply.prompt_tokens, reply.completion_tokens)
        self._chunk({**head, **_delta({}, reply.finish_reason), "usage": usage})
        self._end_stream()

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, value: Any) -> None:
        self._write_event(json.dumps(value, ensure_ascii=False))

    def _write_event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _end_stream(self) -> None:
        self._write_event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _error(self, status: int, message: str) -> None:
        self._send(status, {"error": _error_object(ValueError(message))})

    def _fail(self, error: Exception) -> None:
        self._send(400 if isinstance(error, ValueError) else 500, {"error": _error_object(error)})

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _error_object(error: Exception) -> dict[str, Any]:
    asked_wrongly = isinstance(error, ValueError)
    message = str(error) if asked_wrongly else f"{type(error).__name__}: {error}"
    return {
        "message": message,
        "type": "invalid_request_error" if asked_wrongly else "server_error",
        "code": None,
    }


def _delta(delta: Mapping[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

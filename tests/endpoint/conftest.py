"""A chat endpoint on this machine: a real HTTP server with scripted replies."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY = "sk-secret-of-the-test"


@dataclass
class Scripted:
    """What comes next, and what was asked.

    Attributes:
        answer: messages -> the text of a reply.
        script: (status, headers, body) of the next requests; then come good replies.
        usage: tokens that a good reply reports; None reports none.
    """

    answer: Callable[[list[dict[str, str]]], str] = lambda messages: messages[-1]["content"]
    script: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    usage: int | None = 10
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    @property
    def asked(self) -> list[str]:
        """The last message of every request, in order."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def take(self, request: dict[str, Any], key: str | None) -> tuple[int, dict[str, str], Any]:
        with self.lock:
            self.requests.append(request)
            self.keys.append(key)
            if self.script:
                return self.script.pop(0)
        message = {"role": "assistant", "content": self.answer(request["messages"])}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        reply["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        if self.usage is not None:
            half = self.usage // 2
            parts = {"prompt_tokens": half, "completion_tokens": self.usage - half}
            reply["usage"] = parts | {"total_tokens": self.usage}
        return 200, {}, reply


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    scripted = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(length))
            status, headers, body = scripted.take(request, self.headers.get("Authorization"))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            kind = "text/html" if isinstance(body, bytes) else "application/json"
            for name, value in {"Content-Type": kind, **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return None

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        scripted.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield scripted
        http.shutdown()
        thread.join()

"""A server of OpenAI's chat protocol for tests: answers as it is told to, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = dict[str, Any] | bytes | int | tuple[int, dict[str, str]] | float | str | None
"""A JSON body; bytes sent as they are; a status, with headers or not (`Says` is the error's text); seconds to wait
before an ordinary answer; a text, blanks without end; None closes the connection."""


def completion(*texts: str, finish: str = "stop", logprobs: bool = False) -> dict[str, Any]:
    """A reply with these answers."""
    choices = []
    for place, text in enumerate(texts):
        choice = {"index": place, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        if logprobs:
            choice["logprobs"] = {"content": [{"token": word, "logprob": -0.5} for word in text.split()]}
        choices.append(choice)
    return {"choices": choices, "usage": {"completion_tokens": sum(len(text.split()) for text in texts)}}


class ChatServer:
    """Answers on loopback by `answer(body)`. `asked`: bodies; `keys`: what came as Authorization; `most`: the largest
    number of requests at once."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer], models: tuple[str, ...] | None = ("small",)) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                entries = [{"id": name} for name in models or ()]
                self.send(404 if models is None else 200, json.dumps({"data": entries}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    self.reply(answer(body))
                finally:
                    with outer._lock:
                        outer._now -= 1

            def reply(self, found: Answer) -> None:
                if isinstance(found, float):
                    time.sleep(found)
                    found = completion("late")
                if found is None:  # the connection is reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                elif isinstance(found, str):
                    self.send(200, b" ", length=10**6)
                    with contextlib.suppress(OSError):
                        while True:
                            time.sleep(0.05)
                            self.wfile.write(b" ")
                elif isinstance(found, dict):
                    self.send(200, json.dumps(found).encode())
                elif isinstance(found, bytes):
                    self.send(200, found)
                else:
                    status, headers = found if isinstance(found, tuple) else (found, {})
                    error = {"error": {"message": headers.get("Says", "as told")}}
                    self.send(status, json.dumps(error).encode(), headers)

            def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int = 0) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(length or len(content)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that has gone
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

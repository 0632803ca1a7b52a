"""An OpenAI-compatible server on loopback, with a log of its requests and faults to inject."""

from __future__ import annotations

import email.utils
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from typing import Any, Literal, Self

PATH = "/v1/chat/completions"
KEY = "sk-secret-of-the-test"


@dataclass
class Fault:
    """What happens to the next `times` requests after the first `after` ones whose question
    contains `text`. `hits` counts the injections."""

    kind: Literal["status", "cut", "body", "slow"]
    times: int = 1
    after: int = 0
    text: str = ""
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = "{}"
    content_type: str = "application/json"
    seconds: float = 0.0
    hits: int = 0
    seen: int = 0

    def due(self, question: str) -> bool:
        if self.text not in question or self.hits >= self.times:
            return False
        self.seen += 1
        return self.seen > self.after


@dataclass
class Request:
    """A received request."""

    headers: dict[str, str]
    body: dict[str, Any]
    status: int | None = None
    """None if the connection was cut."""

    @property
    def question(self) -> str:
        return str(self.body["messages"][-1]["content"])


@dataclass
class FaultyEndpoint:
    """The server. Its answers are `answer(question, number)`; a judge's choice is `choose`."""

    answer: Callable[[str, int], str] = lambda question, number: f"answer {number} to {question}"
    choose: Callable[[str, list[str]], dict[str, float]] = lambda question, choices: {
        choices[-1]: 0.75,
        choices[0]: 0.25,
    }
    model: str = "judge-1"
    key: str | None = None
    offers_logprobs: bool = True
    offers_structured: bool = True
    honours_n: bool = True
    reports_usage: bool = True
    refuses: tuple[str, ...] = ()
    """Parameters that are answered with 400."""
    finish_reason: str = "stop"
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    paused_until: float = 0.0
    """Until when the last `Retry-After` asks to wait, on the clock of `time.time`."""
    too_early: int = 0
    """Requests before that."""
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def answered(self) -> Counter[str]:
        """How often each question was answered with 200 and a whole body."""
        return Counter(each.question for each in self.requests if each.status == 200)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def register(self, request: Request) -> list[Fault]:
        with self._lock:
            self.requests.append(request)
            self.too_early += time.time() < self.paused_until
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            due = [fault for fault in self.faults if fault.due(request.question)][:1]
            for fault in due:
                fault.hits += 1
            return due

    def leave(self) -> None:
        with self._lock:
            self._at_once -= 1

    def refusal(self, request: Request, path: str) -> tuple[int, dict[str, Any]] | None:
        """Status and error of a request that a healthy server would refuse too."""
        authorization = request.headers.get("authorization")
        if self.key and authorization != f"Bearer {self.key}":
            message = f"Incorrect API key provided: {authorization}"
            return 401, {"message": message, "code": "invalid_api_key"}
        if path != PATH or request.body["model"] != self.model:
            return 404, {"message": "The model does not exist", "code": "model_not_found"}
        for name in self.refuses:
            if name in request.body:
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                return 400, {"message": message, "param": name, "code": "unsupported_parameter"}
        return None

    def completion(self, request: Request) -> dict[str, Any]:
        body = request.body
        count = body.get("n", 1) if self.honours_n else 1
        choices = [self._choice(request, number) for number in range(count)]
        completion: dict[str, Any] = {"id": "1", "object": "chat.completion", "choices": choices}
        if self.reports_usage:
            words = sum(len(each["message"]["content"].split()) for each in choices)
            completion["usage"] = {
                "prompt_tokens": sum(len(each["content"].split()) for each in body["messages"]),
                "completion_tokens": words,
            }
        return completion

    def _choice(self, request: Request, number: int) -> dict[str, Any]:
        body, question = request.body, request.question
        logprobs = None
        options = _options(question)
        text = self.answer(question, number)
        if "response_format" in body and self.offers_structured:
            schema = body["response_format"]["json_schema"]["schema"]
            chosen = self.choose(question, schema["properties"]["choice"]["enum"])
            text = json.dumps({"choice": max(chosen, key=lambda each: chosen[each])})
        elif (
            options and body["max_tokens" if "max_tokens" in body else "max_completion_tokens"] < 16
        ):
            chosen = self.choose(question, options)
            text = max(chosen, key=lambda each: chosen[each])
            if body.get("logprobs") and self.offers_logprobs:
                logprobs = {"content": [_position(text, chosen)]}
        message = {"role": "assistant", "content": text}
        reason = self.finish_reason
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _end_of_pause(value: str) -> float:
    if value.isdigit():
        return time.time() + float(value)
    return email.utils.parsedate_to_datetime(value).timestamp()


def _options(question: str) -> list[str]:
    """The choices that a judge's question asks for."""
    if question.endswith("Reply with one digit from 1 to 5."):
        return list("12345")
    return list("AB") if re.search(r"one letter, A or B\.$", question) else []


def _position(text: str, chosen: Mapping[str, float]) -> dict[str, Any]:
    listed = [{"token": token, "logprob": log(p)} for token, p in chosen.items() if p > 0]
    return {"token": text, "logprob": log(chosen[text]), "top_logprobs": listed}


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyEndpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(headers, json.loads(self.rfile.read(length)))
        faults = self.owner.register(request)
        try:
            self._respond(request, faults)
        except OSError:  # the client has gone
            request.status = None
        finally:
            self.owner.leave()

    def _respond(self, request: Request, faults: list[Fault]) -> None:
        for fault in faults:
            if fault.kind == "slow":
                time.sleep(fault.seconds)
            elif fault.kind == "status":
                error = {"error": {"message": "injected fault", "code": None}}
                if "Retry-After" in fault.headers:
                    self.owner.paused_until = _end_of_pause(fault.headers["Retry-After"])
                self._send(request, fault.status, error, fault.headers)
                return
            elif fault.kind == "body":
                self._send_text(request, 200, fault.body, {"Content-Type": fault.content_type})
                request.status = None  # not an answer
                return
        refusal = self.owner.refusal(request, self.path)
        if refusal is not None:
            self._send(request, refusal[0], {"error": refusal[1]}, {})
            return
        cut = any(fault.kind == "cut" for fault in faults)
        self._send(request, 200, self.owner.completion(request), {}, cut)

    def _send(
        self,
        request: Request,
        status: int,
        data: Mapping[str, Any],
        headers: Mapping[str, str],
        cut: bool = False,
    ) -> None:
        headers = {"Content-Type": "application/json", **headers}
        self._send_text(request, status, json.dumps(data), headers, cut)

    def _send_text(
        self,
        request: Request,
        status: int,
        text: str,
        headers: Mapping[str, str],
        cut: bool = False,
    ) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if cut:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        request.status = status
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep the output of the tests free of the log."""

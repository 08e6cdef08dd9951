"""A stand-in for vLLM on this machine: real HTTP, a real base, PEFT loads what it is told to.

It knows what ``pem --backend vllm`` asks of vLLM (completions by tokens, their log-probabilities,
modules loaded and unloaded by path), and can be told to err in the ways that vLLM errs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from pem_composition.evaluation.models import load_causal

KEY = "sk-secret-of-the-test"


@dataclass
class LoraServer:
    """What the server holds, how it errs, and what it was asked.

    Attributes:
        base: folder of its model.
        name: the base's name.
        max_rank, enabled, updating: as the server was started.
        ignores: modules are loaded, and the base answers.
        scale: of every module's effect: 1 is right.
        choices, ids: what a completion brings.
        logprobs: added to the log-probabilities; None: it tells none.
        fail_after: completions with texts after which every request fails.
    """

    base: Path
    name: str = "base"
    max_rank: int = 16
    enabled: bool = True
    updating: bool = True
    ignores: bool = False
    scale: float = 1.0
    choices: int = 1
    logprobs: float | None = 0.0
    ids: bool = True
    fail_after: int | None = None
    loaded: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    busiest: int = 0
    url: str = ""
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _model: Any = None

    @property
    def texts(self) -> list[dict[str, Any]]:
        """The requests for texts, in order."""
        return [r for _, r in self.requests if r.get("return_token_ids")]

    def answer(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self.requests.append((path, request))
        if path == "/v1/completions":
            return self._complete(request)
        if path == "/v1/load_lora_adapter" and self.updating:
            return self._load(request["lora_name"], request["lora_path"])
        if path == "/v1/unload_lora_adapter" and self.updating:
            if self.loaded.pop(request["lora_name"], None) is None:
                return _error(404, "cannot be found")
            return 200, "Success: removed"
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        config = Path(path, "adapter_config.json")
        if name in self.loaded:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not self.enabled:
            return _error(500, "Call to add_lora method failed: LoRA is not enabled. Use --enable")
        if not config.is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads(config.read_text())["r"]
        if rank > self.max_rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        with self._turn:
            if self._model is None:
                self._open()
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(path, adapter_name=_slot(name))
            else:
                self._model = PeftModel.from_pretrained(
                    self._model, path, adapter_name=_slot(name)
                ).eval()
            for module in self._model.modules():
                if hasattr(module, "set_scale") and _slot(name) in module.scaling:
                    module.set_scale(_slot(name), self.scale)
        self.loaded[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _open(self) -> None:
        self._model = load_causal(self.base)[0].eval()

    def _complete(self, request: dict[str, Any]) -> tuple[int, Any]:
        if request["model"] not in (self.name, *self.loaded):
            return _error(404, f"The model `{request['model']}` does not exist.")
        if self.fail_after is not None and len(self.texts) > self.fail_after:
            return _error(400, "stopped by the test")
        with self._lock:
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            with self._turn, torch.no_grad():
                choice = self._choice(request)
        finally:
            with self._lock:
                self._busy -= 1
        reply = {"id": "1", "object": "text_completion", "created": 0, "model": request["model"]}
        return 200, reply | {"choices": [{**choice, "index": i} for i in range(self.choices)]}

    def _choice(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._model is None:
            self._open()
        ids = torch.tensor([request["prompt"]])
        with self._applied(request["model"]):
            if request.get("prompt_logprobs"):
                logs = self._model(input_ids=ids).logits[0].log_softmax(-1)
                added = 0.0 if self.logprobs is None else self.logprobs
                told = [
                    {str(token): {"logprob": float(logs[i, token]) + added, "rank": 1}}
                    for i, token in enumerate(request["prompt"][1:])
                ]
                return {
                    "text": "", "finish_reason": "length",
                    "prompt_logprobs": None if self.logprobs is None else [None, *told],
                }  # fmt: skip
            new = self._greedy(ids, request)
        ended = new[-1] in request["stop_token_ids"]
        return {
            "text": "not looked at", "finish_reason": "stop" if ended else "length",
            "token_ids": new if self.ids else None,
        }  # fmt: skip

    def _greedy(self, ids: Any, request: dict[str, Any]) -> list[int]:
        """Step by step, by the definitions: a penalty on logits, no end before the least length."""
        ends, penalty = request["stop_token_ids"], request["repetition_penalty"]
        generator = torch.Generator().manual_seed(request.get("seed") or 0)
        new: list[int] = []
        while len(new) < request["max_tokens"] and not (new and new[-1] in ends):
            logits = self._model(input_ids=ids).logits[0, -1]
            seen = ids[0].unique()
            kept = logits[seen]
            logits[seen] = torch.where(kept > 0, kept / penalty, kept * penalty)
            if len(new) < request.get("min_tokens", 0):
                logits[ends] = -torch.inf
            if request["temperature"]:
                share = (logits / request["temperature"]).softmax(-1)
                token = int(torch.multinomial(share, 1, generator=generator))
            else:
                token = int(logits.argmax())
            new.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        return new

    @contextmanager
    def _applied(self, name: str) -> Iterator[None]:
        if not isinstance(self._model, PeftModel):
            yield
        elif name == self.name or self.ignores:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(_slot(name))
            yield


def _slot(name: str) -> str:
    """PEFT's names become names of attributes."""
    return name.replace(".", "_")


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Error", "code": status}}


@contextmanager
def serving(server: LoraServer) -> Iterator[LoraServer]:
    """The server at ``server.url``, for as long."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.keys.add(self.headers["Authorization"])
            status, body = server.answer(self.path, request)
            text = isinstance(body, str)
            data = body.encode() if text else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if text else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()

"""Flags of programs that ask a model behind an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pem_composition.cli import common
from pem_composition.endpoint.jobs import Budget, ask
from pem_composition.endpoint.service import KEY_VARIABLE, OPENAI, Service
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required, same

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pem_composition.endpoint.jobs import Job, Report
    from pem_composition.sweep.text_backend import TextBackend


LOCAL, VLLM = "local", "vllm"
SERVED_ROWS = 256  # texts that are kept at once


@dataclass(frozen=True, kw_only=True)
class EndpointFlags:
    """Where the model is, how it is asked, and how much that may cost."""

    model: str = required("name of the model at the endpoint")
    base_url: str = flag(OPENAI, "OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    api_key_env: str = flag(
        KEY_VARIABLE, "environment variable that holds the key; it is written nowhere"
    )
    temperature: float | None = flag(None, "of the replies; default: the endpoint's", least=0)
    max_reply_tokens: int = flag(256, "tokens of a reply at most", least=1)
    max_requests: int | None = flag(None, "stop after so many requests; a rerun goes on", least=1)
    max_tokens: int | None = flag(
        None, "stop after so many tokens, questions counted; likewise", least=1
    )
    parallel: int = flag(4, "questions that are under way at once", least=1)
    max_retries: int = flag(5, "how often a request that failed is tried again", least=0)
    timeout: float = flag(60.0, "seconds that a reply may take", above=0)

    retry_refused: bool = flag(
        False, "ask again what the model or a filter has refused; default: it is kept as refused"
    )

    @property
    def service(self) -> Service:
        """The same for the client."""
        return Service(
            self.model, self.base_url, self.api_key_env, self.temperature, self.max_reply_tokens,
            self.max_retries, self.timeout,
        )  # fmt: skip

    def ask(self, jobs: Iterable[Job], path: Path) -> Report:
        """Ask what ``path`` has no reply to yet.

        Raises:
            UsageError, RunFailed: see ``endpoint.jobs.ask``.
        """
        budget = Budget(self.max_requests, self.max_tokens)
        return ask(
            jobs, self.service, path, budget,
            parallel=self.parallel, retry_refused=self.retry_refused, say=common.say,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BackendFlags:
    """Who writes texts: the model that is loaded here, or an engine that serves modules."""

    backend: str = flag(
        LOCAL,
        "who writes the texts: local, or vllm: vllm serve BASE --enable-lora, with "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, at --base_url",
        choices=(LOCAL, VLLM),
    )
    served_model_name: str | None = flag(
        None, "the base's name at the server; default: that of the base as it is given here"
    )
    base_url: str = same(EndpointFlags, "base_url")
    api_key_env: str = same(EndpointFlags, "api_key_env")
    parallel: int = same(EndpointFlags, "parallel")
    max_retries: int = same(EndpointFlags, "max_retries")
    timeout: float = same(EndpointFlags, "timeout")

    BACKEND_NEEDS: ClassVar = {
        f"backend={VLLM}": (
            "served_model_name", "base_url", "api_key_env", "parallel", "max_retries", "timeout",
        )
    }  # fmt: skip

    def text_backend(self, model: str, out: Path) -> TextBackend | None:
        """Who writes the texts of a grid in place of the model; None: nobody.

        Args:
            model: the base as it was given.
            out: a folder that the server sees, too.

        Raises:
            UsageError: no server is named, or with what may be secret; see also ``Service.key``.
        """
        if self.backend == LOCAL:
            return None
        if self.base_url == OPENAI:
            raise UsageError.build(
                "--backend vllm", "no server", expected="--base_url http://localhost:8000/v1"
            )
        service = Service(
            self.served_model_name or model, self.base_url, self.api_key_env,
            retries=self.max_retries, timeout=self.timeout, model_flag="--served_model_name",
        )  # fmt: skip
        service.key()  # what cannot ask is refused before the package that asks is imported
        if service.plain != self.base_url.rstrip("/"):
            raise UsageError.build(
                "--base_url", "may hold a secret, and the command is recorded", found=service.place,
                expected=f"{service.plain}, with the key in {self.api_key_env}",
            )  # fmt: skip
        from pem_composition.endpoint.multi_lora import ServedModules

        return ServedModules(service, out, parallel=self.parallel)

    def rows_at_once(self, batch_size: int | None) -> int | None:
        """Texts of a batch, which is kept when it is whole."""
        return batch_size or (None if self.backend == LOCAL else SERVED_ROWS)

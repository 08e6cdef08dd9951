"""Flags of programs that ask a model behind an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pem_composition.cli import common
from pem_composition.endpoint.jobs import Budget, ask
from pem_composition.endpoint.service import KEY_VARIABLE, OPENAI, Service
from pem_composition.flag_declarations import flag, required

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pem_composition.endpoint.jobs import Job, Report


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

"""Flags of programs that ask a model behind an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pem_composition import json_lines
from pem_composition.cli.answering import check_positive
from pem_composition.endpoint.client import KEY_VARIABLE, OPENAI, Service
from pem_composition.endpoint.jobs import Budget
from pem_composition.errors import DataError, UsageError
from pem_composition.training.config import flag, required

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
    temperature: float | None = flag(None, "of the replies; default: the endpoint's")
    max_reply_tokens: int = flag(256, "tokens of a reply at most")
    max_requests: int | None = flag(None, "stop after so many requests; a rerun goes on")
    max_tokens: int | None = flag(None, "stop after so many tokens, questions counted; likewise")
    parallel: int = flag(4, "questions that are under way at once")
    max_retries: int = flag(5, "how often a request that failed is tried again")
    timeout: float = flag(60.0, "seconds that a reply may take")

    def check_endpoint(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: naming the flag.
        """
        check_positive(self, "max_reply_tokens", "max_requests", "max_tokens", "parallel")
        if self.max_retries < 0:
            raise UsageError.build("--max_retries", "cannot be used", found=self.max_retries)
        if self.timeout <= 0:
            raise UsageError.build("--timeout", "cannot be used", found=self.timeout)
        if self.temperature is not None and self.temperature < 0:
            raise UsageError.build("--temperature", "cannot be used", found=self.temperature)

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
            UsageError, RunFailed: see ``endpoint.jobs.run``.
        """
        from pem_composition.cli.sweep import say
        from pem_composition.endpoint.client import Endpoint
        from pem_composition.endpoint.jobs import refused_path, run
        from pem_composition.sweep.result_store import ResultStore

        _check_replies(path)
        _check_replies(refused_path(path))
        budget = Budget(self.max_requests, self.max_tokens)
        endpoint = Endpoint(self.service)
        return run(jobs, endpoint, ResultStore(path), budget, parallel=self.parallel, say=say)


def _check_replies(path: Path) -> None:
    """An existing file is continued where it holds replies, and never anything else.

    Raises:
        UsageError: a directory, or a file with other lines.
    """
    if not path.exists():
        return
    try:
        lines = [] if path.is_dir() else json_lines.read(path)
    except DataError:
        begun = path.read_bytes().lstrip().startswith(b"{")
        if begun:  # a damaged line of ours, which is named
            raise
        lines = [{}]
    other = any("key" not in line for line in lines)
    if path.is_dir() or other or (not lines and b"\n" in path.read_bytes()):
        raise UsageError.build(
            f"--output_file {path}", "holds something else than replies",
            found="a directory" if path.is_dir() else "lines without a key",
            expected="a new file, or one that this program began", do="choose another name",
        )  # fmt: skip

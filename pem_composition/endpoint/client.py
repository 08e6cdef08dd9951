"""A chat model behind an OpenAI-compatible HTTP endpoint.

The openai package does the talking: it tries a request again after 408, 409, 429, 5xx and broken
connections, with growing pauses or the one that Retry-After names. The key comes from the
environment, and goes into no file and no message.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pem_composition.errors import PEMError, RunFailed, UsageError

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Service:
    """Where the model is and how it is asked.

    Attributes:
        key_variable: name of the environment variable that holds the key.
        temperature: None leaves it to the endpoint.
        reply_tokens: length of a reply at most.
        retries: how often a request that failed is tried again.
        timeout: seconds that a reply may take.
    """

    model: str
    base_url: str = OPENAI
    key_variable: str = KEY_VARIABLE
    temperature: float | None = None
    reply_tokens: int = 256
    retries: int = 5
    timeout: float = 60.0

    @property
    def place(self) -> str:
        """Host and path for messages and records, without what may be secret in a URL."""
        parts = urlsplit(self.base_url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname or ''}{port}{parts.path}"


class Reply(NamedTuple):
    """What the model said, and the tokens of question and reply; None if they are not told."""

    text: str
    tokens: int | None


class Endpoint:
    """An open connection to a service; ``ask`` may be called from several threads.

    Raises:
        UsageError: no http(s) URL, the package openai is missing, or there is no key.
    """

    def __init__(self, service: Service) -> None:
        try:
            place, scheme = service.place, urlsplit(service.base_url).scheme
        except ValueError as error:  # a port out of range, brackets that do not close
            place, scheme = str(error), ""
        if scheme not in ("http", "https"):
            raise UsageError.build(
                "--base_url", "not a URL", found=place, expected="http://... or https://..."
            )
        if importlib.util.find_spec("openai") is None:
            raise UsageError.build(
                "endpoint", "the package openai is not installed",
                do="pip install 'pem_composition[endpoint]'",
            )  # fmt: skip
        self._key = os.environ.get(service.key_variable, "")
        if not self._key.strip():
            raise UsageError.build(
                service.key_variable, "no key in the environment",
                do=f"export {service.key_variable}=...; for a server that asks for none, any word",
            )  # fmt: skip
        import openai

        self.service = service
        self._client = openai.OpenAI(
            base_url=service.base_url,
            api_key=self._key,
            max_retries=service.retries,
            timeout=service.timeout,
        )

    def ask(self, messages: Messages) -> Reply:
        """One reply.

        Raises:
            UsageError: the key or the model's name is refused.
            RunFailed: no usable reply after all retries.
        """
        import openai

        service = self.service
        options: dict[str, Any] = {}
        if service.temperature is not None:
            options["temperature"] = service.temperature
        try:
            found = self._client.chat.completions.create(
                model=service.model,
                messages=list(messages),  # type: ignore[arg-type]
                max_tokens=service.reply_tokens,
                **options,
            )
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        except ValueError as error:  # the body is no JSON, which the client passes on
            raise self._no_reply(str(error)) from None
        return self._reply(found)

    def _reply(self, found: Any) -> Reply:
        """The text of a reply in the form that the interface prescribes."""
        try:
            text = found.choices[0].message.content
            usage = getattr(found, "usage", None)
            tokens = None if usage is None else usage.total_tokens
        except (AttributeError, IndexError, TypeError):
            text, tokens = None, None
        if not isinstance(text, str):
            raise self._no_reply(repr(found))
        return Reply(text, tokens if isinstance(tokens, int) else None)

    def _no_reply(self, found: str) -> PEMError:
        return RunFailed.build(
            self.service.place, "not a chat reply", found=self._short(found),
            expected="choices[0].message.content", do="check --base_url (it often ends in /v1)",
        )  # fmt: skip

    def _explained(self, error: Exception) -> PEMError:
        import openai

        service, where = self.service, self.service.place
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return UsageError.build(where, f"refuses the key in {service.key_variable}")
        if isinstance(error, openai.NotFoundError):
            return UsageError.build(
                where, "no such model or path", found=f"model {service.model}",
                do="check --model and --base_url (it often ends in /v1)",
            )  # fmt: skip
        tries = f"after {service.retries + 1} tries"
        if isinstance(error, openai.RateLimitError):
            return RunFailed.build(where, f"the rate limit holds {tries}", found=self._said(error))
        if isinstance(error, openai.APITimeoutError):
            return RunFailed.build(
                where, f"no reply within {service.timeout:g} seconds {tries}", do="raise --timeout"
            )
        if isinstance(error, openai.APIConnectionError):
            return RunFailed.build(
                where, f"cannot be reached {tries}", found=type(error.__cause__).__name__,
                do="is the server running?",
            )  # fmt: skip
        if isinstance(error, openai.InternalServerError):
            return RunFailed.build(where, f"the server fails {tries}", found=self._said(error))
        return RunFailed.build(where, "the request failed", found=self._said(error))

    def _said(self, error: Exception) -> str:
        status = getattr(error, "status_code", None)
        said = self._short(str(getattr(error, "message", error)))
        return f"{status} {said}" if status else said

    def _short(self, text: str) -> str:
        """One line without the key."""
        plain = " ".join(text.replace(self._key, "...").split())
        return plain if len(plain) <= 200 else plain[:200] + "..."

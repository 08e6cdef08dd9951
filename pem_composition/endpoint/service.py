"""Where a chat model is, how it is asked, and what it replies. Without the package that asks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from pem_composition.errors import UsageError, install, installed

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"

FINISHED, CUT, REFUSED = "finished", "cut", "refused"

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
        model_flag: what names the model, for messages.
    """

    model: str
    base_url: str = OPENAI
    key_variable: str = KEY_VARIABLE
    temperature: float | None = None
    reply_tokens: int = 256
    retries: int = 5
    timeout: float = 60.0
    model_flag: str = "--model"

    @property
    def place(self) -> str:
        """Host and path for messages and records, without what may be secret in a URL."""
        parts = urlsplit(self.base_url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname or ''}{port}{parts.path}".rstrip("/")

    @property
    def plain(self) -> str:
        """The address with scheme, host and path alone."""
        return f"{urlsplit(self.base_url).scheme}://{self.place}"

    def key(self) -> str:
        """The key, once the address and the package that asks are fit for use.

        Raises:
            UsageError: no http(s) URL, the package openai is missing, or there is no key.
        """
        try:
            place, scheme = self.place, urlsplit(self.base_url).scheme
        except ValueError as error:  # a port out of range, brackets that do not close
            place, scheme = str(error), ""
        if scheme not in ("http", "https"):
            raise UsageError.build(
                "--base_url", "not a URL", found=place, expected="http://... or https://..."
            )
        if not installed("openai"):
            raise UsageError.build(
                "endpoint", "the package openai is not installed", do=install("openai")
            )
        found = os.environ.get(self.key_variable, "")
        if not found.strip():
            raise UsageError.build(
                self.key_variable, "no key in the environment",
                do=f"export {self.key_variable}=...; for a server that asks for none, any word",
            )  # fmt: skip
        return found


class Reply(NamedTuple):
    """What the model said.

    Attributes:
        text: without what the model thought; of a refusal the reason, where one is told.
        tokens: of question and reply; None if they are not told.
        end: FINISHED, CUT or REFUSED.
    """

    text: str
    tokens: int | None
    end: str = FINISHED

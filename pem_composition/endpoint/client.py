"""A chat model behind an OpenAI-compatible HTTP endpoint.

The openai package does the talking: it tries a request again after 408, 409, 429, 5xx and broken
connections, with growing pauses or the one that Retry-After names. A body whose JSON breaks off,
or that holds such an error with status 200 (routers do so), is asked for again here. The key comes
from the environment, and goes into no file and no message.

A reply says how it ended: finished, cut at its length, or refused (a content filter, a refusal, no
content at all). Its text is what the model says, without what it thinks.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import openai

from pem_composition.endpoint.service import CUT, FINISHED, REFUSED, Messages, Reply, Service
from pem_composition.errors import PEMError, RunFailed, UsageError

T = TypeVar("T")

# What servers call the end of a reply, without case, "_" and "-"; every other word is FINISHED.
ENDS = {
    **dict.fromkeys(("length", "maxtokens", "maxlength", "modellength"), CUT),
    **dict.fromkeys(
        ("contentfilter", "refusal", "safety", "recitation", "prohibitedcontent", "blocklist"),
        REFUSED,
    ),
}
SAID = ("text", "output_text")  # parts of a reply that the model speaks
AGAIN = ("408", "409", "429", "500", "502", "503", "504", "529")
LIMITS = ("max_tokens", "max_completion_tokens")  # older models take the first, newer the second
# What a model thinks, in the marks of several families; a block that never closes ends the text.
TAGS = "think|thinking|thought|reasoning"
THOUGHT = re.compile(
    rf"<({TAGS})>.*?(?:</\1>|\Z)|\[think\].*?(?:\[/think\]|\Z)"
    r"|<\|channel\|>(?:analysis|commentary)\b.*?(?=<\|channel\|>final\b|\Z)",
    re.DOTALL | re.IGNORECASE,
)
# Templates that open the block leave its end alone in the reply.
THOUGHT_END = re.compile(
    rf".*(?:</(?:{TAGS})>|\[/think\]|<\|channel\|>final<\|message\|>)", re.DOTALL | re.IGNORECASE
)
FILTERED = re.compile(
    r"content.?(filter|policy|management)|responsibleai|invalid_prompt|moderation"
    r"|data_?inspection|(prompt|input|request|message|response)[^.]{0,40}(flagged|filtered)",
    re.IGNORECASE,
)
# A question that this model can never read: its row is left out like a refused one.
TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum context|(prompt|input) is too long", re.IGNORECASE
)
TRANSIENT = re.compile(
    r"rate.?limit|overload|timed?.?out|upstream|provider returned|unavailable|try again|internal",
    re.IGNORECASE,
)


def _tokens(usage: Any) -> int | None:
    """Tokens of question and reply, in all or in parts; None if they are not told."""
    total = getattr(usage, "total_tokens", None)
    if not isinstance(total, int):
        parts = [getattr(usage, f"{name}_tokens", None) for name in ("prompt", "completion")]
        total = sum(parts) if all(isinstance(part, int) for part in parts) else None
    return total


def spoken(text: str) -> str:
    """A reply without what the model thinks before it speaks."""
    return THOUGHT_END.sub("", THOUGHT.sub("", text)).strip()


class _Passing(Exception):
    """An error in the place of a reply that may be gone at the next try."""


class Endpoint:
    """An open connection to a service; ``ask`` may be called from several threads.

    Raises:
        UsageError: see ``Service.key``.
    """

    def __init__(self, service: Service) -> None:
        self._key = service.key()
        self.service = service
        self._limit = LIMITS[0]
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

        def asked() -> Reply:
            try:
                return self._reply(self._asked(messages))
            except openai.APIStatusError as error:
                said = f"{error} {error.body}"
                refused = FILTERED.search(said) or TOO_LONG.search(said)
                if error.status_code in (400, 403, 413, 422, 451) and refused:
                    return Reply(self._said(error), None, REFUSED)
                raise

        return self._tried(asked)

    def complete(self, model: str, prompt: Sequence[int], **settings: Any) -> Any:
        """The one choice of a completion (``POST /completions``), with the fields of the server.

        Args:
            model: of this server, in place of the service's.
            prompt: tokens.
            settings: of the request, those that OpenAI does not know among them.

        Raises:
            UsageError: the key or the model's name is refused.
            RunFailed: no completion after all retries.
        """

        def asked() -> Any:
            found = self._client.completions.create(
                model=model, prompt=list(prompt), extra_body=settings
            )
            if error := getattr(found, "error", None):
                said = self._failed(error).text
                raise RunFailed.build(self.service.place, "refuses the request", found=said)
            choices = getattr(found, "choices", None) or []
            if len(choices) != 1:
                raise RunFailed.build(
                    self.service.place, "another number of completions than were asked for",
                    found=len(choices), expected=1,
                )  # fmt: skip
            return choices[0]

        return self._tried(asked)

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Status and words of a request that is made once; of an error that of the server.

        Raises:
            UsageError: the key is refused.
            RunFailed: the server cannot be reached.
        """
        try:
            once = self._client.with_options(max_retries=0)
            return 200, once.post(path, body=dict(body), cast_to=str)
        except openai.AuthenticationError as error:
            raise self._explained(error) from None
        except openai.APIStatusError as error:
            return error.status_code, self._said(error)
        except openai.OpenAIError as error:
            raise self._explained(error) from None

    def _tried(self, asked: Callable[[], T]) -> T:
        """What is asked for, in the end; what the client does not try again is tried here."""
        for attempt in range(self.service.retries + 1):
            try:
                return asked()
            except openai.OpenAIError as error:
                raise self._explained(error) from None
            except (json.JSONDecodeError, _Passing) as error:  # the first the client passes on
                if attempt == self.service.retries:
                    if isinstance(error, _Passing):
                        tries = f"after {self.service.retries + 1} tries"
                        raise RunFailed.build(
                            self.service.place, f"the server fails {tries}", found=str(error)
                        ) from None
                    raise self._no_reply(str(error)) from None
                time.sleep(min(0.5 * 2**attempt, 8.0))
        raise AssertionError("unreachable")

    def _asked(self, messages: Messages) -> Any:
        """The client's answer; the limit of a reply goes by the name that the model takes."""
        service = self.service
        options: dict[str, Any] = {}
        if service.temperature is not None:
            options["temperature"] = service.temperature

        def create(limit: str) -> Any:
            return self._client.chat.completions.create(
                model=service.model, messages=list(messages),  # type: ignore[call-overload]
                **{limit: service.reply_tokens}, **options,
            )  # fmt: skip

        first = self._limit
        try:
            return create(first)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if first not in f"{error} {error.body}":
                raise
            (other,) = set(LIMITS) - {first}
            try:
                found = create(other)
            except openai.OpenAIError as second:
                about_it = other in f"{second} {getattr(second, 'body', None)}"
                raise (error if about_it else second) from None
            self._limit = other
            return found

    def _reply(self, found: Any) -> Reply:
        """A reply in the form that the interface prescribes."""
        failed, filtered = getattr(found, "error", None), getattr(found, "prompt_filter_results", 0)
        try:
            choices = found.choices
            if failed or (filtered and not choices):
                return self._failed(failed or filtered)
            choice = next((c for c in choices if getattr(c, "index", 0) == 0), choices[0])
            message, end = getattr(choice, "message", None), str(choice.finish_reason or "")
            if end == "error":
                return self._failed(getattr(choice, "error", end))
            ended = ENDS.get(re.sub("[_-]", "", end.lower()), FINISHED)
            if message is None and ended == REFUSED:
                return Reply(end, None, REFUSED)
            text, refusal = message.content, getattr(message, "refusal", None)
        except (AttributeError, IndexError, TypeError):
            raise self._no_reply(repr(found)) from None
        tokens = _tokens(getattr(found, "usage", None))
        if isinstance(text, list):  # parts, of which some are what the model thinks
            parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in text]
            said = [p for p in parts if isinstance(p, dict) and p.get("type") in SAID]
            text = "".join(str(p.get("text", "")) for p in said)
        if refusal or ended == REFUSED:
            return Reply(self._short(str(refusal or end)), tokens, REFUSED)
        if text is None and ended == FINISHED and not self._did_something_else(message):
            return Reply("no content", tokens, REFUSED)
        if text is not None and not isinstance(text, str):
            raise self._no_reply(repr(found))
        return Reply(spoken(text or ""), tokens, ended)

    def _failed(self, error: Any) -> Reply:
        """An error where a reply should stand: a refusal, or one that is worth another try.

        Raises:
            _Passing: the latter.
            RunFailed: any other.
        """
        whole, said = str(error), self._short(str(error))
        if FILTERED.search(whole) or TOO_LONG.search(whole) or "'filtered': True" in whole:
            return Reply(said, None, REFUSED)
        code = error.get("code") if isinstance(error, dict) else None
        again = str(code) in AGAIN or TRANSIENT.search(whole)
        if again or error == "error":
            raise _Passing(said)
        raise RunFailed.build(self.service.place, "the request failed", found=said)

    def _did_something_else(self, message: Any) -> bool:
        """True if a message without content thought, or called a tool, instead of refusing."""
        names = ("reasoning_content", "reasoning", "tool_calls", "function_call")
        return any(getattr(message, name, None) for name in names)

    def _no_reply(self, found: str) -> PEMError:
        return RunFailed.build(
            self.service.place, "not a chat reply", found=self._short(found),
            expected="choices[0].message.content", do="check --base_url (it often ends in /v1)",
        )  # fmt: skip

    def _explained(self, error: Exception) -> PEMError:
        service, where = self.service, self.service.place
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            what = f"refuses the key in {service.key_variable}"
            return UsageError.build(where, what, found=self._said(error))
        if isinstance(error, openai.NotFoundError):
            return UsageError.build(
                where, "no such model or path", found=f"model {service.model}",
                do=f"check {service.model_flag} and --base_url (it often ends in /v1)",
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

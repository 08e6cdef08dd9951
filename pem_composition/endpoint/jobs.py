"""Many questions to an endpoint: each reply is on disk before the next is awaited.

A job's key is made of what is asked, so a rerun of the same command asks only what has no reply
yet, and a changed question, server, model or setting never meets an old reply. What a model refuses
is kept in a file of its own beside the replies, is counted, and is asked again only on request.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pem_composition import json_lines
from pem_composition.endpoint.service import FINISHED, REFUSED, Messages, Reply, Service
from pem_composition.errors import DataError, PEMError, UsageError
from pem_composition.sweep.result_store import ResultStore

REPORT_EVERY = 20  # replies
ATTEMPTS = 2  # questions whose reply cannot be read are asked so often


@dataclass(frozen=True, eq=False)
class Job:
    """One question.

    Attributes:
        facts: what its line holds besides what is read out of the reply.
        read: reply -> the rest of the line; None where the reply is not what was asked for.
    """

    key: str
    messages: Messages
    facts: Mapping[str, Any]
    read: Callable[[str], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Budget:
    """Where to stop: after so many requests (retries within one do not count), or tokens."""

    requests: int | None = None
    tokens: int | None = None


@dataclass
class Report:
    """What a run did, and what it left.

    Attributes:
        asked: different questions of the command.
        done, before: those with a usable reply, of this run and of earlier ones.
        refused: those that the model or a filter refused, now or earlier.
        cut, unreadable: those whose reply broke off at its length, or is not what was asked for.
        left: those that a spent budget left.
    """

    asked: int = 0
    done: int = 0
    before: int = 0
    refused: int = 0
    cut: int = 0
    unreadable: int = 0
    left: int = 0
    requests: int = 0
    tokens: int = 0
    stopped: str = ""  # the flag whose budget is spent

    @property
    def whole(self) -> bool:
        """True if every question has a usable reply."""
        return self.done + self.before == self.asked


def refused_path(path: Path) -> Path:
    """The file of refusals beside a file of replies."""
    return path.with_name(f"{path.stem}.refused.jsonl")


def key_of(service: Service, messages: Messages, place: str = "") -> str:
    """sha256 of everything that decides a reply.

    Args:
        place: tells apart questions that may have the same words, as in two orders of answers.
    """
    settings = [service.place, service.model, service.temperature, service.reply_tokens]
    asked = json.dumps([*settings, list(messages), place])
    return hashlib.sha256(asked.encode()).hexdigest()


def ask(
    jobs: Iterable[Job],
    service: Service,
    path: Path,
    budget: Budget,
    *,
    parallel: int = 1,
    retry_refused: bool = False,
    say: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Ask a service what ``path`` has no reply to yet, several questions at a time.

    Replies are appended as they come. Questions of one key are asked once.

    Args:
        retry_refused: also ask what was refused in an earlier run.

    Raises:
        UsageError: a path that holds something else, or a budget of tokens at an endpoint that does
            not count them.
        RunFailed: the endpoint failed; what was done is kept and named.
    """
    for file in (path, refused_path(path)):
        _check_replies(file)
    service.key()  # what cannot ask is refused before the package that asks is imported
    from pem_composition.endpoint.client import Endpoint

    store, endpoint = ResultStore(path), Endpoint(service)
    asked = list({job.key: job for job in jobs}.values())
    state = _State(asked, store, budget, retry_refused=retry_refused)
    with ThreadPoolExecutor(parallel) as pool:
        running: dict[Future[Reply], Job] = {}
        try:
            while True:
                while len(running) < parallel and (job := state.next()) is not None:
                    running[pool.submit(endpoint.ask, job.messages)] = job
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    before = state.report.done
                    state.take(running.pop(future), future.result())
                    if state.report.done > before and state.report.done % REPORT_EVERY == 0:
                        say(f"{state.report.done} replies, {len(state.waiting)} to go")
        except BaseException as error:
            state.rescue(running)
            if isinstance(error, PEMError):
                raise type(error)(f"{error}; {_kept(state, len(asked))}") from None
            raise
    state.report.left = len(state.waiting)
    return state.report


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


def _kept(state: _State, total: int) -> str:
    count = state.report.before + state.report.done
    kept = f"{count} of {total} kept in {state.store.path}" if count else "nothing was written yet"
    return f"{kept}; the same command goes on from there"


class _State:
    """What waits, what was spent, and what came back."""

    def __init__(
        self, asked: Sequence[Job], store: ResultStore, budget: Budget, *, retry_refused: bool
    ) -> None:
        self.store, self.budget = store, budget
        self.refusals = ResultStore(refused_path(store.path))
        known = [job for job in asked if job.key in store.records]
        before = {} if retry_refused else self.refusals.records
        refused = [job for job in asked if job.key in before and job.key not in store.records]
        settled = {job.key for job in (*known, *refused)}
        self.waiting = deque(job for job in asked if job.key not in settled)
        self.report = Report(len(asked), before=len(known), refused=len(refused))
        self.tries: Counter[str] = Counter()

    def next(self) -> Job | None:
        """The next question, if the budget allows for one."""
        spent = (("requests", self.report.requests), ("tokens", self.report.tokens))
        for name, value in spent:
            limit = getattr(self.budget, name)
            if self.waiting and limit is not None and value >= limit:
                self.report.stopped = f"--max_{name}"
                return None
        if not self.waiting:
            return None
        self.report.requests += 1
        return self.waiting.popleft()

    def take(self, job: Job, reply: Reply) -> None:
        """Append the reply, or put the question back in front."""
        uncounted = reply.tokens is None and reply.end != REFUSED
        if uncounted and self.budget.tokens is not None:
            raise UsageError.build(
                "--max_tokens", "the endpoint does not say how many tokens it used",
                do="give --max_requests",
            )  # fmt: skip
        self.report.tokens += reply.tokens or 0
        line = {"key": job.key, **job.facts}
        if reply.end == REFUSED:
            self.refusals.append({**line, "refused": reply.text, "tokens": reply.tokens})
            self.report.refused += 1
            return
        read = job.read(reply.text) if reply.end == FINISHED else None
        if read is not None:
            self.store.append({**line, **read, "tokens": reply.tokens})
            self.report.done += 1
            return
        self.tries[job.key] += 1
        if self.tries[job.key] < ATTEMPTS:
            self.waiting.appendleft(job)
        elif reply.end != FINISHED:
            self.report.cut += 1
        else:
            self.report.unreadable += 1

    def rescue(self, running: Mapping[Future[Reply], Job]) -> None:
        """After a failure: keep the replies that are on their way."""
        for future, job in running.items():
            if not future.cancel():
                with suppress(PEMError):
                    self.take(job, future.result())


def describe(report: Report) -> str:
    """What was done, in one line."""
    parts = [f"{report.done} replies", f"{report.requests} requests"]
    if report.tokens:
        parts.append(f"{report.tokens} tokens")
    if report.before:
        parts.append(f"{report.before} known before")
    if report.refused:
        parts.append(f"{report.refused} refused")
    if report.cut:
        parts.append(f"{report.cut} replies cut at --max_reply_tokens: raise it")
    if report.unreadable:
        parts.append(f"{report.unreadable} replies that are not what was asked for")
    if report.stopped:
        parts.append(f"stopped by {report.stopped} with {report.left} to go: run it again to go on")
    return ", ".join(parts)

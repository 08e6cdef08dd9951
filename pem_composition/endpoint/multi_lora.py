"""Texts of a grid's points by one engine that serves them all as LoRA modules: vLLM.

A point is written as a folder in the form that vLLM serves (``checkpoint.serving``), loaded under a
name of its own, checked, asked, and unloaded. Facts about vLLM (docs/features/lora.md and, of the
source, entrypoints/openai/models/serving.py, completion/protocol.py and serving.py, and
entrypoints/serve/lora/api_router.py; releases from 0.10.2 to the sources of November 2026):

- ``vllm serve BASE --enable-lora --max-lora-rank R`` with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 takes
  ``POST /v1/load_lora_adapter`` {lora_name, lora_path} and ``/v1/unload_lora_adapter``; without the
  variable both are 404. Modules may also be given at start: ``--lora-modules NAME=PATH``.
- ``POST /v1/completions`` takes the name of base or module as ``model``, tokens as ``prompt``, and
  beside OpenAI's settings top_k, min_p, repetition_penalty, min_tokens, stop_token_ids,
  ``return_token_ids`` (0.10.2) and ``prompt_logprobs``. What a request leaves open is filled in
  from the model's generation_config.json: everything is said.
- A loaded name keeps its module, and cached prefixes are known by the name (vLLM #30931), so that a
  name belongs to one content of one folder.
- A module that meets no layer of the model is loaded without an error, and the base answers
  (vLLM #48019, #34186, #55193): every point is checked before its texts count.

The check. Of the n tokens of ``PROBE``, with their log-probabilities by the engine (e) and by the
model that is loaded here (l), each with the base alone (0) and with the point's module (1):

    r = |e0 - l0|                                 the engine's rounding, at most SAME_BASE
    x = l1 - l0,   s = (e1 - e0) x / (x x)        the share of the module's effect that is there
    |s - 1| <= 1/2 + 6 r / (|x| sqrt(n))          |.|: root of the mean square, in nats
    |(e1 - e0) - x| <= |x| / 2 + 2 r

Rounding moves s by about 1.4 r / (|x| sqrt(n)). A module that is not applied (s = 0) is found where
its effect |x| exceeds 12 r / sqrt(n), or TOLD where not one number differs. The loaded model is
needed: nothing else says what the weights must answer.

Sample j of prompt p is drawn with a seed made of (seed, p, j), whatever the batch. The engine's
random numbers are its own, so samples are other texts than those that are written here.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pem_composition.checkpoint.serving import for_vllm, max_lora_rank
from pem_composition.endpoint.client import Endpoint
from pem_composition.errors import PEMError, RunFailed, UsageError
from pem_composition.evaluation.decoding import BeamSearch, Prompts
from pem_composition.evaluation.keys import key_of, module_digest
from pem_composition.evaluation.model_names import max_input_length
from pem_composition.evaluation.text_sampling import Request, end_tokens, token_log_probabilities
from pem_composition.tasks.tokens import Tokens, prompt_tokens

if TYPE_CHECKING:
    from pem_composition.endpoint.service import Service
    from pem_composition.evaluation.text_sampling import Write
    from pem_composition.module import PEM

LogProbabilities = NDArray[np.float64]

PROBE = (
    "The old bridge was closed on Monday morning, and most people in the town were not surprised. "
    'Its stones had been loose for years. "You never listen," said the mayor\'s brother, who had '
    "written 3 letters about it; nobody had answered him. What a stupid way to lose a good road!"
)
PROBE_TOKENS = 64  # at most
SAME_BASE = 0.25  # nats: the most that rounding moves the base's log-probabilities
TOLD = 1e-3  # nats: an effect of this size changes some number of the probe
LEAST = -50.0  # nats: no log-probability counts as less
ALREADY = re.compile("already been loaded", re.IGNORECASE)
UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
# What stays as it is whatever the server's own defaults are.
NEUTRAL: Mapping[str, Any] = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


class ServedModules:
    """The points of a grid on one server; see ``sweep.text_backend.TextBackend``.

    Args:
        service: its ``model`` is the base's name at the server.
        folder: where points are written for the server to read; it has to see the same path.
        parallel: texts that are under way at once.

    Raises:
        UsageError: see ``Service.key``.
    """

    def __init__(self, service: Service, folder: Path, *, parallel: int) -> None:
        self.service, self.folder, self.parallel = service, folder.absolute(), parallel
        self.identity = {"backend": "vllm", "served": service.model}
        self._endpoint = Endpoint(service)
        self._probe: Tokens = []
        self._base: LogProbabilities = np.zeros(0)  # of the model that is loaded here
        self._served: LogProbabilities | None = None  # of the base at the server

    def check(self, module: PEM) -> None:
        """Refuse a module that vLLM does not serve.

        Raises:
            UnsupportedModule: see ``for_vllm``.
        """
        for_vllm(module)

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Read the probe with the loaded model's own weights; no request is made."""
        limit = max_input_length(model.config, tokenizer) or PROBE_TOKENS
        self._probe = prompt_tokens(tokenizer, PROBE)[: min(PROBE_TOKENS, limit - 1)]
        self._base = self._local(model)

    def connect(self) -> None:
        """Ask for the base's log-probabilities, once.

        Raises:
            UsageError: a server that serves another base.
            RunFailed: a server that fails, or tells no numbers.
        """
        if self._served is None:
            self._check_base()

    @contextmanager
    def writing(
        self, module: PEM | None, name: str, model: Any, tokenizer: Any, asked: Prompts | BeamSearch
    ) -> Iterator[Write]:
        """The module at the server, checked against the model, which holds it too.

        Raises:
            UsageError: a server that cannot load the module.
            RunFailed: a server that fails, or answers with other weights.
        """
        settings = _settings(asked, end_tokens(model, tokenizer))
        vocabulary = len(model.get_input_embeddings().weight)
        if module is None or not _changes(module):
            yield partial(self._write, self.service.model, asked, settings, vocabulary)
            return
        with self._loaded(for_vllm(module), name) as served:
            self._check_point(served, name, self._local(model))
            yield partial(self._write, served, asked, settings, vocabulary)

    # --- the server's modules ---

    @contextmanager
    def _loaded(self, module: PEM, name: str) -> Iterator[str]:
        """The name of a module at the server, which has it for as long."""
        word = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[-60:]
        path = self.folder / f".served-{word}"
        module.save(path, overwrite=True)
        digest = key_of({"path": str(path), "module": module_digest(path)})
        served = f"{word}-{digest[:12]}"
        try:
            status, said = self._endpoint.post(
                "/load_lora_adapter", {"lora_name": served, "lora_path": str(path)}
            )
            if status != 200 and not ALREADY.search(said):  # left by a run that was killed
                raise self._not_loaded(module, path, status, said)
            try:
                yield served
            finally:
                with suppress(PEMError):
                    self._endpoint.post("/unload_lora_adapter", {"lora_name": served})
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _not_loaded(self, module: PEM, path: Path, status: int, said: str) -> PEMError:
        """Why the server did not take a module, and what helps."""
        place = self.service.place
        if status == 404 and "adapter" not in said.lower():
            return UsageError.build(
                place, "takes no modules while it runs", found=said,
                do=f"start vllm serve with {UPDATING} and --enable-lora",
            )  # fmt: skip
        if status == 404:
            return UsageError.build(
                place, "does not see the module's folder", found=said, expected=path,
                do="choose a --save_path that the server sees under the same name",
            )  # fmt: skip
        if re.search("max.lora.rank", said, re.IGNORECASE):
            rank = max(t.shape[0] for n, t in module.tensors.items() if n.endswith(".lora_A"))
            return UsageError.build(
                place, f"takes no module of rank {rank}", found=said,
                do=f"start vllm serve with --max-lora-rank {max_lora_rank(rank, path.name)}",
            )  # fmt: skip
        if re.search("lora is not enabled", said, re.IGNORECASE):
            return UsageError.build(
                place, "serves no LoRA modules", found=said,
                do="start vllm serve with --enable-lora",
            )  # fmt: skip
        return RunFailed.build(place, f"cannot load {path.name}", found=said)

    # --- the check ---

    def _check_base(self) -> None:
        """Refuse a server of another base.

        Raises:
            UsageError: naming it.
        """
        self._served = self._log_probabilities(self.service.model)
        rounding = _size(self._served - self._base)
        if rounding > SAME_BASE:
            raise UsageError.build(
                self.service.place, f"its model {self.service.model} is another base",
                found=f"log-probabilities {rounding:.2g} nats away from those of the base here",
                expected=f"at most {SAME_BASE}",
                do="serve --model_name_or_path, or name it (--served_model_name)",
            )  # fmt: skip

    def _check_point(self, served: str, name: str, local: LogProbabilities) -> None:
        """Refuse texts that the module did not write; the rule is above.

        Raises:
            RunFailed: naming the point.
        """
        assert self._served is not None, "the base comes first"
        expected = local - self._base
        found = self._log_probabilities(served) - self._served
        effect, rounding = _size(expected), _size(self._served - self._base)
        if not effect:
            return
        share = float(found @ expected / (expected @ expected))
        noise = 6 * rounding / (effect * len(expected) ** 0.5)
        away = _size(found - expected) > effect / 2 + 2 * rounding
        if away or abs(share - 1) > 0.5 + noise or (not found.any() and effect > TOLD):
            what = "other weights" if share > 0.5 else "the base"
            raise RunFailed.build(
                self.service.place, f"answers with {what} instead of {name}",
                found=f"a change of {_size(found):.2g} nats, along its own {share:.2g} of it",
                expected=f"that of the model here, {effect:.2g} nats",
                do="vLLM may not apply modules to this model: write the texts here "
                "(--backend local), or fold the point (pem fold) and serve the whole model",
            )  # fmt: skip

    def _local(self, model: Any) -> LogProbabilities:
        return token_log_probabilities(model, self._probe).clip(LEAST)

    def _log_probabilities(self, name: str) -> LogProbabilities:
        """Those of the probe's tokens but the first, by a model of the server.

        Raises:
            RunFailed: the server tells none.
        """
        choice = self._endpoint.complete(
            name, self._probe, max_tokens=1, temperature=1.0, prompt_logprobs=1, **NEUTRAL
        )
        told = getattr(choice, "prompt_logprobs", None)
        whole = isinstance(told, list) and len(told) == len(self._probe)
        pairs = zip(self._probe[1:], told[1:], strict=True) if whole else ()
        found = np.array([_told(token, position) for token, position in pairs])
        known, all_ = int((~np.isnan(found)).sum()), len(self._probe) - 1
        if known < all_:
            raise RunFailed.build(
                self.service.place, "does not tell log-probabilities of a prompt",
                found=f"numbers for {known} of {all_} tokens", expected="prompt_logprobs",
                do="use vLLM 0.10.2 or later, with weights whose logits are finite",
            )  # fmt: skip
        return found.clip(LEAST)

    # --- the texts ---

    def _write(
        self,
        name: str,
        asked: Prompts | BeamSearch,
        settings: Mapping[str, Any],
        vocabulary: int,
        requests: Sequence[Request],
    ) -> list[Tokens]:
        """The new tokens of each request, an end token included.

        Raises:
            RunFailed: a reply that is no text of the tokens that were asked for.
        """
        ends = settings["stop_token_ids"]
        seeded = isinstance(asked, Prompts) and not asked.decoding.greedy

        def one(request: Request) -> Tokens:
            seed = {"seed": _seed(asked.seed, request)} if seeded else {}  # type: ignore[union-attr]
            choice = self._endpoint.complete(
                name, request.tokens, max_tokens=request.steps, return_token_ids=True,
                **settings, **seed,
            )  # fmt: skip
            tokens, end = getattr(choice, "token_ids", None), choice.finish_reason
            said = _ended(tokens, end, ends, request.steps, vocabulary)
            if said is None:
                shown = "no token_ids" if tokens is None else f"token_ids {tokens}"[:80]
                raise RunFailed.build(
                    self.service.place, "not a text with its tokens",
                    found=f"finish_reason {end}, {shown}",
                    expected=f"token_ids below {vocabulary}; finish_reason stop, an end token last "
                    f"and nowhere else, or length, and {request.steps} of them",
                    do="use vLLM 0.10.2 or later",
                )  # fmt: skip
            return said

        with ThreadPoolExecutor(self.parallel) as pool:
            running = [pool.submit(one, request) for request in requests]
            try:
                return [future.result() for future in running]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _ended(
    tokens: Any, end: Any, ends: Sequence[int], steps: int, vocabulary: int
) -> Tokens | None:
    """A text's tokens, the end token included where the server leaves it out; None for no text.

    Examples:
        >>> _ended([5, 2], "stop", [2], 3, 9), _ended([5], "stop", [2], 3, 9)
        ([5, 2], [5, 2])
        >>> _ended([5, 6, 7], "length", [2], 3, 9), _ended([5, 6], "length", [2], 3, 9)
        ([5, 6, 7], None)
    """
    if not isinstance(tokens, list) or end not in ("stop", "length"):
        return None
    known = all(type(t) is int and 0 <= t < vocabulary for t in tokens)
    if not known or len(tokens) > steps or {*tokens[:-1]} & {*ends}:
        return None
    if tokens and tokens[-1] in ends:
        return tokens
    if end == "stop":
        return [*tokens, *ends[:1]]
    return tokens if len(tokens) == steps else None


def _told(token: int, position: Any) -> float:
    """A token's log-probability at its position; NaN where it is not told."""
    try:
        return float(position[str(token)]["logprob"])
    except (KeyError, TypeError, ValueError):
        return math.nan


def _settings(asked: Prompts | BeamSearch, ends: frozenset[int]) -> dict[str, Any]:
    """How vLLM is asked for the texts that are asked for."""
    settings = {**NEUTRAL, "stop_token_ids": sorted(ends), "temperature": 0.0}
    if isinstance(asked, BeamSearch):
        assert asked.num_beams == 1, "vLLM's beams know no repetition penalty"
        return {**settings, "repetition_penalty": asked.repetition_penalty, "min_tokens": 1}
    decoding = asked.decoding
    if decoding.greedy:
        return settings
    return {
        **settings, "temperature": decoding.temperature, "top_p": decoding.top_p,
        "top_k": decoding.top_k or -1,
    }  # fmt: skip


def _seed(seed: int, request: Request) -> int:
    """Of one text, whatever the batch: a number of 63 bits."""
    state = np.random.SeedSequence((seed, request.prompt, request.sample))
    return int(state.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _changes(module: PEM) -> bool:
    """False for a module whose every update is zero."""
    return any(t.any() for name, t in module.adapter_tensors().items() if name.endswith(".lora_B"))


def _size(values: LogProbabilities) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(values**2)))

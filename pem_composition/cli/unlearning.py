"""``negation.py --grid ... --evaluate``: negate, generate, judge, perplexity at every strength."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.cli import common, sweep
from pem_composition.cli import flags as shared
from pem_composition.cli.causal import DECODING
from pem_composition.cli.parser import COMMAND
from pem_composition.cli.report import show
from pem_composition.cli.values import NUMBER
from pem_composition.errors import UsageError
from pem_composition.evaluation import keys
from pem_composition.evaluation.search import EVERY, STARTS
from pem_composition.report.records import RESULTS
from pem_composition.sweep import unlearning as library
from pem_composition.training.config import flag

if TYPE_CHECKING:
    from pem_composition.evaluation.generate import Decoding
    from pem_composition.evaluation.toxicity import Judge
    from pem_composition.sweep.strengths import StrengthRunner
    from pem_composition.sweep.texts import Asked, LongText

DEFAULTS: dict[str, Any] = {
    "num_samples": 100,
    "seed": 42,
    "judge": ("offline",),
    "threshold": 0.8,
    "perplexity_file": "wikitext2",
    "window": 1024,
    "stride": 512,
    "start_token": EVERY,
    "max_ppl_increase": "3%",
}
LEAST = {
    "num_samples": 1, "max_prompts": 1, "perplexity_tokens": 2, "window": 2, "stride": 1,
    "batch_size": 1, "seed": 0,
}  # fmt: skip


def _flag(text: str, **meta: Any) -> Any:
    """A flag that is not given unless it is said; the help names what is taken then."""
    return flag(None, text, **meta)


@dataclass(frozen=True, kw_only=True)
class UnlearningFlags(shared.ModelFlags):
    """A module, and what each strength is put through: prompts, judges, a text to predict."""

    grid: tuple[float, ...] | None = _flag(
        "START STEP STOP, or several such ranges: one negation per strength", metavar="S"
    )
    evaluate: bool = flag(False, "measure the strengths of the grid instead of writing modules")
    model_name_or_path: str | None = _flag("base model: a directory or a name")
    prompt: str | None = _flag("the beginning of every text")
    prompt_file: str | None = _flag(
        "prompts: a table with a column prompt or text, or RealToxicityPrompts as published"
    )
    max_prompts: int | None = _flag("take only the first N prompts of the file")
    num_samples: int | None = _flag("texts per prompt (default: 100)")
    max_new_tokens: int | None = _flag("tokens that are written; or --max_length")
    max_length: int | None = _flag("tokens with the prompt counted; or --max_new_tokens")
    temperature: float | None = _flag("logits are divided by it (default: 1)")
    top_k: int | None = _flag("sample among the k most probable tokens (default: all)")
    top_p: float | None = _flag("sample among the fewest tokens of this probability (default: 1)")
    greedy: bool | None = _flag("write the most probable token instead of a sample")
    seed: int | None = _flag("seed of the texts, the same at each strength (default: 42)")
    judge: tuple[str, ...] | None = _flag(
        "offline, detoxify or a judge's folder, or several of them (default: offline)"
    )
    threshold: float | None = _flag("a text with a higher score counts as toxic (default: 0.8)")
    perplexity_file: str | None = _flag(
        "text to predict, as --text_file of pem perplexity (default: wikitext2)"
    )
    guard_file: str | None = _flag(
        "text by which the strength is chosen (default: the first half of --perplexity_file, whose "
        "second half is reported)"
    )
    perplexity_tokens: int | None = _flag("only the first N tokens of each (default: all)")
    window: int | None = _flag("tokens that are read at once (default: 1024)")
    stride: int | None = _flag("tokens from window to window (default: 512)")
    start_token: str | None = _flag(
        "windows that begin with the start token, if there is one: every (default), first or none",
        choices=STARTS,
    )
    max_ppl_increase: str | None = _flag(
        "choose the strongest negation that raises the perplexity by at most so much, at the upper "
        "end of the 95 % interval: 3% or 0.03 (default: 3%)",
        metavar="SHARE",
    )
    batch_size: int | None = _flag("texts per forward pass; default: by the device")
    bf16: bool | None = _flag("compute in bfloat16: faster where the processor has it")
    use_cpu: bool | None = _flag("do not use a GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate:
            self._check_sweep()
        else:
            shared.refuse_flags(self, "--evaluate", _names())

    def _check_sweep(self) -> None:
        """Refuse values that no sweep can use.

        Raises:
            UsageError: naming the flag.
        """
        if self.grid is None:
            raise UsageError.build(
                "--evaluate", "no strengths to measure", expected="--grid START STEP STOP",
                do="add --grid 0 0.1 1",
            )  # fmt: skip
        if (self.prompt is None) == (self.prompt_file is None):
            raise UsageError.build(
                "--prompt", "what the texts begin with", expected="--prompt or --prompt_file"
            )
        if self.max_prompts is not None and self.prompt_file is None:
            raise UsageError.build(
                "--max_prompts", "has no effect without --prompt_file", do="leave it out"
            )
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError.build(
                    f"--{name}", "cannot be used", found=value, expected=f"a number >= {least}"
                )
        if not 0 <= self.value("threshold") <= 1:
            raise UsageError.build(
                "--threshold", "cannot be used", found=self.threshold, expected="0 to 1"
            )
        share_of(self.value("max_ppl_increase"))

    def value(self, name: str) -> Any:
        """A flag or its default."""
        given = getattr(self, name)
        return DEFAULTS[name] if given is None else given


def _names() -> tuple[str, ...]:
    """Flags that say nothing about a module that is written."""
    others = {spec.name for spec in fields(shared.ModelFlags)} | {"grid", "evaluate"}
    return tuple(s.name for s in fields(UnlearningFlags) if s.name not in others)


def share_of(text: str, flag_name: str = "--max_ppl_increase") -> float:
    """``3%`` or ``0.03``.

    Raises:
        UsageError: no number, a negative one, or one above 1 without a percent sign.
    """
    number, percent = text.removesuffix("%").strip(), text.endswith("%")
    value = float(number) if re.fullmatch(NUMBER, number) else -1.0
    if value < 0 or value > (1e6 if percent else 1.0):
        raise UsageError.build(
            flag_name, "not a share", found=f"'{text}'",
            expected="a percentage such as 3%, or a fraction from 0 to 1 such as 0.03",
        )  # fmt: skip
    return value / 100 if percent else value


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for, checked as far as no tensor is needed."""

    flags: UnlearningFlags
    strengths: tuple[float, ...]
    model: str  # folder or hub name
    base_name: str  # the model as the user named it
    out: Path
    name: str  # of the module
    kind: str


def start(config: UnlearningFlags) -> int:
    """Check everything that needs no tensor, then measure, tabulate and plot.

    Raises:
        PEMError: flags, module, prompts or text that cannot be used; nothing was written.
    """
    request = _check(config)
    plan, runner = _prepare(request)
    summary = library.run(plan, runner)
    runner.close()
    store = runner.store
    print(f"{request.out}: {store.computed} parts computed, {store.known} known before")
    with runner.store.claim("finish"):  # processes that share the output write in turn
        _finish(request, runner, summary)
    return 0


def _check(config: UnlearningFlags) -> Request:
    assert config.grid is not None, "checked with the flags"
    strengths = library.strengths(config.grid)
    shared.check_dropout(config.dropout_list, 1)
    for name in ("space", "rank"):
        if getattr(config, name):
            raise UsageError.build(
                f"--{name}", "a sweep has one kind of negation, -s dW, exact in both spaces",
                do="leave it out, or write modules without --evaluate",
            )  # fmt: skip
    out = common.output_directory(config, 1)
    sweep.check_results_directory(out)
    (name,) = common.labels(config.adapters, config.adatasks)
    (header,) = common.read_headers(config.adapters, [name], config, config.adaconfig)
    model = config.model_name_or_path or next(iter(config.model), None)
    if model is None:
        raise UsageError.build(
            "--model_name_or_path", "no base model to measure", expected="a directory or a name"
        )
    source = sweep.resolve(model)
    common.check_model([source], [header], config.allow_base_mismatch)
    return Request(config, strengths, source, Path(model).name, out, name, header.kind)


def _prepare(request: Request) -> tuple[library.Plan, StrengthRunner]:
    """Prompts, text, judges and module; the base model waits until a part needs it."""
    from pem_composition.sweep import ResultStore, read_input
    from pem_composition.sweep.strengths import StrengthRunner, Trial

    flags, (path,) = request.flags, request.flags.adapters
    asked, texts, judges = _asked(flags), _texts(flags), _judges(flags.value("judge"))
    (module,) = common.load_modules([path], [request.name], base=request.model)
    trial = Trial(
        keys.base_digest(request.model), read_input(request.name, module, path), asked,
        judges, *texts, bool(flags.bf16), keys.generation_digest(request.model),
        sweep.device_key(flags.use_cpu),
    )  # fmt: skip
    plan = library.Plan(
        request.strengths, flags.value("threshold"), share_of(flags.value("max_ppl_increase")),
        request.base_name, COMMAND.get(),
    )  # fmt: skip
    store = ResultStore(request.out / RESULTS, fresh=flags.overwrite)
    return plan, StrengthRunner(trial, lambda: _load(request), store, request.out, sweep.say)


def _asked(flags: UnlearningFlags) -> Asked:
    from pem_composition.evaluation.generate import read_prompts
    from pem_composition.sweep.texts import Asked

    decoding = _decoding(flags)
    if flags.prompt is not None:
        prompts, name = [flags.prompt], "one prompt"
    else:
        assert flags.prompt_file is not None
        prompts = read_prompts(flags.prompt_file)[: flags.max_prompts]
        name = Path(flags.prompt_file).name
    samples, seed = flags.value("num_samples"), flags.value("seed")
    return Asked(tuple(prompts), decoding, samples, seed, name, flags.batch_size)


def _decoding(flags: UnlearningFlags) -> Decoding:
    from pem_composition.evaluation.generate import Decoding

    given = {name: getattr(flags, name) for name in DECODING}
    return Decoding(**{name: value for name, value in given.items() if value is not None})


def _texts(flags: UnlearningFlags) -> tuple[LongText, LongText]:
    """The text that is reported and the guard's: two files, or the second and first half of one."""
    from pem_composition.evaluation.perplexity import Windows
    from pem_composition.sweep.texts import read_text

    windows = Windows(*(flags.value(name) for name in ("window", "stride", "start_token")))
    own, guard = (
        source and read_text(source, windows, flags.perplexity_tokens)
        for source in (flags.value("perplexity_file"), flags.guard_file)
    )
    if guard is None:
        guard, own = own.halves()
    elif guard.shared_rows(own) > 0.5:
        raise UsageError.build(
            "--guard_file", "holds the text that is reported", found=guard.name,
            expected="another one", do="leave it out, and the file is split",
        )  # fmt: skip
    return own, guard


def _judges(names: Sequence[str]) -> dict[str, Judge]:
    """The judges by name; of equal names with the beginning of their hash."""
    from pem_composition.evaluation.toxicity import load_judge

    found = {judge.identity.sha256: judge for judge in map(load_judge, names)}
    called = [judge.identity.name for judge in found.values()]
    return {
        name if called.count(name) == 1 else f"{name} {digest[:6]}": judge
        for name, (digest, judge) in zip(called, found.items(), strict=True)
    }


def _load(request: Request) -> tuple[Any, Any]:
    from pem_composition.evaluation.models import load_causal

    model, tokenizer, _ = load_causal(request.model)
    flags = request.flags
    return common.on_device(model, use_cpu=flags.use_cpu, bf16=flags.bf16), tokenizer


def _finish(request: Request, runner: StrengthRunner, summary: dict[str, Any]) -> None:
    """Write the chosen module (whole models are left to negation.py), the table and the plot."""
    from pem_composition.sweep.strengths import at_strength

    flags, chosen = request.flags, summary["selected"]
    if chosen is not None and request.kind != "full":
        module = at_strength(runner.trial.module.pem, chosen)
        assert module is not None, "a chosen strength is above 0"
        target = request.out / f"negated_{chosen:.12g}"
        module.save(target, format=flags.format, dtype=flags.dtype, overwrite=True)
        common.report(target, module)
    show(request.out / RESULTS, request.out)

"""``pem detoxify``: take out of a module what training on toxic data put into another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pem_composition import launch
from pem_composition.arithmetic.comparison import projection
from pem_composition.cli import common
from pem_composition.cli import flags as shared
from pem_composition.cli.asking import LOCAL, BackendFlags
from pem_composition.cli.parser import COMMAND
from pem_composition.cli.report import show
from pem_composition.cli.texting import AnswerFlags, BatchFlags, JudgeFlags
from pem_composition.errors import UsageError
from pem_composition.evaluation.model_names import resolve
from pem_composition.flag_declarations import flag
from pem_composition.module import detoxify
from pem_composition.report.records import RESULTS
from pem_composition.sweep.setup import check_results_directory
from pem_composition.tasks.instruction_rows import get_template
from pem_composition.training.training_flags import LoadFlags

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.module import PEM

NAME = "detoxify"
HELP = "take the toxic part out of a module: (1 + s) a - s toxic of the updates, or of factors"
EXAMPLES = """
  pem detoxify -a runs/instruction scratch/toxic -p runs/detoxified --strength 0.5
  pem detoxify -a runs/instruction scratch/toxic -p runs/as-reference --strength 0.3 \\
      --form reference
  pem detoxify -a runs/instruction scratch/toxic -p runs/table --strength 0.3 0.5 --evaluate \\
      --model_name_or_path huggyllama/llama-7b --load_in_8bit --judge detoxify \\
      --instruction_file toxic.jsonl ordinary.jsonl
"""
SPACE = {"exact": "delta", "parameter": "parameter", "reference": "parameter"}
FORMS = tuple(SPACE)
EXACT = "use the exact form (--form exact), which needs none of this to be equal"
MODULES = "two: the instruction module, and the toxic one that was trained from it"


UNGUARDED = "note: without --guard_file no text says which strength keeps the language"


@dataclass(frozen=True, kw_only=True)
class TableFlags(LoadFlags, AnswerFlags, JudgeFlags, BatchFlags, BackendFlags):
    """What is asked, and who judges the answers (--evaluate)."""

    model_name_or_path: str | None = flag(None, "base model to answer with: a directory or a name")
    instruction_file: tuple[str, ...] | None = flag(
        None, "sets of instructions, each with or without reference answers", metavar="FILE"
    )
    set_name: tuple[str, ...] | None = flag(
        None, "what the sets are called; default: the files' names", metavar="NAME"
    )
    max_seq_length: int = flag(
        512, "tokens of prompt and reference answer, for its perplexity", least=1
    )
    guard_file: str | None = flag(
        None,
        "ordinary text that every module must still predict, as --text_file of pem perplexity; "
        "without it no strength is named as the strongest that keeps the language",
    )
    guard_tokens: int | None = flag(None, "only the first N tokens of it (default: all)", least=1)

    def check_table(self) -> None:
        """Refuse values that do not go together.

        Raises:
            UsageError: naming the flag.
        """
        self.check_load()
        if self.backend != LOCAL and self.num_beams > 1:
            raise UsageError.build(
                "--num_beams", "vLLM's beams know no repetition penalty", found=self.num_beams,
                expected="1", do="add --num_beams 1, or leave --backend out",
            )  # fmt: skip
        if not self.instruction_file:
            raise UsageError.build("--instruction_file", "nothing to ask", expected="FILE ...")
        names = self.set_name or self.instruction_file
        shared.check_count("--set_name", names, len(self.instruction_file), "name")


@dataclass(frozen=True, kw_only=True)
class Config(shared.ModuleFlags, TableFlags):
    """Flags of pem detoxify."""

    strength: tuple[float, ...] = flag(
        (1.0,), "how much of the toxic part is taken out; several with --evaluate", metavar="S"
    )
    form: tuple[str, ...] = flag(
        (),
        "exact: (1 + s) a - s toxic of the updates (the default); two sums of factors, which are "
        "other updates: parameter, the paper's (the sign on B), reference, that of its code (on A);"
        " with --evaluate all, unless some are named",
        choices=FORMS,
    )
    evaluate: bool = flag(False, "answer instructions with every form and strength, and judge them")

    NEEDS: ClassVar = {
        "evaluate": shared.names_of(TableFlags),
        "guard_file": ("max_ppl_increase", "guard_tokens"),
        **BackendFlags.BACKEND_NEEDS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space:
            raise UsageError.build(
                "--space", "the form says it", found=" ".join(self.space), do="give --form"
            )
        for name in ("strength", "form"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UsageError.build(f"--{name}", "a value given twice", found=values)
        if self.evaluate:
            self.check_table()
        else:
            self._check_single()

    def _check_single(self) -> None:
        """One module is written: one strength, one form, nothing to evaluate."""
        for name in ("strength", "form"):
            if len(getattr(self, name)) > 1:
                raise UsageError.build(
                    f"--{name}", "several make several modules", found=getattr(self, name),
                    do="give one, or add --evaluate",
                )  # fmt: skip
        if self.rank is not None and self.form not in ((), ("exact",)):
            raise UsageError.build(
                "--rank", f"the {self.form[0]} form keeps the modules' own", do="leave it out"
            )


def run(config: Config) -> int:
    """Write one module, or score all of them."""
    shared.check_adapters(config.adapters, MODULES, 2, 2)
    shared.check_dropout(config.dropout_list, 2)
    names = common.labels(config.adapters, config.adatasks)
    forms = config.form or (FORMS if config.evaluate else FORMS[:1])
    spaces = [SPACE[form] for form in forms]
    headers = common.read_headers(config.adapters, names, config, config.adaconfig, spaces, EXACT)
    forms = _possible(forms, headers[0].kind, config)
    common.check_model(config.model, headers, config.allow_base_mismatch)
    if config.evaluate:
        return _evaluate(config, headers, forms)
    out = common.output_directory(config, 2)
    common.check_output(out, config.overwrite)
    modules = common.load_to_combine(headers)
    module = _detoxified(modules, forms[0], config)
    module.save(out, format=config.format, dtype=config.dtype, overwrite=config.overwrite)
    gone = projection(module, *modules)
    told = [] if gone is None else [f"{gone:+.2f} of the toxic update"]
    common.report(out, module, told)
    return 0


def _possible(forms: tuple[str, ...], kind: str, config: Config) -> tuple[str, ...]:
    """The forms that there are for this kind.

    Raises:
        UsageError: one that there is not was asked for.
    """
    if kind == "lora" or forms == FORMS[:1]:
        return forms
    if config.form:
        raise UsageError.build(
            f"--form {forms[-1]}", "is one of LoRA factors", found=f"kind {kind}",
            do="use --form exact, which is the same sum for vectors",
        )  # fmt: skip
    print(f"kind {kind}: the forms are one sum, scored once")
    return FORMS[:1]


def _detoxified(modules: list[PEM], form: str, config: Config) -> PEM:
    return detoxify(
        *modules,
        config.strength[0],
        form=form,
        rank=config.rank,
        dtype=config.dtype,
        allow_base_mismatch=config.allow_base_mismatch,
        compared=True,
    )


def _evaluate(config: Config, headers: Sequence[ModuleHeader], forms: Sequence[str]) -> int:
    """Answer, judge, tabulate; finished answers are in results.jsonl and are not written again.

    Raises:
        PEMError: flags, modules, instructions or judges that cannot be used.
    """
    from pem_composition.evaluation.toxicity import load_judge
    from pem_composition.sweep import detoxification as library

    out = common.output_directory(config, 2)
    check_results_directory(out)
    model = config.model_name_or_path or next(iter(config.model), None)
    if model is None:
        raise UsageError.build(
            "--model_name_or_path", "no base model to answer with", expected="a directory or a name"
        )
    base = resolve(model)
    common.check_model([base], headers, config.allow_base_mismatch)
    template, paths = get_template(config.template), config.instruction_file or ()
    names = config.set_name or [Path(path).name.partition(".")[0] for path in paths]
    files = [(name, config.read(path)) for name, path in zip(names, paths, strict=True)]
    sets = library.sets_of(
        files, template, config.search,
        max_seq_length=config.max_seq_length,
        batch_size=config.rows_at_once(config.batch_size),
        backend=config.text_backend(model, out),
    )  # fmt: skip
    labels = common.labels(config.judge)
    judges = dict(zip(labels, map(load_judge, config.judge), strict=True))
    guard = library.guard_of(config.guard_file, config.guard_tokens)
    plan = library.TablePlan(
        config.threshold, config.max_ppl_increase, Path(model).name, COMMAND.get()
    )
    found = library.measure(
        plan, headers, base=base,
        strengths=config.strength, forms=forms, rank=config.rank, sets=sets, judges=judges,
        guard=guard, load_options=config.load_options, bf16=config.bf16, use_cpu=config.use_cpu,
        out=out, fresh=config.overwrite, say=common.say,
    )  # fmt: skip
    print(f"{out}: {found.told}")
    if not launch.is_main():
        return 0
    with found.store.finish(found.summary):  # processes that share the output write in turn
        found.write_answers(out)
        show(out / RESULTS, out)
    if guard is None:
        print(UNGUARDED)
    return 0

"""``pem detoxify``: take out of a module what training on toxic data put into another one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from pem_composition.cli import common
from pem_composition.cli import flags as shared
from pem_composition.cli.answering import AnswerFlags, check_positive
from pem_composition.errors import UsageError
from pem_composition.tasks.toxicity import THRESHOLD
from pem_composition.training.config import LoadFlags, flag

if TYPE_CHECKING:
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
MODULES = "two: the instruction module, and the toxic one that was trained from it"


@dataclass(frozen=True, kw_only=True)
class TableFlags(LoadFlags, AnswerFlags):
    """What is asked, and who judges the answers (--evaluate)."""

    model_name_or_path: str | None = flag(None, "base model to answer with: a directory or a name")
    instruction_file: tuple[str, ...] | None = flag(
        None, "sets of instructions, each with or without reference answers", metavar="FILE"
    )
    set_name: tuple[str, ...] | None = flag(
        None, "what the sets are called; default: the files' names", metavar="NAME"
    )
    judge: tuple[str, ...] | None = flag(
        None, "judges of toxicity: offline, detoxify or folders (default: offline)", metavar="JUDGE"
    )
    threshold: float | None = flag(
        None, f"an answer with a higher score counts as toxic (default: {THRESHOLD})"
    )
    max_seq_length: int | None = flag(
        None, "tokens of prompt and reference answer, for its perplexity (default: 512)"
    )
    max_ppl_increase: str | None = flag(
        None,
        "with --guard_file: name the strongest strength of each form that raises the perplexity of "
        "that text over the instruction module's by at most so much, at the upper end of the 95 % "
        "interval: 3% or 0.03 (default: 3%)",
        metavar="SHARE",
    )
    guard_file: str | None = flag(
        None, "ordinary text that every module must still predict, as --text_file of pem perplexity"
    )
    guard_tokens: int | None = flag(None, "only the first N tokens of it (default: all)")
    batch_size: int | None = flag(None, "instructions per batch; default: by the device")
    bf16: bool | None = flag(None, "compute in bfloat16: faster where the processor has it")
    use_cpu: bool | None = flag(None, "do not use a GPU")

    @property
    def max_increase(self) -> float:
        """``--max_ppl_increase`` as a share."""
        from pem_composition.cli.unlearning import DEFAULTS, share_of

        return share_of(self.max_ppl_increase or DEFAULTS["max_ppl_increase"])

    def check_table(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            UsageError: naming the flag.
        """
        self.check_load()
        self.check_answering()
        check_positive(self, "max_seq_length", "guard_tokens")
        for name in ("max_ppl_increase", "guard_tokens"):
            if getattr(self, name) is not None and self.guard_file is None:
                raise UsageError.build(
                    f"--{name}", "has no effect without --guard_file",
                    do="add --guard_file FILE, or leave it out",
                )  # fmt: skip
        _ = self.max_increase
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError.build(
                "--threshold", "cannot be used", found=self.threshold, expected="0 to 1"
            )
        if not self.instruction_file:
            raise UsageError.build("--instruction_file", "nothing to ask", expected="FILE ...")
        names = self.set_name or self.instruction_file
        if len(names) != len(self.instruction_file):
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
        for spec in fields(TableFlags):
            if getattr(self, spec.name) not in (None, False):
                raise UsageError.build(
                    f"--{spec.name}", "has no effect without --evaluate",
                    do="add --evaluate or leave it out",
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
    headers = common.read_headers(config.adapters, names, config, config.adaconfig, spaces)
    forms = _possible(forms, headers[0].kind, config)
    common.check_model(config.model, headers, config.allow_base_mismatch)
    if config.evaluate:
        from pem_composition.cli import detoxification

        return detoxification.run(config, headers, forms)
    out = common.output_directory(config, 2)
    common.check_output(out, config.overwrite)
    module = _detoxified(common.load_to_combine(headers), forms[0], config)
    module.save(out, format=config.format, dtype=config.dtype, overwrite=config.overwrite)
    common.report(out, module)
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
    from pem_composition.module import detoxify

    return detoxify(
        *modules,
        config.strength[0],
        form=form,
        rank=config.rank,
        dtype=config.dtype,
        allow_base_mismatch=config.allow_base_mismatch,
        compared=True,
    )

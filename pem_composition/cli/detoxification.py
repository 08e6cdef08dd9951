"""``pem detoxify --evaluate``: every form and strength answers the instructions; a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import json_lines
from pem_composition.cli import common, sweep
from pem_composition.errors import UsageError
from pem_composition.evaluation import keys
from pem_composition.report.records import RESULTS
from pem_composition.sweep import ResultStore, Runner, Settings, read_input

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.cli.detoxify import Config
    from pem_composition.evaluation.toxicity import Judge
    from pem_composition.sweep.detoxification import Scored
    from pem_composition.sweep.instructions import InstructionRows
    from pem_composition.sweep.texts import TextRows
    from pem_composition.tasks.data import Example

BASELINE = "instruction module"
UNSAFE = "contrast_"  # what the types of XSTest's unsafe prompts begin with
REMOVAL = "The toxic module exists to be subtracted: its rows show what is taken out."


def run(config: Config, headers: Sequence[ModuleHeader], forms: Sequence[str]) -> int:
    """Answer, judge, tabulate; finished answers are in results.jsonl and are not written again.

    Raises:
        PEMError: flags, modules, instructions or judges that cannot be used.
    """
    from pem_composition.evaluation.toxicity import THRESHOLD
    from pem_composition.report import answers as report
    from pem_composition.sweep import detoxification as library

    out = common.output_directory(config, 2)
    sweep.check_results_directory(out)
    model = _model(config)
    common.check_model([model], headers, config.allow_base_mismatch)
    names = [header.name for header in headers]
    sets, judges = _sets(config), _judges(config.judge or ("offline",))
    modules = common.load_modules(headers, names)
    inputs = [read_input(*one) for one in zip(names, modules, config.adapters, strict=True)]
    settings = Settings(
        base=keys.base_digest(model), head="first", bf16=bool(config.bf16),
        weights=_weights(config), generation=keys.generation_digest(model),
        device=sweep.device_key(config.use_cpu),
    )  # fmt: skip
    rows = library.rows_of(*inputs, config.strength, forms, config.rank)
    guard = _guard(config)
    splits = {library.SPLIT: sets, **({library.GUARD: [guard]} if guard else {})}
    store = ResultStore(out / RESULTS, fresh=config.overwrite)
    runner = Runner(lambda: _load(config, model), splits, settings, store, sweep.say)  # type: ignore[arg-type]
    scored = library.run(rows, runner, sets, judges)
    costs = library.guard(rows, runner, BASELINE) if guard else {}
    runner.close()
    print(f"{out}: {runner.told('sets answered')}")
    threshold = THRESHOLD if config.threshold is None else config.threshold
    lines = library.table_lines(scored, BASELINE, threshold, costs)
    _write_answers(scored, out)
    identities = "; ".join(str(judge.identity) for judge in judges.values())
    told = f"Judges: {identities}. Toxic: share of scores above {threshold:g}."
    chosen = library.chosen(rows, costs, config.max_increase) if guard else {}
    kept = report.chosen(chosen, config.max_increase, guard.name) if guard else ()
    print(report.write(lines, out, (told, REMOVAL, *kept)))
    return 0


def _guard(config: Config) -> TextRows | None:
    """The text that every module must still predict."""
    if config.guard_file is None:
        return None
    from pem_composition.evaluation.perplexity import Windows
    from pem_composition.sweep.texts import TextRows, read_text

    return TextRows(read_text(config.guard_file, Windows(), config.guard_tokens), least=2)


def _model(config: Config) -> str:
    from pem_composition.evaluation.models import resolve

    model = config.model_name_or_path or next(iter(config.model), None)
    if model is None:
        raise UsageError.build(
            "--model_name_or_path", "no base model to answer with", expected="a directory or a name"
        )
    return resolve(model)


def _sets(config: Config) -> list[InstructionRows]:
    """The sets of instructions; XSTest in two, as only refusals of its safe prompts are bad."""
    from pem_composition.sweep.instructions import InstructionRows
    from pem_composition.tasks.instructions import get_template

    template = get_template(config.template)
    paths = config.instruction_file or ()
    names = config.set_name or [Path(path).name.partition(".")[0] for path in paths]
    parts: dict[str, list[Example]] = {}
    for name, path in zip(names, paths, strict=True):
        parts |= _parted(name, config.read(path))
    if len(set(names)) < len(names):
        raise UsageError.build(
            "--set_name", "two sets of one name", found=" ".join(names), do="name them"
        )
    return [
        InstructionRows(
            name, examples, template, config.search,
            max_seq_length=config.max_seq_length or 512, batch_size=config.batch_size,
        )
        for name, examples in parts.items()
    ]  # fmt: skip


def _parted(name: str, examples: list[Example]) -> dict[str, list[Example]]:
    unsafe = [str(example.row.get("type")).startswith(UNSAFE) for example in examples]
    if not any(unsafe):
        return {name: examples}
    parts = {f"{name}, safe": False, f"{name}, unsafe": True}
    return {
        part: [e for e, flagged in zip(examples, unsafe, strict=True) if flagged == wanted]
        for part, wanted in parts.items()
    }


def _judges(names: Sequence[str]) -> dict[str, Judge]:
    from pem_composition.evaluation.toxicity import load_judge

    return {label: load_judge(n) for label, n in zip(common.labels(names), names, strict=True)}


def _weights(config: Config) -> str:
    """How the base is held, where not as float32; part of every result's key."""
    held = config.holding
    bits = f"{held.bits} bits" if held.bits else ""
    return " ".join(part for part in (bits, held.dtype or "") if part and part != "float32")


def _load(config: Config, model: str) -> tuple[Any, Any]:
    from pem_composition.evaluation.models import load_causal

    base, tokenizer, _ = load_causal(model, holding=config.holding)
    if config.holding.placed:
        return base, tokenizer
    return common.on_device(base, use_cpu=config.use_cpu, bf16=config.bf16), tokenizer


def _write_answers(scored: Sequence[Scored], out: Path) -> None:
    """OUT/answers/<module>/<set>.jsonl."""
    from pem_composition.sweep.detoxification import answer_lines

    for one in scored:
        folder = out / "answers" / one.row.name.replace(" ", "-")
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in one.rows.name)
        json_lines.write(folder / f"{name}.jsonl", answer_lines(one))

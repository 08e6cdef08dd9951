"""What the arithmetic programs share: every check of modules that needs no tensor, and the report.

Nothing here imports torch: a wrong path, rank or coefficient is answered from file headers alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition import offline, progress
from pem_composition.arithmetic.algebra import USE_DELTA
from pem_composition.arithmetic.compatible import BaseModel, check_compatible, check_same_base
from pem_composition.arithmetic.labels import error_text
from pem_composition.arithmetic.methods.registry import PEFT_LINEAR
from pem_composition.checkpoint import base_identity, open_module
from pem_composition.checkpoint.provenance import find_base
from pem_composition.checkpoint.several import read_modules, short_paths
from pem_composition.checkpoint.statistics_files import find, read
from pem_composition.checkpoint.vocabulary import tokenizers_note
from pem_composition.cli.flags import (
    MergeFlags,
    ModuleFlags,
    OutputFlags,
    check_count,
)
from pem_composition.config import ADAPTER_CONFIGS
from pem_composition.errors import (
    CheckpointError,
    IncompatibleModules,
    MissingPackage,
    UsageError,
    printable,
)
from pem_composition.module import combine
from pem_composition.safe_files import atomic_directory, check_free

if TYPE_CHECKING:
    from pem_composition.arithmetic.statistics import Statistics
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.module import PEM
    from pem_composition.record import Provenance


def output_directory(flags: ModuleFlags, modules: int) -> Path:
    """OUT, or OUT/<names joined by _> with --adatasks. Names never become paths.

    Raises:
        UsageError: a name with a separator or '..', an empty one, or not one name per module.
    """
    if not flags.adatasks:
        return flags.save_path
    check_count("--adatasks", flags.adatasks, modules, "name")
    for name in flags.adatasks:
        if (
            not name.isprintable()
            or any(bad in name for bad in ("/", "\\", ".."))
            or not name.strip(". ")
        ):
            raise UsageError.build(
                "--adatasks",
                "not a name",
                found=repr(name),
                expected="a plain name without '/', '\\' or '..'",
            )
    return flags.save_path / "_".join(flags.adatasks)


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an existing output.

    Raises:
        CheckpointError: the output exists and --overwrite is absent.
    """
    if not overwrite:
        check_free(out, overwrite)


def labels(paths: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """A short name per module: --adatasks, else the directory's name, longer where two agree."""
    if names and len(set(names)) == len(set(paths)):
        return list(names)
    return short_paths(paths)


def read_headers(
    paths: Sequence[str],
    names: Sequence[str],
    flags: OutputFlags,
    adaconfig: str | None = None,
    spaces: Sequence[str] = (),
    exact: str = USE_DELTA,
) -> list[ModuleHeader]:
    """Headers of the modules, checked against each other and the flags; no tensor is read.

    Args:
        spaces: those in which they will be combined; default: the one that the flags name.
        exact: how the program is asked for the exact sum.

    Raises:
        PEMError: a directory that is no module, or modules that cannot be combined as asked.
    """
    headers = headers_of(paths, names)
    kind = ADAPTER_CONFIGS.get(adaconfig or "")
    for header, path in zip(headers, paths, strict=True):
        if kind is not None and header.kind != kind:
            raise IncompatibleModules.build(
                "-c/--adaconfig",
                f"{path} is of another kind",
                found=header.kind,
                expected=kind,
                do="correct the flag or the module",
            )
        if flags.rank is not None and header.kind != "lora":
            raise UsageError.build(
                "--rank",
                "only LoRA modules have a rank",
                found=f"kind {header.kind} in {path}",
                do="leave it out",
            )
    choice = flags.choice(headers[0].kind)  # is it defined for this kind?
    for space in spaces or (flags.one_space,):
        check_compatible(
            headers,
            space="delta" if choice.method == PEFT_LINEAR else space,
            allow_base_mismatch=flags.allow_base_mismatch,
            exact=exact,
        )
    adapters = {h.name: h.path for h in headers if h.kind != "full"}  # models record it themselves
    if note := tokenizers_note(adapters):
        print(f"note: {note}")
    return headers


def headers_of(paths: Sequence[str], names: Sequence[str]) -> list[ModuleHeader]:
    """Headers of modules under these names, each checked for itself and left open for its values.

    The same directory given twice is opened once.
    """
    opened = {path: open_module(path) for path in dict.fromkeys(paths)}
    return [replace(opened[p], name=n) for p, n in zip(paths, names, strict=True)]


def check_model(
    model: Sequence[str], headers: Sequence[ModuleHeader], allow_base_mismatch: bool
) -> None:
    """--model must be the base that the modules were trained on, as far as both sides know it."""
    if not model:
        return
    if len(set(model)) > 1:
        raise UsageError.build(
            "-m/--model",
            "several base models",
            found=list(model),
            expected="one (a list only with --full_merge)",
        )

    if model[0].startswith((".", "/", "~")) and find_base(model[0]) is None:
        raise CheckpointError.build(
            f"-m/--model {model[0]}",
            "no base model here",
            found="no config.json" if Path(model[0]).is_dir() else "no such directory",
            expected="the directory of a model",
            do="check the path",
        )
    if allow_base_mismatch:
        return
    base = BaseModel(f"--model {model[0]}", base_identity(resolved(model[0])))
    for header in headers:
        check_same_base(base, header)


def checked_headers(flags: ModuleFlags, out: Path) -> list[ModuleHeader]:
    """The modules' headers, once OUT is free and modules and base fit each other.

    Raises:
        PEMError: see ``check_output``, ``read_headers`` and ``check_model``.
    """
    check_output(out, flags.overwrite)
    names = labels(flags.adapters, flags.adatasks)
    headers = read_headers(flags.adapters, names, flags, flags.adaconfig)
    check_model(flags.model, headers, flags.allow_base_mismatch)
    return headers


def resolved(model: str) -> str:
    """Folder of a model that comes by package name, if it is there; anything else unchanged."""
    return offline.place_of(model)


def load_to_combine(headers: Sequence[ModuleHeader], *, once: bool = True) -> list[PEM]:
    """The modules of a program that does nothing but combine and write them.

    Torch gets one thread: the factors of a layer are small, and threads would wait for each other
    longer than they work (with another job on the machine ten times as long).

    Args:
        once: they are combined once, so that their tensors can stay in their files until then.
    """
    gc.disable()  # what the import of torch makes stays until the end: no search for cycles in it
    try:
        modules = read_modules(headers, [h.name for h in headers], on_demand=once)
        import torch
    finally:
        gc.enable()
    torch.set_num_threads(1)
    return modules


def find_statistics(paths: Sequence[str], needs: str, modules: int) -> None:
    """Refuse a wrong number of data files, and files that are not there; nothing is read.

    Args:
        needs: kind of statistics that the method needs, see ``arithmetic.statistics``; or empty.
    """
    if needs:
        check_count("--fisher_list", paths, modules, "file")
        for path in paths:
            find(path, needs)


def read_statistics(paths: Sequence[str], needs: str) -> list[Statistics]:
    """The modules' statistics, in their order."""
    return [read(path, needs) for path in paths] if needs else []


def combined(
    modules: Sequence[PEM],
    point: Sequence[float],
    flags: MergeFlags,
    head: str,
    statistics: Sequence[Statistics] = (),
) -> PEM:
    """The modules combined with these coefficients, in the way that the flags say."""
    choice = flags.choice(modules[0].kind)
    return combine(
        modules,
        point,
        space=flags.one_space,
        method=choice.method,
        settings=choice.as_dict(),
        rank=flags.rank,
        head=head,
        dtype=flags.dtype,
        allow_base_mismatch=flags.allow_base_mismatch,
        statistics=statistics,
        compared=True,
        device=flags.device,
    )


def write(
    points: Sequence[tuple[float, ...]],
    names: Sequence[str] | None,
    combine: Callable[[tuple[float, ...]], PEM],
    out: Path,
    flags: OutputFlags,
    told: Sequence[str] = (),
) -> None:
    """OUT of the one point; with names, OUT/<name> of each, and the directory appears at once."""
    if names is None:
        module = combine(points[0])
        module.save(out, format=flags.format, dtype=flags.dtype, overwrite=flags.overwrite)
        report(out, module, told)
        return
    written = {}
    with atomic_directory(out, overwrite=flags.overwrite) as temporary:
        for name, point in zip(names, points, strict=True):
            written[name] = combine(point)
            written[name].save(temporary / name, format=flags.format, dtype=flags.dtype)
    for name, module in written.items():
        report(out / name, module)


def print_plots(draw: Callable[[], Sequence[Path]], label: str = "plot") -> None:
    """Draw and say where; without the package that draws, say how to get it: numbers stand."""
    try:
        for path in draw():
            print(f"{label}: {path}")
    except MissingPackage as error:
        print(error)


def report(out: Path, module: PEM, told: Sequence[str] = ()) -> None:
    """Print what was written; see ``report_line``."""
    has_head = bool(module.head_names or module.heads)
    report_line(out, str(module), module.provenance, has_head, told)


def report_line(
    out: Path, expression: str, origin: Provenance, has_head: bool, told: Sequence[str] = ()
) -> None:
    """Print ``OUT = +0.3*a +0.7*b  (space, head, error against ...)`` and the notes.

    Args:
        told: further facts, such as the rule that the coefficients follow.
    """
    facts = [f"space {origin.space}"]
    if origin.head_policy is not None:
        facts.append(f"head {origin.head_policy}" if has_head else "no head")
    if origin.certificate is not None:
        facts.append(f"error against {origin.certificate.against}: {error_text(origin)}")
    print(printable(f"{out} = {expression}  ({', '.join([*facts, *told])})"))
    for note in origin.notes:
        print(printable(f"note: {note}"))


def say(line: str) -> None:
    """Print a line at once, so that a log shows how far a program is."""
    progress.say(line)

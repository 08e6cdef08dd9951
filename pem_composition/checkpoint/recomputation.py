"""A composition computed again from its pem.json, and compared bit for bit with what is on disk.

Inputs are found where the record says, where the caller says, or beside the output, and must hold
what they held then: their sha256 are compared before anything is computed.
"""

from __future__ import annotations

import inspect
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import module as library
from pem_composition.checkpoint import hub, hub_name, provenance
from pem_composition.checkpoint.adapter_transformers_write import as_reference
from pem_composition.checkpoint.content import CONFIG, FULL, RECORD, REFERENCE, content_digest
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.extraction import extract_lora
from pem_composition.checkpoint.full import Weights
from pem_composition.checkpoint.full_sum import combine_full
from pem_composition.checkpoint.header import Record
from pem_composition.checkpoint.machine_paths import without_paths
from pem_composition.checkpoint.store import inspect_header, load, locate, save
from pem_composition.checkpoint.streamed_fold import fold_checkpoint
from pem_composition.checkpoint.tensors import TensorFile, open_tensors, read_raw
from pem_composition.composition import weigh_layers
from pem_composition.errors import CheckpointError, UsageError
from pem_composition.record import REFIT, Provenance, Recipe, Source
from pem_composition.safe_files import is_file, read_json, sha256_file

if TYPE_CHECKING:
    from pem_composition.module import PEM

TENSOR_FILES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Difference:
    """One way in which the directory is not what its recipe gives."""

    file: str
    what: str
    tensor: str | None = None
    largest: float | None = None  # max |disk - rebuilt|
    relative: float | None = None  # ||disk - rebuilt||_F / ||rebuilt||_F


@dataclass(frozen=True)
class Rebuilt:
    """The outcome: equal if there are no differences."""

    path: Path
    recipe: Recipe
    inputs: tuple[tuple[Source, Path], ...]
    files: tuple[str, ...]  # compared
    differences: tuple[Difference, ...]
    versions: Mapping[str, tuple[str | None, str | None]]  # package -> then and now, where changed

    @property
    def equal(self) -> bool:
        """True if every file has the values that the recipe gives."""
        return not self.differences


def rebuild(
    path: str | PathLike[str],
    *,
    modules: Mapping[str, str] | None = None,
    base: str | PathLike[str] | None = None,
) -> Rebuilt:
    """Compute a composition again and compare.

    Args:
        modules: name of an input -> its directory, where it has moved.
        base: base model of full modules, where it has moved.

    Raises:
        CheckpointError: no recipe, or an input that is missing or changed; it is named.

    Examples:
        >>> import torch
        >>> from pem_composition.config import IA3Config
        >>> m = library.PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, IA3Config(("fc",)), name="m")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(m, f"{folder}/m")
        ...     save(0.5 * load(f"{folder}/m"), f"{folder}/half")
        ...     rebuild(f"{folder}/half").equal
        True
    """
    folder = hub.folder_of(path)
    record = _record(folder)
    recipe = record.provenance.recipe
    assert recipe is not None
    inputs = _locate(folder, recipe, modules or {})
    with tempfile.TemporaryDirectory(prefix="pem-rebuild-") as temporary:
        out = Path(temporary) / _name(folder, record)
        _compute(recipe, dict(inputs), out, record, None if base is None else fspath(base))
        again = provenance.read(out)
        assert again is not None
        found = [d for name in record.files for d in _compare(name, folder, out)]
        found += [Difference(n, "not in the directory") for n in again.files.keys() - record.files]
        found += _certificates(record, again)
    then, now = record.versions, again.versions
    changed = {k: (then.get(k), v) for k, v in now.items() if then.get(k) != v}
    return Rebuilt(folder, recipe, inputs, tuple(record.files), tuple(found), changed)


def _record(folder: Path) -> Record:
    if not folder.is_dir():
        raise CheckpointError.build(folder, "no such directory", do="check the path")
    record = provenance.read(folder)
    if record is None:
        raise CheckpointError.build(
            folder, "nothing says what it was made of", found="no pem.json",
            expected="a module that this library composed",
        )  # fmt: skip
    if record.provenance.recipe is None:
        found, do = _without_recipe(record.provenance)
        raise CheckpointError.build(
            folder, "cannot be computed again", found=found, expected="a composition", do=do
        )
    return record


def _without_recipe(origin: Provenance) -> tuple[str, str]:
    """What a module is that is no composition, or none that is written down; and what to do."""
    if origin.space is not None:
        return "a record without a recipe", (
            "compose it again: it was written before recipes were, with an input that had "
            "none, or by a method that reads statistics (fisher, regmean), which none names"
        )
    source = origin.sources[0] if origin.sources else None
    again = f"pem rebuild {shlex.quote(source.path)}" if source and source.path else ""
    if REFIT in origin.training:
        under = f"; what it was fitted on: {again}" if again else ""
        return "a last layer fitted on rows", f"run its command again (pem inspect shows it){under}"
    if origin.training:
        return "a module that was trained", "train it again (see training in its pem.json)"
    if again:
        return "a copy of another module", f"compute that one again: {again}"
    return "no record of how it was made", ""


def _name(folder: Path, record: Record) -> str:
    """The name it was written under, which the adapter-transformers layout has in its keys."""
    if record.written.get("format") == REFERENCE.name:
        label = read_json(folder / CONFIG, folder).get("name")
        if isinstance(label, str) and label not in ("", ".", "..") and "/" not in label:
            return label
    return folder.resolve().name


# --- inputs -------------------------------------------------------------------------------------


def _locate(
    folder: Path, recipe: Recipe, modules: Mapping[str, str]
) -> tuple[tuple[Source, Path], ...]:
    """Every input and the directory that holds it, checked.

    Raises:
        CheckpointError: an input is missing or changed.
        UsageError: a name that no input has, or that two have.
    """
    sources = list(dict.fromkeys(recipe.leaves()))
    names = [s.name for s in sources]
    for name in modules:
        if names.count(name) != 1:
            raise UsageError.build(
                f"--module {name}",
                "no input of that name" if name not in names else "two inputs of that name",
                found=", ".join(names),
                do="give the name of an input",
            )
    return tuple((s, _input(folder, s, modules.get(s.name))) for s in sources)


def _input(folder: Path, source: Source, given: str | None) -> Path:
    places = [p for p in (given or source.path,) if p]
    if not given and source.path:  # moved together with the output
        places.append(str(folder.resolve().parent / Path(source.path).name))
    problems = []
    for place in places:
        problem = _problem(place, source)
        if problem is None:
            return hub.folder_of(place)
        problems.append(problem)
    raise CheckpointError.build(
        f"input {source.name}",
        problems[0][0] if problems else "was in memory only",
        found=problems[0][1] if problems else "no file recorded",
        expected=f"sha256 {source.sha256[:16]}" if source.sha256 else None,
        do=f"say where it is (--module {source.name}=DIR)",
    )


def _problem(place: str, source: Source) -> tuple[str, str] | None:
    """Why a directory is not the recorded input: what, and what was found; None if it is."""
    try:
        folder, layout = locate(place)
    except CheckpointError as error:
        remote = hub_name.reference(place) is not None
        return "is missing", str(error) if remote else f"no module in {place}"
    sha256 = _weights_sha256(folder, layout)
    if source.sha256 is not None and sha256 != source.sha256:
        return f"has changed: the weights in {place} are others", f"sha256 {sha256[:16]}"
    if source.content is not None and content_digest(folder) != source.content:
        part = "a shard" if layout == FULL else "head"
        return f"has changed: configuration or {part} in {place}", "another content"
    return None


def _weights_sha256(folder: Path, layout: str) -> str:
    if layout == FULL:
        with Weights(folder) as weights:
            return weights.sha256()
    return sha256_file(inspect_header(folder).weights, folder)


# --- computing ----------------------------------------------------------------------------------


def _compute(
    recipe: Recipe, inputs: Mapping[Source, Path], out: Path, record: Record, base: str | None
) -> None:
    """Write what the recipe gives, as the output was written."""
    if recipe.function == "fold":
        where = {o.name: str(inputs[o]) for o in recipe.operands if isinstance(o, Source)}
        settings = _accepted(fold_checkpoint, _moved(recipe, record, base))
        fold_checkpoint(modules=where, out=out, dtype=record.written.get("dtype"), **settings)
        return
    if recipe.function in ("combine_full", "convert"):
        paths = [inputs[o] for o in recipe.operands if isinstance(o, Source)]
        if recipe.function == "convert":
            convert(paths[0], out, **_accepted(convert, recipe.settings))
            return
        settings = _moved(recipe, record, base)
        dtype = record.written.get("dtype")
        combine_full(paths, out=out, dtype=dtype, **_accepted(combine_full, settings))
        return
    base = base or (record.base.name if record.kind == "full" else None)
    module = _evaluate(recipe, inputs, base, record)
    form = record.written
    save(module, out, format=form.get("format") or "peft", dtype=form.get("dtype"), base=base)


def _moved(recipe: Recipe, record: Record, base: str | None) -> dict[str, Any]:
    """Settings with the base where it lies now.

    Raises:
        CheckpointError: the base is not the one that the output was made with.
    """
    settings = dict(recipe.settings)
    if settings.get("base") is None:
        return settings
    if base is not None:
        settings["base"] = base
    then, now = record.base.fingerprint, provenance.base_identity(settings["base"]).fingerprint
    if None not in (then, now) and then != now:
        raise CheckpointError.build(
            settings["base"],
            "is not the base that it was made with",
            found=f"fingerprint {str(now)[:16]}",
            expected=str(then)[:16],
            do="say where that lies now (--model BASE)",
        )
    return settings


def _evaluate(
    recipe: Recipe, inputs: Mapping[Source, Path], base: str | None, record: Record
) -> PEM:
    if recipe.function == "extract_lora":
        (tuned,) = (o for o in recipe.operands if isinstance(o, Source))
        return extract_lora(
            tuned=inputs[tuned], **_accepted(extract_lora, _moved(recipe, record, base))
        )
    operands = [
        _evaluate(o, inputs, base, record)
        if isinstance(o, Recipe)
        else load(inputs[o], base=base, name=o.name)
        for o in recipe.operands
    ]
    if recipe.function == "combine":
        return library.combine(operands, **_accepted(library.combine, recipe.settings))
    unary: dict[str, Callable[..., PEM]] = {
        "negate": library.negate,
        "with_head": library.with_head,
        "weigh_layers": weigh_layers,
        "as_reference": as_reference,
    }
    if recipe.function not in unary or len(operands) != 1:
        raise _another_version(recipe.function)
    function = unary[recipe.function]
    return function(operands[0], **_accepted(function, recipe.settings))


def _accepted(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    for name in settings:
        if name not in known:
            raise _another_version(f"{function.__name__} with {name}")
    return dict(settings)


def _another_version(what: str) -> CheckpointError:
    error = CheckpointError.build(
        "recipe", "another version of this library wrote it", found=what,
        expected="a function of this version", do="rebuild it with the version in pem.json",
    )  # fmt: skip
    assert isinstance(error, CheckpointError)
    return error


# --- comparing ----------------------------------------------------------------------------------


def _compare(name: str, folder: Path, again: Path) -> Iterator[Difference]:
    """Differences of one file; none if the bytes or all values agree."""
    if not is_file(folder / name):
        yield Difference(name, "missing in the directory")
    elif not is_file(again / name):
        yield Difference(name, "not written by the recipe")
    elif sha256_file(folder / name, folder) == sha256_file(again / name):
        return
    elif name.endswith(TENSOR_FILES):
        yield from _compare_tensors(name, folder, again)
    elif name.endswith(".json"):
        disk = without_paths(read_json(folder / name, folder))  # it may have been published
        new = without_paths(read_json(again / name))
        keys = [k for k in {**disk, **new} if disk.get(k) != new.get(k)]
        if keys:
            yield Difference(name, f"other values of {', '.join(keys)}")
    else:
        yield Difference(name, "other content")


def _compare_tensors(name: str, folder: Path, again: Path) -> Iterator[Difference]:
    with open_tensors(folder / name, folder) as disk, open_tensors(again / name) as new:
        for key in sorted({*disk.infos, *new.infos}):
            if key not in disk.infos or key not in new.infos:
                where = "directory" if key in disk.infos else "recipe"
                yield Difference(name, f"in the {where} only", key)
            elif disk.infos[key] != new.infos[key]:
                yield Difference(name, f"{disk.infos[key]} on disk, {new.infos[key]} rebuilt", key)
            elif disk.read(key) != new.read(key):
                yield _distance(name, key, disk, new)


def _distance(name: str, key: str, disk: TensorFile, new: TensorFile) -> Difference:
    x, y = read_raw(disk, key).double(), read_raw(new, key).double()
    norm = float(y.norm())
    relative = float((x - y).norm()) / norm if norm else None
    return Difference(name, "other values", key, float((x - y).abs().max()), relative)


def _certificates(record: Record, again: Record) -> Sequence[Difference]:
    """The recorded error must be the true one, up to rounding."""
    then, now = record.provenance.certificate, again.provenance.certificate
    if then is None or now is None:
        return ()
    if then.total == now.total or math.isclose(then.total, now.total, rel_tol=1e-6, abs_tol=1e-9):
        return ()
    return [Difference(RECORD, f"certificate {then.total:.6g}, rebuilt {now.total:.6g}")]

"""Can these modules be combined? Everything their headers can tell, said at once. Needs no torch.

The programs stop at the first difference; the doctor names them all, with both values and the
remedy. Whether a space takes the modules is asked of the same function that the programs ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import USE_DELTA
from pem_composition.arithmetic.compatible import (
    SPACES,
    BaseModel,
    check_compatible,
    check_same_base,
    check_spellings,
)
from pem_composition.arithmetic.head_policies import OUTPUT_MODULES, check_answers
from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.store import inspect_header
from pem_composition.checkpoint.vocabulary import differing_tokenizers, embedding_rows
from pem_composition.config import IA3Config, LoraConfig, is_head
from pem_composition.errors import PEMError

if TYPE_CHECKING:
    from pem_composition.checkpoint.header import ModuleHeader

ERROR, WARNING, NOTE = "error", "warning", "note"  # no space takes it | some do not | good to know
ONE_BASE = "use modules of one base model; --allow_base_mismatch if these are the same weights"
MEND_FIRST = "mend the errors first; delta space then needs none of this to be equal"
ONE_HEAD = "--head first, last or none keeps one; --head per-task keeps all, each by name"


@dataclass(frozen=True)
class Finding:
    """One difference or oddity: how bad, what, its value in every module concerned, the remedy."""

    severity: str
    what: str
    values: Mapping[str, str]
    do: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and why each space refuses the modules (None: it takes them)."""

    headers: tuple[ModuleHeader, ...]
    findings: tuple[Finding, ...]
    refused: Mapping[str, str | None]
    heads: tuple[str, ...]  # head policies that apply

    @property
    def compatible(self) -> bool:
        """True if some space takes all modules."""
        return any(reason is None for reason in self.refused.values())


def diagnose(
    paths: Sequence[str | PathLike[str]],
    names: Sequence[str],
    *,
    model: str | None = None,
    allow_base_mismatch: bool = False,
    space: str | None = None,
) -> Diagnosis:
    """Read the headers, compare them with each other and with a base model.

    Args:
        model: base model to compare with, a folder or cached Hub name.
        space: one that is answered in any case; log is left out unless all modules are (IA)^3.
    """
    headers, findings = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            headers.append(replace(inspect_header(path), name=name))
        except PEMError as error:
            values = {name: _shorter(str(error), fspath(path))}
            findings.append(Finding(ERROR, "cannot be read", values))
    findings += [f for check in CHECKS for f in check(headers)] if len(headers) > 1 else []
    findings += [f for h in headers for f in _alone(h)]
    findings += _model(headers, model) if model else _vocabularies(headers)
    unread = "a module cannot be read" if len(headers) < len(paths) or not headers else None
    reasons = {
        s: unread or _refusal(headers, s, allow_base_mismatch, model)
        for s in spaces_of(headers, space)
    }
    if allow_base_mismatch:  # then another base stops nothing
        findings = [replace(f, severity=WARNING) if f.do == ONE_BASE else f for f in findings]
    if reasons["delta"]:
        findings = [replace(f, do=MEND_FIRST) if f.do == USE_DELTA else f for f in findings]
    order = (ERROR, WARNING, NOTE)
    findings.sort(key=lambda f: order.index(f.severity))
    return Diagnosis(tuple(headers), tuple(findings), reasons, _policies(headers))


def spaces_of(headers: Sequence[ModuleHeader], asked: str | None = None) -> tuple[str, ...]:
    """The spaces in question: log where all modules are (IA)^3, or where it is asked for."""
    vectors = all(h.kind == "ia3" for h in headers)
    return tuple(s for s in SPACES if s != "log" or vectors or asked == s)


def _shorter(message: str, path: str) -> str:
    return message.removeprefix(path).lstrip(":/ ")


def _refusal(
    headers: Sequence[ModuleHeader], space: str, allow_base_mismatch: bool, model: str | None
) -> str | None:
    try:
        check_compatible(headers, space=space, allow_base_mismatch=allow_base_mismatch)
        _check_sizes(headers)
        if model and not allow_base_mismatch:
            base = provenance.base_identity(model)
            for header in headers:
                check_same_base(BaseModel(f"model {model}", base), header)
    except PEMError as error:
        return str(error)
    return None


# --- differences between modules ----------------------------------------------------------------


def _differing(
    headers: Sequence[ModuleHeader],
    value: Callable[[ModuleHeader], object],
    severity: str,
    what: str,
    do: str,
) -> Iterator[Finding]:
    """A finding if the value is known (not None) and not the same everywhere."""
    found = {h.name: value(h) for h in headers}
    known = [v for v in found.values() if v is not None]
    if any(v != known[0] for v in known):
        shown = {n: "unknown" if v is None else str(v) for n, v in found.items()}
        yield Finding(severity, what, shown, do)


def _kinds(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    do = "combine modules of one kind"
    yield from _differing(headers, lambda h: h.kind, ERROR, "kind differs", do)


def _bases(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    def say(what: str, value: Callable[[ModuleHeader], object], severity: str = ERROR) -> Any:
        return _differing(headers, value, severity, what, ONE_BASE)

    yield from say("base model type differs", lambda h: h.base.model_type)
    yield from say("hidden size of the base differs", lambda h: h.base.hidden_size)
    marks = [h.base.fingerprint for h in headers]
    short = lambda h: h.base.fingerprint and h.base.fingerprint[:16]  # noqa: E731
    yield from say("base fingerprint differs", short)
    proven = None not in marks and len(set(marks)) == 1
    names = {h.base.name and Path(h.base.name.rstrip("/")).name for h in headers} - {None}
    if len(names) > 1 and None in marks:
        yield from say("base model differs by name", lambda h: h.base.name)
    elif not proven and None in marks:
        known = {h.name: h.base.name or "unknown" for h in headers if not h.base.fingerprint}
        what = "the base's weights are not recorded, so only its name can be compared"
        yield Finding(NOTE, what, known)


def _layers(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    try:
        check_spellings(headers)
    except PEMError as error:
        what, _, values = str(error).partition("; ")
        yield Finding(ERROR, what, {"layers": values})
    shared = set.intersection(*(set(h.layers) for h in headers))
    extra = {h.name: [n for n in h.layers if n not in shared] for h in headers}
    if any(extra.values()):
        shown = {
            n: f"{len(x) + len(shared)} layers" + (f", own e.g. {x[0]}" if x else "")
            for n, x in extra.items()
        }
        yield Finding(WARNING, "adapted layers differ", shown, USE_DELTA)


def _sizes(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    try:
        _check_sizes(headers)
    except PEMError as error:
        what, _, values = str(error).partition("; ")
        yield Finding(ERROR, what, {"layers": values}, "use modules of one base model")


def _check_sizes(headers: Sequence[ModuleHeader]) -> None:
    """Refuse updates of different size on one layer.

    Raises:
        PEMError: naming the layer and both sizes.
    """
    if len({h.kind for h in headers}) > 1:
        return
    seen: dict[str, tuple[tuple[int, ...], str]] = {}
    for header in headers:
        for layer in header.layers:
            size = _size(header, layer)
            other, name = seen.setdefault(layer, (size, header.name))
            if other != size:
                found = f"{other} in {name} and {size} in {header.name}"
                raise PEMError.build(layer, "the updates have different sizes", found=found)


def _size(header: ModuleHeader, layer: str) -> tuple[int, ...]:
    if header.kind == "lora":
        shapes = header.shapes
        return shapes[f"{layer}.lora_B"][0], shapes[f"{layer}.lora_A"][1]
    return header.shapes[f"{layer}.{'ia3' if header.kind == 'ia3' else 'delta'}"]


def _factors(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    configs = {h.name: h.config for h in headers}
    if not all(isinstance(c, LoraConfig) for c in configs.values()):
        return

    def of(header: ModuleHeader, value: Callable[[LoraConfig, str], float]) -> str:
        assert isinstance(header.config, LoraConfig)
        found = sorted({value(header.config, layer) for layer in header.layers})
        return ", ".join(f"{v:g}" for v in found)

    yield from _differing(
        headers, lambda h: of(h, lambda c, n: c.rank(n)), WARNING, "rank r differs", USE_DELTA
    )
    yield from _differing(
        headers, lambda h: of(h, lambda c, n: c.scaling(n)), WARNING, "scaling differs", USE_DELTA
    )
    yield from _differing(
        headers, lambda h: getattr(h.config, "use_rslora", None), WARNING,
        "rsLoRA and plain LoRA are mixed (scaling alpha / sqrt(r) and alpha / r)", USE_DELTA,
    )  # fmt: skip


def _placement(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    if not all(isinstance(h.config, IA3Config) for h in headers):
        return

    def inputs(header: ModuleHeader) -> str:
        assert isinstance(header.config, IA3Config)
        scaled = sum(header.config.scales_input(layer) for layer in header.layers)
        return f"{scaled} of {len(header.layers)} layers scale their input"

    do = "train them with one placement (feedforward_modules)"
    yield from _differing(headers, inputs, ERROR, "(IA)^3 placement differs", do)


def _inits(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    marks = {h.name: h.provenance.init for h in headers}
    known = {m for m in marks.values() if m}
    shown = {n: m[:12] if m else "unknown" for n, m in marks.items()}
    if len(known) > 1:
        what = "initialisations differ (lora_A or head): the factors may not be aligned"
        do = "train from one initial module (--init_from) or use --space delta; rows of pem compare"
        yield Finding(WARNING, what, shown, f"{do} is near 1 where lora_A is shared")
    elif known and None in marks.values():
        yield Finding(
            NOTE, "initialisation unknown for some", shown, "pem compare measures the sum"
        )


def _heads(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    with_head = [h for h in headers if h.head_shapes]
    if 0 < len(with_head) < len(headers):
        shown = {h.name: "a head" if h.head_shapes else "no head" for h in headers}
        yield Finding(NOTE, "not every module has a head", shown)
    if len(with_head) < 2:
        return
    labels = lambda h: " ".join(h.head.labels) if h.head and h.head.labels else None  # noqa: E731
    if not _one_question(with_head):
        what = "labels differ: the heads have no average"
        yield from _differing(with_head, labels, WARNING, what, ONE_HEAD)
    shapes = lambda h: ", ".join(f"{n} {s}" for n, s in sorted(h.head_shapes.items()))  # noqa: E731
    yield from _differing(with_head, shapes, WARNING, "heads differ in shape", ONE_HEAD)


def _one_question(headers: Sequence[ModuleHeader]) -> bool:
    try:
        check_answers(headers)
    except PEMError:
        return False
    return True


def _saved(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    """Whole parameters of the base beside the factors: embeddings, norms, lm_head."""
    found = {}
    for header in headers:
        names = [n for n in header.head_shapes if not is_head(n)]
        if names:
            more = f" and {len(names) - 4} more" * (len(names) > 4)
            found[header.name] = ", ".join(names[:4]) + more
    if found:
        what = (
            "saves whole parameters of the base, which follow the head policy: their sum needs the "
            "base, unless coefficients >= 0 of sum 1 average what all modules save"
        )
        yield Finding(WARNING, what, found, "--head average, first, last or none; pem fold")


def _dtypes(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    stored = lambda h: ", ".join(sorted({i.dtype for i in h.infos.values()}))  # noqa: E731
    do = "nothing; sums are in float32 (float64 kept), --dtype chooses what is written"
    yield from _differing(headers, stored, NOTE, "stored dtypes differ", do)


def _vocabularies(headers: Sequence[ModuleHeader], base: Path | None = None) -> Iterator[Finding]:
    """Tokenizers and embedding sizes of the modules, or of these and a base model."""
    folders = {"--model": base} if base else {}
    folders |= {h.name: h.path for h in headers}
    tokens = differing_tokenizers(folders)
    if tokens:
        yield Finding(
            WARNING, "tokenizers differ", tokens, "use modules trained with one tokenizer"
        )
    infos = {h.name: h.infos for h in headers}
    sizes = {n: embedding_rows(folder, infos.get(n, {})) for n, folder in folders.items()}
    known = {n: f"{rows} rows" for n, rows in sizes.items() if rows is not None}
    if len(set(known.values())) > 1:
        do = "resize to one vocabulary before training"
        yield Finding(WARNING, "embedding sizes differ", known, do)


def _twice(headers: Sequence[ModuleHeader]) -> Iterator[Finding]:
    places: dict[Path, list[str]] = {}
    for header in headers:
        places.setdefault(header.path.resolve(), []).append(header.name)
    for place, names in places.items():
        if len(names) > 1:
            yield Finding(NOTE, "one module given twice", {", ".join(names): str(place)})


CHECKS = (
    _kinds, _bases, _layers, _sizes, _factors, _placement, _inits, _heads, _saved, _dtypes,
    _twice,
)  # fmt: skip


# --- one module, and the base model -------------------------------------------------------------


def _alone(header: ModuleHeader) -> Iterator[Finding]:
    for note in (*header.notes, *header.provenance.notes):
        yield Finding(NOTE, "recorded", {header.name: note})


def _model(headers: Sequence[ModuleHeader], model: str) -> Iterator[Finding]:
    base, folder = provenance.base_identity(model), provenance.find_base(model)
    if folder is None:
        what = "is neither a model folder nor in the Hub cache: only its name can be compared"
        yield Finding(WARNING, what, {"--model": model}, "give its folder")
    for header in headers:
        try:
            check_same_base(BaseModel("--model", base), header)
        except PEMError as error:
            what, _, rest = str(error).partition("; ")
            yield Finding(ERROR, what.partition(": ")[2], {header.name: rest}, ONE_BASE)
    if folder is not None:
        yield from _vocabularies(headers, folder)


def _policies(headers: Sequence[ModuleHeader]) -> tuple[str, ...]:
    """Head policies that apply, as far as shapes can tell; empty if no module has a head."""
    shapes = [h.head_shapes for h in headers if h.head_shapes]
    if not shapes:
        return ()
    known = ["first", "last", "none", "per-task"]
    if all(s == shapes[0] for s in shapes) and _one_question(headers):
        known.insert(0, "average")
    infos = [h.head for h in headers if h.head_shapes]
    classifies = all(i is None or i.problem in (None, "classification") for i in infos)
    if classifies and all(_stacks(s, shapes[0]) for s in shapes):
        known.append("concat")
    return tuple(known)


def _stacks(one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> bool:
    """One linear layer of equal width: deeper heads stack only if their first layers are equal."""
    layers = {n.rpartition(".")[0] for n in one}
    output = len(layers) == 1 and layers.pop().split(".")[-1] in OUTPUT_MODULES
    return output and one.keys() == other.keys() and all(one[n][1:] == other[n][1:] for n in one)

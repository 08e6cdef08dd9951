"""Bad input beyond the survey: hostile structures, records, expressions, and places."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from faults import damage as d
from faults.case import READERS, Case
from faults.cases_files import FILE, QUERY, RESTORE, SMALL
from faults.cases_modules import CORRECT, JSON, SAVE_AGAIN, attach, is_bad
from faults.cases_modules import ONE as ALONE
from faults.cases_modules import SAME as ONLY
from faults.cases_pickles import AWAY, PICKLE
from faults.world import BIN, CONFIG, KEY, LAYER, WEIGHTS

import pem_composition as library

RECORD = "bad/pem.json"
FIRST = READERS[:3]
FORGET = "delete it to load the module without provenance"


def option(key: str, what: str, found: str) -> str:
    return (
        f"{JSON}: {key}: {what} cannot be represented; found {found}, expected unset; train the "
        "module without it"
    )


CONFIGS = (
    Case("N01", "config is a list",
         f"{JSON}: wrong content; found a JSON list, expected a JSON object",
         d.config_text(lambda text: "[]")),
    Case("N02", "a key twice in the config",
         f"{JSON}: not valid JSON: the key 'r' appears twice; {RESTORE}",
         d.config_text(lambda text: text.replace("{", '{"r": 8,', 1))),
    Case("N03", "no config",
         f"bad: no module here; found {WEIGHTS}, expected adapter_config.json with its weights, or "
         "config.json with a full model; check the path",
         lambda here: (here / "bad" / CONFIG).unlink()),
    Case("N04", "lora_alpha is true",
         f"{JSON}: lora_alpha; found True, expected a number > 0; {CORRECT}",
         d.config(lora_alpha=True)),
    Case("N05", "lora_alpha of 400 digits",
         f"{JSON}: lora_alpha; found 1000...000, expected a number > 0; {CORRECT}",
         d.config(lora_alpha=10**400)),
    Case("N06", "r is 0", f"{JSON}: r; found 0, expected a whole number from 1 to 1000000; "
         f"{CORRECT}", d.config(r=0)),
    Case("N07", "a number of 5,000 digits",
         f"{JSON}: not valid JSON: Exceeds the limit (4300 digits) for integer string conversion"
         f"...; {RESTORE}",
         d.config_text(lambda text: text.replace('"r": 4', f'"r": {"4" * 5000}'))),
    Case("N08", "100,000 brackets",
         f"{JSON}: nested too deeply; expected plain JSON",
         d.config_text(lambda text: "[" * 100_000), run=FIRST, memory=SMALL),
    Case("N09", "60 brackets in an unknown key",
         f"{JSON}: nested too deeply; expected plain JSON",
         d.config_text(lambda text: text.replace("{", f'{{"x": {"[" * 60}{"]" * 60},', 1))),
    Case("N10", "config of 33 MB",
         f"{JSON}: too large; found more than 33554432 bytes, expected a small JSON file",
         d.config_text(lambda text: text + " " * (33 << 20)), run=FIRST, memory=SMALL),
    Case("N11", "half a surrogate pair in the config",
         f"{JSON}: not UTF-8 text; expected JSON; restore the file",
         d.config_text(lambda text: text.replace('"base"', r'"\ud800"'))),
    Case("N12", "terminal commands in a key",
         rf"{JSON}: unknown key '\x1b[2J\x07...'; found 1, expected a key of a plain LoRA or "
         "(IA)^3 config; remove it if it does not change what the module computes",
         d.config(**{"\x1b[2J\x07own": 1})),
    Case("N13", "unknown key of a million letters",
         f"{JSON}: unknown key 'xxxx... ...xxx'; found 1, expected a key of a plain LoRA or (IA)^3 "
         "config; remove it if it does not change what the module computes",
         d.config(**{"x" * 10**6: 1}), run=FIRST, memory=SMALL),
    Case("N14", "regular expression in alpha_pattern",
         f"{JSON}: alpha_pattern: a regular expression that is not followed (assert_not is not "
         "known here); found '(?!a+)+b', expected characters, classes, groups, alternatives and "
         "repetitions; list the layers by name",
         d.config(alpha_pattern={"(?!a+)+b": 3})),
    Case("N14b", "catastrophic regular expression in alpha_pattern",
         ONLY, d.config(alpha_pattern={"^(.*(a|a.)*)*x(.+)+.*(query|valu)$": 3}),
         run=ALONE, code=0, check=is_bad),
    Case("N15", "LoRA with biases",
         option("lora_bias", "lora_bias (biases of lora_B)", "True"), d.config(lora_bias=True)),
    Case("N16", "trained biases",
         f"{JSON}: bias: trained biases cannot be represented; found 'all', expected 'none'; train "
         "the module with bias='none'", d.config(bias="all")),
    Case("N17", "PiSSA",
         f"{JSON}: init_lora_weights: an initialisation that changes the base cannot be "
         "represented; found 'pissa_niter_4', expected true, false, gaussian, orthogonal or eva; "
         "convert the module to a plain LoRA with the method's own tool",
         d.config(init_lora_weights="pissa_niter_4")),
    Case("N18", "trained tokens",
         option("trainable_token_indices", "trainable tokens", "[1, 2]"),
         d.config(trainable_token_indices=[1, 2])),
    Case("N19", "LoftQ", option("loftq_config", "LoftQ (it changes the base model)", "{...}"),
         d.config(loftq_config={"loftq_bits": 4})),
    Case("N20", "target modules that have no tensors",
         f"{ONLY}\nnote: bad: target_modules names 'key', for which there is no tensor",
         d.config(target_modules=["query", "value", "key"]), run=ALONE, code=0, check=is_bad),
    Case("N21", "tensors of more layers than the targets",
         f"{FILE}: extra tensors for layer '{LAYER.format(0, 'value')}'; found a layer "
         "target_modules does not name, expected target_modules ['query']; correct target_modules",
         d.config(target_modules=["query"])),
    Case("N22", "100,000 target modules",
         f"{ONLY}\nnote: bad: target_modules names 'x0', 'x1', ..., for which there is no tensor",
         d.config(target_modules=["query", "value", *(f"x{i}" for i in range(100_000))]),
         run=ALONE, code=0, check=is_bad),
)  # fmt: skip


def long_shape(held: dict) -> None:
    held[QUERY]["shape"] = [4, 32, *[1] * 63]


def layer_at(number: str) -> d.Damage:
    """Layer 1 under another number."""
    return d.renamed(lambda name: name.replace(".layer.1.", f".layer.{number}."))


TENSORS = (
    Case("N30", "lora_A without lora_B",
         f"{FILE}: missing tensor: {LAYER.format(0, 'query')}.lora_B; found lora_A only, expected "
         f"both factors; {RESTORE}",
         d.drop("layer.0", "query", "lora_B")),
    Case("N31", "a whole layer is missing",
         f"good and bad: set of adapted layers ({LAYER.format(0, 'query')} in good only) differs; "
         "found 4 in good and 2 in bad, expected equal values; combine in delta space (--space "
         "delta), which needs none of this to be equal",
         d.drop("layer.0."), run=(READERS[0],)),
    Case("N31b", "a whole layer is missing, attached to a model",
         f"module bad: no tensors for layer {LAYER.format(0, 'query')}, which its target_modules "
         "name; found 2 layers, expected every layer named query, value; restore its file, or name "
         "the layers in full in target_modules",
         d.drop("layer.0."), run=attach("bad", to="base")),
    Case("N32", "layer numbers with a hole of a billion",
         ONLY, layer_at("999999999"), run=ALONE, code=0, check=is_bad),
    Case("N33", "layer number of 900 digits",
         ONLY, layer_at("9" * 900), run=ALONE, code=0, check=is_bad),
    Case("N34", "tensor name of a million letters",
         f"{FILE}: name of tensor 'xxx... ...xxx'; found 1000000 characters, "
         f"expected 1000; {RESTORE}",
         d.add("x" * 10**6, torch.ones(1))),
    Case("N35", "shape of 65 dimensions",
         f"{FILE}: tensor '{QUERY}' has a malformed shape; found [4, 32, 1, ...], expected whole "
         f"numbers >= 0; {RESTORE}", d.header(long_shape)),
    Case("N36", "sizes of 300 digits",
         f"{FILE}: tensor '{QUERY}' has a malformed shape; found [1000...000], expected whole "
         f"numbers >= 0; {RESTORE}", d.entry(shape=[10**300])),
    Case("N37", "200,001 tensors in 13 MB",
         f"{FILE}: too many tensors; found 200001, expected <= 200000; {RESTORE}",
         d.data(lambda _: d.joined(
             b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i
                              for i in range(200_001)) + b"}")),
         run=FIRST, memory=800 * 1024**2),
    Case("N38", "tensor of a terabyte in a sparse file",
         f"{FILE}: too large; found 1099511... bytes, expected at most the memory, ... bytes",
         d.both(d.config(target_modules=["query"]),
                lambda here: d.sparse(here / "bad" / WEIGHTS, 2**40)),
         run=READERS[1:3], memory=8 * 1024**3),
    Case("N39", "(IA)^3 vectors in a LoRA module",
         f"{FILE}: tensor '{KEY.format(0, 'query')}.ia3_l' does not fit the config; found an ia3 "
         "tensor, expected tensors of kind lora; restore the config that belongs to these weights",
         d.add(f"{KEY.format(0, 'query')}.ia3_l", torch.ones(32, 1))),
)  # fmt: skip


def nested(opcodes: bytes) -> d.Damage:
    """bad's weights as a pickle that uses a tuple of 2^50 leaves."""
    return d.pickled(d.doubled(50, opcodes))


def many_entries(bad: Path) -> None:
    """The end record of a zip file with a list of 4 million entries."""
    d.write_bin(bad / BIN, b"\x80\x02}.")
    raw = bytearray((bad / BIN).read_bytes())
    raw[-10:-6] = struct.pack("<I", 200_000_000)
    (bad / BIN).write_bytes(raw)


PICKLES = (
    Case("N40", "pickle with a tuple of 2^50 leaves as a key",
         f"{PICKLE}: pickle; found a tuple as a key, expected text or a number; {AWAY}",
         nested(b"}h\x32Ns."), run=FIRST, memory=SMALL),
    Case("N41", "pickle with a tuple of 2^50 leaves as a storage",
         f"{PICKLE}: storage reference malformed; found ((..., ...), (..., ...)), expected one "
         f"written by torch.save; {AWAY}",
         nested(b"h\x32Q."), run=FIRST, memory=SMALL),
    Case("N42", "pickle with a memo index of 2 billion",
         f"{PICKLE}: pickle; found memo index 2147483647, expected <= 2; {AWAY}",
         d.pickled(b"\x80\x02}r\xff\xff\xff\x7f."), run=FIRST, memory=SMALL),
    Case("N43", "pickle that sets attributes of its dict",
         f"{PICKLE}: no tensors; expected the module's tensors; {SAVE_AGAIN}",
         d.pickled(b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x05sb.")),
    Case("N44", "zip file that lists 200 MB of entries",
         f"{PICKLE}: zip directory; found 200000000 bytes, expected 33554432; {AWAY}",
         d.instead(many_entries)),
    Case("N45", "pickle of torch before 1.6",
         f"{PICKLE}: not a torch zip file; found a pickle of torch < 1.6 or another format, "
         f"expected the zip format of torch.save; {AWAY}",
         d.instead(lambda bad: torch.save({"a": torch.ones(1)}, bad / BIN,
                                          _use_new_zipfile_serialization=False))),
    Case("N46", "a tensor that shows one value a million times a million times",
         f"{PICKLE}: tensor 'a' reaches out of its storage; found shape (1000000, 1000000), "
         f"strides (0, 0), offset 0, expected at most 1 values; {AWAY}",
         d.instead(lambda bad: torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, bad / BIN))),
)  # fmt: skip


def subfolders(here: Path) -> None:
    """bad holds two modules in subfolders."""
    held = list((here / "bad").iterdir())
    for name in ("x", "y"):
        (here / "bad" / name).mkdir()
        for file in held:
            (here / "bad" / name / file.name).write_bytes(file.read_bytes())
    for file in held:
        file.unlink()


def in_place(make: Callable[[Path], object], name: str) -> d.Damage:
    """Something else under the name of one of bad's files."""

    def apply(here: Path) -> None:
        (here / "bad" / name).unlink(missing_ok=True)
        make(here / "bad" / name)

    return apply


PLACES = (
    Case("N50", "weights are a link out of the folder",
         f"{FILE}: a symbolic link leads out of its folder; found /etc/passwd, expected a file "
         "inside bad; replace the link by a copy of the file",
         in_place(lambda path: path.symlink_to("/etc/passwd"), WEIGHTS)),
    Case("N51", "weights are a device",
         f"{FILE}: a symbolic link leads out of its folder; found /dev/zero, expected a file "
         "inside bad; replace the link by a copy of the file",
         in_place(lambda path: path.symlink_to("/dev/zero"), WEIGHTS)),
    Case("N52", "a link that leads to itself",
         f"bad: no weights; found {CONFIG}, {WEIGHTS} (a link to nothing), "
         f"expected {WEIGHTS} (or {BIN}); ...",
         in_place(lambda path: path.symlink_to(path.name), WEIGHTS)),
    Case("N53", "config is a FIFO",
         f"{JSON}: cannot be read; found a FIFO, expected a regular file",
         in_place(os.mkfifo, CONFIG), run=FIRST, memory=SMALL),
    Case("N54", "pem.json is a FIFO",
         f"{RECORD}: cannot be read; found a FIFO, expected a regular file",
         in_place(os.mkfifo, "pem.json"), run=FIRST, memory=SMALL),
    Case("N55", "a file instead of a directory",
         "bad/adapter_config.json: not a directory; expected a directory with a module; check the "
         "path",
         run=(("merge", "-a", "good", f"bad/{CONFIG}", "-p", "out"),)),
    Case("N56", "an empty directory",
         "bad: no module here; found an empty directory, expected adapter_config.json with its "
         "weights, or config.json with a full model; check the path",
         lambda here: [p.unlink() for p in (here / "bad").iterdir()]),
    Case("N57", "two modules in subfolders",
         "bad: several modules in subfolders; found x, y, expected one of them; "
         "name the subfolder, e.g. bad/y",
         subfolders),
    Case("N58", "the output is a file",
         f"bad/{CONFIG}: the output exists; found a file, expected no such path; choose another "
         "output path",
         run=(("merge", "-a", "good", "-p", f"bad/{CONFIG}"),)),
    Case("N59", "the output is a file, with --overwrite",
         f"...bad/{CONFIG}: the output exists; found a file, expected no such path; choose another "
         "output path",
         run=(("merge", "-a", "good", "-p", f"bad/{CONFIG}", "--overwrite"),)),
    Case("N60", "the output lies below a file",
         f"...bad/{CONFIG}: not a directory; found a file; choose another output path",
         run=(("merge", "-a", "good", "-p", f"bad/{CONFIG}/out"),)),
    Case("N63", "a path with a typo",
         "good/../odur: no such directory; expected a directory with a module; did you mean "
         "good/../ours?",
         run=(("merge", "-a", "good", "good/../odur", "-p", "out"),)),
    Case("N64", "a typo in the middle of a path",
         "here/bda/checkpoint-20: no such directory; expected a directory with a module; did you "
         "mean here/bad?",
         lambda here: [(here / "here").mkdir(), (here / "bad").rename(here / "here" / "bad")],
         run=(("negation", "-a", "here/bda/checkpoint-20", "-p", "out"),)),
    Case("N64b", "a typo before the module's own folder",
         "rums/ours: no such directory; expected a directory with a module; did you mean "
         "runs/ours?",
         lambda here: [(here / "runs").mkdir(), (here / "bad").rename(here / "runs" / "ours"),
                       (here / "runs" / "other").mkdir()],
         run=(("negation", "-a", "./rums/ours", "-p", "out"),)),
    Case("N64c", "a typo, and no module of a like name",
         "goof: no such directory; expected a directory with a module; check the path",
         lambda here: [(here / "good").rename(here / "far"), (here / "goods").mkdir(),
                       (here / "good").write_text("")],
         run=(("negation", "-a", "goof", "-p", "out"),)),
    Case("N65", "a base model that is not there",
         "-m/--model ./nowhere: no base model here; found no such directory, expected the "
         "directory of a model; check the path",
         run=(("merge", "-a", "good", "-p", "out", "-m", "./nowhere"),
              ("negation", "-a", "ours", "-p", "out", "-m", "./nowhere"))),
    Case("N62", "a directory whose name is no text",
         r"out = +1*b\udcffd  (space parameter, head average, error against sum c_i dW_i: 0)",
         lambda here: (here / "bad").rename(os.fsdecode(b"b\xffd")),
         run=(("merge", "-a", os.fsdecode(b"b\xffd"), "-p", "out"),), code=0,
         check=lambda here: library.load(here / "out")),
    Case("N61", "an empty path (an unset shell variable)",
         "--adapters: found '', expected a value (is a shell variable unset?)",
         run=(("merge", "-a", "good", "", "-p", "out"),)),
)  # fmt: skip


RECORDS = (
    Case("N70", "config changed after it was written",
         f"{JSON}: changed since it was written (sha256 differs from pem.json); found ..., "
         "expected ...; restore the file, or delete pem.json if the change is intended",
         d.both(d.record(), d.config(lora_alpha=7))),
    Case("N71", "pem.json of another module",
         f"{RECORD}: belongs to another module; found kind ia3, expected kind lora; restore the "
         "file, or delete it",
         d.record(kind="ia3")),
    Case("N72", "pem.json of a later version",
         f"{RECORD}: format_version; found 3, expected 1 or 2; read it with the version that wrote "
         "it",
         d.record(format_version=3)),
    Case("N73", "pem.json with a number for a name",
         f"{RECORD}: malformed (TypeError: name must be of type str, found 5); {FORGET}",
         d.record(base={"name": 5})),
    Case("N73b", "pem.json with a space that there is not",
         f"{RECORD}: malformed (ValueError: space must be parameter or delta or log, found "
         f"'banana'); {FORGET}",
         d.record(space="banana")),
    Case("N73c", "pem.json with a negative error",
         f"{RECORD}: malformed (ValueError: total must be from 0 to inf, found -1.0); {FORGET}",
         d.record(certificate={"total": -1.0, "layers": {}})),
    Case("N74", "pem.json with a coefficient of 400 digits",
         f"{RECORD}: malformed (OverflowError: int too large to convert to float); {FORGET}",
         d.record(terms=[{"coefficient": 10**400, "label": "a"}])),
    Case("N75", "pem.json is cut",
         f"{RECORD}: not valid JSON: ...; {RESTORE}",
         d.both(d.record(), lambda here: os.truncate(here / RECORD, 300))),
)  # fmt: skip


def attach_to_bare(here: Path) -> None:
    """A model without a classifier has no place for the module's head."""
    import transformers

    model = transformers.RobertaModel.from_pretrained("base")
    library.attach(model, library.load("bad"))


REQUESTS = (
    Case("N80", "coefficient is a word, in Python",
         "coefficients: a coefficient must be a finite number; found 'half'",
         run=lambda here: library.combine([library.load("good")], ["half"])),
    Case("N81", "strength is a list, in Python",
         "strength: a coefficient must be a finite number; found [1]",
         run=lambda here: library.negate(library.load("good"), [1])),
    Case("N82", "expression of a million characters",
         "expression: too long; found 1000001 characters, expected <= 20000",
         run=lambda here: library.arithmetic.expression.parse("a" + "+a" * 500_000)),
    Case("N83", "60 parentheses inside each other",
         "expression, column 51: too many nested parentheses; expected at most 50",
         run=(("compose", "(" * 60 + "a" + ")" * 60, "--module", "a=good", "-p", "out"),)),
    Case("N84", "a number beyond any double",
         "expression, column 1: a number too large for a double",
         run=(("compose", "1e999*a", "--module", "a=good", "-p", "out"),)),
    Case("N85", "a sum beyond float32",
         f"{LAYER.format(0, 'query')}.lora_A: the sum is too large for float32; expected finite "
         "numbers; choose smaller coefficients",
         run=(("compose", "1e300*a", "--module", "a=good", "-p", "out"),)),
    Case("N86", "a module with a head on a model without one",
         "head classifier.dense.bias: RobertaModel has no such parameter; found head parameters "
         "none, expected shape (32,); load the model class the module was trained on, or pass "
         "head='ignore'",
         run=attach_to_bare),
    Case("N87", "a value that float16 cannot hold",
         f"{LAYER.format(1, 'value')}.lora_B: a value does not fit float16; found 1e+06; choose "
         "bfloat16 or float32",
         d.put(1e6), run=(("merge", "-a", "bad", "-p", "out", "--dtype", "float16"),)),
)  # fmt: skip

"""What PEFT, transformers, safetensors and torch do with the same input: measured, by case.

Measured once by hand (torch 2.13.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0, accelerate
1.15.0) on models of the same size, a 2-layer GPT-2 with LoRA on c_attn and a RoBERTa classifier:

    E1  an error that names the culprit and the cause
    E2  an error that names no file, adapter or flag, or misleads
    W   a warning only, and a wrong result      S   silently wrong, or a silent choice
    X   hangs, crashes or fills the memory      P   runs the payload
    A   accepted, harmless                      OK  right

``scripts/bad_input.py --peers`` puts the modules of this catalogue to PEFT again (measure.py); what
it found is in peers.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Measured(NamedTuple):
    """Outcome and, in a few words, what was said or done."""

    outcome: str
    text: str


COVER = "header: incomplete metadata, file not fully covered"
MISSING = "warns of missing adapter keys; the model is the base, or partly adapted"
DEFAULT = "the default is used"
TRUNCATED = "zip of the two lists stops at the shorter"
RANDOM = "a load report on stderr; random weights are used"

PEERS: dict[str, Measured] = {
    "S01": Measured("E2", COVER),
    "S02": Measured("E2", "invalid header length"),
    "S03": Measured("E2", "header too small"),
    "S04": Measured("E2", "header too large"),
    "S05": Measured("E2", "invalid header length"),
    "S06": Measured("X", "accepted, 17 s to open"),
    "S07": Measured("E2", "invalid UTF-8 in header"),
    "S08": Measured("E2", "invalid JSON in header: expected ident at line 1 column 2"),
    "S09": Measured("E2", "invalid offset for tensor"),
    "S10": Measured("E2", COVER),
    "S11": Measured("E2", "invalid shape, data type, or offset for tensor"),
    "S12": Measured("E2", "overflow computing buffer size"),
    "S13": Measured("E2", "invalid offset for tensor"),
    "S13b": Measured("S", "the last one is loaded"),
    "S14": Measured("A", "loaded under this name"),
    "S15": Measured("E2", "unknown variant Q7, expected one of ..."),
    "S16": Measured("E2", "integer -16, expected usize"),
    "S17": Measured("S", "loads; other logits"),
    "S18": Measured("S", "NaN logits; noticed by safe_merge=True only"),
    "S19": Measured("S", "NaN logits; noticed by safe_merge=True only"),
    "S20": Measured("E2", "OSError: No such device"),
    "S21": Measured("X", "hangs for ever"),
    "S22": Measured("W", MISSING),
    "S25": Measured("E2", "invalid type: integer 1, expected a string"),
    "T01": Measured("E2", "blocked; advises weights_only=False"),
    "T02": Measured("E2", "blocked; advises weights_only=False"),
    "T04": Measured("X", "17 s and 2.4 GB, then an error"),
    "T05": Measured("E2", "failed reading zip archive: internal miniz error"),
    "T06": Measured("S", "the .safetensors is taken without a word"),
    "T08": Measured("E1", "contains custom code which must be executed"),
    "T09": Measured("E1", "contains custom code which must be executed"),
    "T11": Measured("E2", "'list' object has no attribute 'items'"),
    "T12": Measured("E2", "HFValidationError: Repo id must be in the form ..."),
    "T13": Measured("E1", "Can't find 'adapter_config.json' at ..."),
    "F01": Measured("S", "loads the file outside the folder"),
    "F03": Measured("W", RANDOM),
    "F07": Measured("W", RANDOM),
    "F08": Measured("A", "the model is float16, since release 5"),
    "F11": Measured("W", RANDOM),
    "F12": Measured("W", RANDOM),
    "F13": Measured("P", "accelerate load_state, custom checkpoint: ran"),
    "F14": Measured("S", "accelerate load_state, random states: error swallowed"),
    "F15": Measured("P", "torch.distributed.checkpoint, .metadata: ran"),
    "F16": Measured("P", "lm-eval request cache (dill): ran"),
    "F22": Measured("X", "SIGBUS"),
    "P01": Measured("E1", "size mismatch for ... lora_A"),
    "P02": Measured("W", "the model is the base"),
    "P03": Measured("E1", "target modules not found in the base model"),
    "P04": Measured("A", "silent"),
    "P05": Measured("W", MISSING),
    "P06": Measured("S", "dropped without a word; other logits"),
    "P07": Measured("W", MISSING),
    "P08": Measured("A", "dropped without a word"),
    "P09": Measured("W", MISSING),
    "P09b": Measured("W", MISSING),
    "P10": Measured("S", "never compared"),
    "P10b": Measured("S", "never compared"),
    "P11": Measured("E1", "target modules not found in the base model"),
    "P12": Measured("S", DEFAULT),
    "P13": Measured("E2", "size mismatch (8 is assumed)"),
    "P14": Measured("S", DEFAULT),
    "P14b": Measured("S", DEFAULT),
    "P15": Measured("E2", "JSONDecodeError without a path"),
    "P16": Measured("E2", "KeyError: 'peft_type'"),
    "P17": Measured("E2", "KeyError: 'LORAX'"),
    "P18": Measured("W", "unexpected keyword arguments are ignored"),
    "P19": Measured("E2", "unsupported operand type(s) for /"),
    "P20": Measured("S", "NaN logits"),
    "P21b": Measured("E2", "tries to allocate 128 GB"),
    "P22b": Measured("S", "cast to float without a scale"),
    "P25": Measured("S", "no effect, no word"),
    "P26": Measured("S", "the weights are replaced"),
    "P26c": Measured("S", "the weights are replaced, the new alpha is ignored"),
    "P27": Measured("E1", 'module name can\'t contain "."'),
    "P28": Measured("E1", "module name can't be empty"),
    "P29": Measured("S", "writes outside of the directory given"),
    "P31": Measured("X", "hangs for more than 90 s"),
    "P32": Measured("E2", "KeyError: '...classifier.dense.weight'"),
    "P32b": Measured("E1", "size mismatch for ... out_proj"),
    "M03": Measured("OK", "exact"),
    "M03b": Measured("A", "silently linear, whatever is asked for"),
    "M04": Measured("E2", "all adapters must have the same r value"),
    "M04b": Measured("E2", "max() arg is an empty sequence"),
    "M05": Measured("S", TRUNCATED),
    "M05b": Measured("S", TRUNCATED),
    "M05c": Measured("S", TRUNCATED),
    "M06": Measured("S", "twice the adapter"),
    "M07": Measured("E1", "Adapter zz does not exist"),
    "M08": Measured("S", "returns without doing anything"),
    "M08b": Measured("S", "returns without doing anything"),
    "M09": Measured("E1", "all adapters must have the same r value"),
    "M09b": Measured("S", "svd at the larger rank: a different result without notice"),
    "M11": Measured("E1", "should follow the same target modules type"),
    "M12": Measured("E1", "cannot combine adapters with different peft types"),
    "M13b": Measured("S", "scales of 1.99"),
    "M13c": Measured("S", "scales of -0.99"),
    "M13d": Measured("S", TRUNCATED),
    "M14": Measured("E1", "cannot add weighted adapters with modules_to_save"),
    "M15": Measured("S", "the magnitude is dropped"),
    "M15b": Measured("S", "the magnitude is dropped"),
    "M16": Measured("S", "2 times the adapter"),
    "M16b": Measured("S", "2 times the adapter"),
    "M16c": Measured("S", "2.83 times (root of the new rank)"),
    "M18": Measured("S", "NaN"),
    "M18b": Measured("E2", "linalg.svd: non-finite values"),
    "M18c": Measured("S", "NaN"),
    "M19": Measured("E2", "can't multiply sequence by non-int of type 'float'"),
    "M20": Measured("E1", "invalid combination_type"),
    "M20b": Measured("S", "silently linear"),
    "M20c": Measured("S", "an adapter of zeros"),
    "M21": Measured("E2", "ties without density: '>=' not supported"),
    "M21b": Measured("S", "ties, density 0: the base"),
    "M21c": Measured("W", "ties, density 1.5: no pruning"),
    "M21d": Measured("W", "ties, density 20: no pruning"),
    "M21e": Measured("S", "dare, density 0: NaN"),
    "M21f": Measured("S", "density with linear: ignored"),
    "M22": Measured("S", "becomes the largest rank"),
    "M22b": Measured("E2", "mat1 and mat2 shapes cannot be multiplied"),
    "M22c": Measured("S", "72 % error, unreported"),
    "M23": Measured("S", "NaN goes on (svd: LinAlgError)"),
    "M24": Measured("S", "merged, no check"),
    "M25": Measured("A", "same logits, nested directory, no provenance"),
    "M26": Measured("E2", "stack expects each tensor to be equal size"),
    "M26b": Measured("S", "saves what cannot be loaded again"),
    "R01": Measured("OK", "resumed, no difference"),
    "R02": Measured("OK", "resumed, no difference"),
    "R02b": Measured("OK", "resumed, no difference"),
    "R02c": Measured("OK", "resumed, no difference"),
    "R03": Measured("E2", "newest checkpoint damaged: raises, the older one is not tried"),
    "R04": Measured("E2", "newest checkpoint damaged: raises, the older one is not tried"),
    "R05": Measured("E2", "newest checkpoint damaged: raises, the older one is not tried"),
    "R06": Measured("S", "optimizer.pt missing: resumes with other weights"),
    "R07": Measured("S", "rng_state.pth missing: resumes with other weights"),
    "R08": Measured("S", "scheduler.pt missing: resumes with other weights"),
    "R09": Measured("E2", "newest checkpoint damaged: raises, the older one is not tried"),
    "R09b": Measured("E2", "newest checkpoint damaged: raises, the older one is not tried"),
    "R10": Measured("S", "resume with another rate: ignored"),
    "R10b": Measured("W", "resume with another batch size: a warning"),
    "R10c": Measured("S", "resume with another seed: mixed"),
    "R10d": Measured("S", "resume with other data: mixed"),
    "R11": Measured("E2", "malicious optimizer.pt: blocked, UnpicklingError"),
    "R11b": Measured("OK", "malicious training_args.bin: not read"),
    "R12": Measured("S", "divergence: loss 0.0, NaN saved, exit 0"),
    "R13": Measured("E2", "full disk: a broken newest checkpoint, resume fails"),
    "R14": Measured("S", "directory of another run: checkpoints mixed"),
    "R15": Measured("E2", "full disk, peft: the old file stays, no adapter directory is named"),
    "R16": Measured("E2", "full disk, torch.save: the old file is destroyed"),
    "R17d": Measured("S", "--learning_rat 1 is taken as --learning_rate"),
}


def again() -> dict[str, str]:
    """Case -> what PEFT did with this catalogue's module; see measure.py."""
    path = Path(__file__).with_name("peers.json")
    return dict(json.loads(path.read_text())["cases"])

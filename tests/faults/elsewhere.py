"""Cases of the survey that are not run here: where they are tested, or why they cannot occur."""

from __future__ import annotations

RESUME = "tests/training/test_resume.py"
NOT_USED = "not used by this library; test_safety.py keeps it so"

# id -> input, what happens, where it is tested
ELSEWHERE: dict[str, tuple[str, str, str]] = {
    "F13": ("accelerate: malicious custom checkpoint", NOT_USED, "test_safety.py"),
    "F14": ("accelerate: malicious random states", NOT_USED, "test_safety.py"),
    "F15": ("torch.distributed.checkpoint: malicious .metadata", NOT_USED, "test_safety.py"),
    "F16": ("lm-eval: malicious request cache", NOT_USED, "test_safety.py"),
    "M21": ("ties without a density", "a matter of the merging methods", "tests of the methods"),
    "M21b": ("ties, density 0", "a matter of the merging methods", "tests of the methods"),
    "M21c": ("ties, density 1.5", "a matter of the merging methods", "tests of the methods"),
    "M21d": ("ties, density 20", "a matter of the merging methods", "tests of the methods"),
    "M21e": ("dare, density 0", "a matter of the merging methods", "tests of the methods"),
    "M21f": ("a density for a plain sum", "a matter of the merging methods",
             "tests of the methods"),
    "R01": ("crash and resume, full fine-tuning", "equal bits", RESUME),
    "R02": ("crash and resume, LoRA with dropout", "equal bits", RESUME),
    "R02b": ("crash and resume at the end of an epoch", "equal bits", RESUME),
    "R02c": ("crash and resume, two workers", "equal bits", RESUME),
    "R03": ("newest checkpoint cut", "skipped with a line, the older one resumed", RESUME),
    "R04": ("newest checkpoint empty", "skipped with a line, the older one resumed", RESUME),
    "R05": ("newest checkpoint without weights", "skipped with a line, the older one resumed",
            RESUME),
    "R09": ("newest checkpoint partly written", "skipped with a line, the older one resumed",
            RESUME),
    "R09b": ("newest checkpoint partly written", "skipped with a line, the older one resumed",
             RESUME),
    "R06": ("no optimizer.pt", "counts as incomplete", RESUME),
    "R07": ("no rng_state.pth", "counts as incomplete", RESUME),
    "R08": ("no scheduler.pt", "counts as incomplete", RESUME),
    "R10": ("resume with another rate", "refused unless forced", RESUME),
    "R10b": ("resume with another batch size", "refused unless forced", RESUME),
    "R10c": ("resume with another seed", "refused unless forced", RESUME),
    "R10d": ("resume with other data", "refused unless forced", RESUME),
    "R11": ("malicious optimizer.pt", "its sha256 is checked first, then weights_only", RESUME),
    "R11b": ("malicious training_args.bin", "not read", RESUME),
    "R12": ("divergence", "exit 3, no broken weights are written",
            "tests/training/test_classification.py"),
    "R13": ("disk full while training", "exit 3, the older checkpoint stays", RESUME),
    "R14": ("directory of another run", "refused if unfinished; trained anew, with a line, if "
            "finished", RESUME),
    "R15": ("disk full while saving a module over a good one", "exit 3, the old one stays",
            "test_crashes.py"),
    "R16": ("disk full while writing a .bin over a good one", "exit 3, the old one stays",
            "tests/checkpoint/test_files.py"),
    "R17d": ("--learning_rat 1", "unknown flag; did you mean --learning_rate?",
             "tests/cli/test_parser.py"),
}  # fmt: skip

"""All cases by area, in the order of docs/bad_input.md."""

from __future__ import annotations

from faults import (
    cases_files,
    cases_full,
    cases_modules,
    cases_own,
    cases_pickles,
    cases_rows,
    cases_streams,
    cases_sums,
)
from faults.case import Case

AREAS: dict[str, tuple[Case, ...]] = {
    "safetensors": cases_files.CASES,
    "pickles and code": cases_pickles.CASES,
    "whole models": cases_full.CASES,
    "configs of modules": cases_modules.CONFIGS,
    "tensors of modules": cases_modules.TENSORS,
    "attaching, names, bases": cases_modules.LIVE,
    "requests to combine": cases_sums.REQUESTS,
    "kinds to combine": cases_sums.KINDS,
    "log space": cases_streams.LOG,
    "checkpoints folded, extracted, streamed": cases_streams.CHECKPOINTS,
    "hostile configs": cases_own.CONFIGS,
    "hostile tensors": cases_own.TENSORS,
    "hostile pickles": cases_own.PICKLES,
    "places": cases_own.PLACES,
    "records": cases_own.RECORDS,
    "requests in Python, expressions": cases_own.REQUESTS,
    "labelled rows": cases_rows.CASES,
}
CASES: tuple[Case, ...] = tuple(case for cases in AREAS.values() for case in cases)

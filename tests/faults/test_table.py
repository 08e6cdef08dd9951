"""docs/bad_input.md is what the catalogue says, and the catalogue is complete."""

from __future__ import annotations

from faults import peers, table
from faults.catalogue import CASES
from faults.elsewhere import ELSEWHERE


def test_the_page_is_made_from_the_cases():
    assert table.PATH.read_text() == table.page(), "run scripts/bad_input.py"


def test_every_case_of_the_survey_is_here_or_says_where_it_is_tested():
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))
    assert peers.PEERS.keys() <= {*ids, *ELSEWHERE}
    assert not ELSEWHERE.keys() & set(ids)

"""Every class for causal language modeling that transformers registers: a whole diff with bill and bake, or the true reason.

`tools/make_architectures_page.py` writes what becomes of each to docs/architectures.md.
"""

from __future__ import annotations

import pytest
import tiny_architectures
from make_architectures_page import PAGE, rows

CASES = tiny_architectures.cases()


@pytest.mark.slow
@pytest.mark.parametrize("cls", CASES)
def test_what_the_page_says_of_a_class_is_what_becomes_of_it(cls, tmp_path):
    found = tiny_architectures.outcome(CASES[cls], tmp_path)
    said = rows(PAGE.read_text()).get(cls)
    if said is None:
        pytest.skip("a class of another version of transformers than the page was made with")
    assert (found.state, found.reason if found.state == "refused" else "") == (
        said.state,
        said.reason if said.state == "refused" else "",
    )
    if found.state == "works":
        assert (found.shares, found.resumes) == (said.shares, said.resumes)
        assert found.reach == pytest.approx(said.reach, abs=0.02)


def test_most_classes_work_and_no_reason_is_missing():
    said = rows(PAGE.read_text())
    assert sum(row.state == "works" for row in said.values()) >= 60
    assert all(row.reason for row in said.values() if row.state != "works")

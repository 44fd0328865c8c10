"""Variants: made by name with settings, and told apart by their source."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest

from tunediff.changes.finders.base import Finder
from tunediff.changes.signals.base import Signal
from tunediff.changes.trials.base import Trial
from tunediff.core import variants
from tunediff.core.errors import SettingError, VariantError
from tunediff.harvests.elicitors.base import Elicitor
from tunediff.models.families.base import Family

MINE = """
    '''A finder of mine.'''
    from dataclasses import dataclass
    from tunediff.changes.finders.base import Finder, Found
    {imports}

    @dataclass(frozen=True)
    class Mine(Finder):
        '''Finds nothing.'''
        size: float = {size}
        '''How large.'''

        def find(self, view):
            {comment}
            return Found([])
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Write modules of a package of one's own, and import a class of it anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "ownlab").mkdir()
    (tmp_path / "ownlab" / "__init__.py").write_text("")

    def write(name: str = "mine", **parts: object):
        text = MINE.format(**{"imports": "", "size": 1.0, "comment": "pass", **parts})
        (tmp_path / "ownlab" / f"{name}.py").write_text(textwrap.dedent(text))
        for module in [m for m in sys.modules if m.split(".")[0] == "ownlab"]:
            del sys.modules[module]
        importlib.invalidate_caches()
        return variants.make(Finder, f"ownlab.{name}:Mine")

    write.folder = tmp_path / "ownlab"
    yield write
    for module in [m for m in sys.modules if m.split(".")[0] == "ownlab"]:
        del sys.modules[module]


def test_settings_make_an_instance_and_are_checked():
    made = variants.make(Finder, "decision_clusters", {"alike": 0.3}, "find")
    assert made.alike == 0.3 and made.documents == 3
    with pytest.raises(SettingError, match=r"find\.decision_clusters\.alke") as caught:
        variants.make(Finder, "decision_clusters", {"alke": 0.3}, "find")
    assert caught.value.remedy.startswith("find.decision_clusters.alike ")
    for wrong in ({"alike": 2.0}, {"alike": "high"}, {"documents": 0}):
        with pytest.raises(SettingError):
            variants.make(Finder, "decision_clusters", wrong, "find")


@pytest.mark.parametrize("base", [Finder, Signal, Trial, Elicitor])
def test_every_variant_that_ships_is_frozen_and_has_no_identity_beside_its_name(base):
    for name in variants.names(base.__module__.rpartition(".")[0]):
        made = variants.make(base, name)
        assert type(made).__dataclass_params__.frozen
        assert variants.identity(made) == [], f"{name} was edited: python tools/make_released_sources.py at a release"


def test_settings_and_source_are_in_the_identity(lab):
    (source,) = variants.identity(lab())
    changed = variants.make(Finder, "ownlab.mine:Mine", {"size": 2.0})
    assert variants.identity(changed) == [{"size": 2.0}, source]


@pytest.mark.parametrize("parts, differs", [({"size": 2.0}, True), ({"comment": "pass  # said"}, False)])
def test_an_edit_of_the_code_changes_the_source_and_a_comment_does_not(lab, parts, differs):
    before = variants.source(type(lab()))
    assert (variants.source(type(lab(**parts))) != before) == differs


@pytest.mark.parametrize(
    "imports",
    ["from ownlab import helper", "from ownlab.helper import X", "from . import helper", "import ownlab.helper"],
)
def test_an_edit_of_a_helper_changes_the_source(lab, imports):
    (lab.folder / "helper.py").write_text("X = 1\n")
    before = variants.source(type(lab(imports=imports)))
    (lab.folder / "helper.py").write_text("X = 2\n")
    assert variants.source(type(lab(imports=imports))) != before


def test_an_edit_of_a_parents_module_changes_the_source(lab, tmp_path):
    lab("parent")
    child = "from ownlab.parent import Mine as Parent\n\nclass Mine(Parent):\n    pass\n"
    (lab.folder / "child.py").write_text(child)
    before = variants.source(type(variants.make(Finder, "ownlab.child:Mine")))
    lab("parent", size=3.0)
    assert variants.source(type(variants.make(Finder, "ownlab.child:Mine"))) != before


def test_a_helper_beside_a_single_file_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = textwrap.dedent(MINE.format(imports="import onehelper", size=1.0, comment="pass"))
    (tmp_path / "onefinder.py").write_text(text)
    (tmp_path / "onehelper.py").write_text("X = 1\n")
    kind = type(variants.make(Finder, "onefinder:Mine"))
    before = variants.source(kind)
    (tmp_path / "onehelper.py").write_text("X = 2\n")
    assert variants.source(kind) != before


@pytest.mark.parametrize(
    "name, what",
    [
        ("tunediff.core.artifacts:key_of", "no finder"),
        ("tunediff.changes.finders.base:Finder", "not whole"),
        ("a:", "cannot"),
    ],
)
def test_what_is_no_variant_is_refused(name, what):
    with pytest.raises(VariantError, match=what):
        variants.make(Finder, name)


def test_kinds_are_named_in_the_singular():
    packages = (kind.__module__.rpartition(".")[0] for kind in (Finder, Signal, Trial, Family))
    assert [variants.kind_of(p) for p in packages] == ["finder", "signal", "trial", "family"]

"""Sites: places in a network, read and written as text."""

from __future__ import annotations

import pytest

from tunediff.core.errors import SettingError
from tunediff.records.site import Site


def test_sites_parse_and_print():
    for text in ("resid.0", "attn.7", "mlp.31"):
        assert str(Site.parse(text)) == text
    assert Site.parse(" resid.15 ") == Site(15)
    assert sorted([Site(2), Site(1, "mlp"), Site(1)]) == [Site(1, "mlp"), Site(1), Site(2)]


@pytest.mark.parametrize("text", ["", "15", "resid", "resid.", "resid.-1", "resid.1.2", "head.3", "RESID.1", "resid.x"])
def test_what_is_not_a_site_is_refused(text):
    with pytest.raises(SettingError, match="is not a site") as caught:
        Site.parse(text)
    assert "resid, attn, mlp" in caught.value.expected and caught.value.remedy

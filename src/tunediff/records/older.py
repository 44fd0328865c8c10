"""Records of older schemas, as plain JSON, brought to today's form before they are read as types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunediff.core.artifacts import plain
from tunediff.records.profile import Profile
from tunediff.records.scan import Scan, depth_profile


def diff(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of schema ``tunediff.diff/1`` in the form of ``tunediff.diff/2``, with every number kept."""
    return {
        **record,
        "scan": scan(record["scan"]) if record["scan"] else None,
        "changes": [change(one) for one in record["changes"]],
        "fits": [fit(one) for one in record["fits"]],
        "schema": "tunediff.diff/2",
    }


def scan(record: Any) -> Any:
    """A scan over depth; older ones are a list with an entry for each site."""
    if not isinstance(record, list):
        return record

    def column(name: str) -> list[float]:
        return [float("nan") if row.get(name) is None else row[name] for row in record]

    sites, chosen = [row["site"] for row in record], [row["site"] for row in record if row["chosen"]]
    numbers = {name: column(name) for name in ("relative", "noise", "ceiling")}
    return plain(Scan.of(sites, offset=column("offset_share"), chosen=chosen, **numbers))


def change(record: dict[str, Any]) -> dict[str, Any]:
    """A ranked change; the depth of older ones is a table from site to number."""
    return {**record, "depth": depth(record["depth"], record["id"])}


def depth(record: Any, subject: str) -> Any:
    """What a change explains at each site; older records are a table from site to number."""
    if not isinstance(record, dict) or "values" in record:
        return record
    sites = sorted(record, key=_natural)
    values = [float("nan") if record[site] is None else record[site] for site in sites]
    return plain(depth_profile([subject], sites, [values])) if sites else None


def fit(record: dict[str, Any]) -> dict[str, Any]:
    """A fitted dictionary; the training curve of older ones is a list of rows beside their column names."""
    if "columns" not in record:
        return record
    rows = [dict(zip(record["columns"], row)) for row in record["curve"]]
    kept = {name: value for name, value in record.items() if name != "columns"}
    return {**kept, "curve": plain(Profile.of_rows("Training curve", rows, "step", "fit")) if rows else None}


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers inside of text by size."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(p), "") if p.isdecimal() and p.isascii() else (1, 0, p) for p in parts if p]

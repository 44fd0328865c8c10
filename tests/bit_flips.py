"""Files with one wrong bit, for tests of what is read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def flipped(path: Path, bits: int) -> Iterator[None]:
    """Flip one bit of every byte of a file in turn, of its lowest `bits`; each is read while the file is so."""
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % bits
        path.write_bytes(data)
        yield

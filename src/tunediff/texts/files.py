"""Files of text: which ones a path names, and their bytes and lines, decompressed, decoded and never more than wanted."""

from __future__ import annotations

import codecs
import glob
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from tunediff.core.errors import MissingExtraError, SourceError, first_line
from tunediff.core.files import KINDS
from tunediff.core.remarks import Remarks

MAX_DOCUMENT_BYTES = 16 << 20
"""Largest line or document that is read, in bytes."""
BLOCK_BYTES, PLACES = 64 << 10, 64
"""Most bytes of lines that begin at one of the places of a file that is larger than wanted, and fewest such places."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
"""Suffixes of compressed files; they follow the suffix of what is inside."""
REFUSED = (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib", ".npy", ".npz", ".dill", ".safetensors")
"""Suffixes of files that can run code when opened, or hold no text."""
PACKED = (".zip", ".tar", ".tgz", ".7z", ".rar")
"""Suffixes of archives of many files."""
NOT_DATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
"""Files beside the data in a folder that the library `datasets` saved."""
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks and the encoding that each stands for, longest first where one begins another."""
LATIN = "Latin-1"


@dataclass
class Share:
    """How much of a file is wanted, and how much was taken."""

    bytes: int
    """Most bytes of text, decompressed."""
    documents: int
    """Most documents."""
    taken: int = 0
    """Bytes taken so far."""
    cut: bool = False
    """Whether more was there than wanted."""

    def take(self, count: int) -> bool:
        """Take so many bytes; whether there is still room afterwards."""
        self.taken += count
        return self.taken < self.bytes


@dataclass(frozen=True)
class Line:
    """A line of a file, with its end; or why it cannot be read."""

    key: str
    """Its number from 0, or ``@`` and its byte in a file that is read in part."""
    where: str
    """Its place in words."""
    text: str = ""
    fault: SourceError | None = None
    block: int = 0
    """Which of a sampled file's places it is from."""


@dataclass
class File:
    """One file to read.

    Raises SourceError if it is missing, no regular file or not readable.
    """

    path: Path
    label: str
    """What its documents' ids start with: its path within the given folder."""
    remarks: Remarks = field(default_factory=Remarks)
    share: Share = field(default_factory=lambda: Share(1 << 62, 1 << 62))
    on_hub: bool = False
    """Whether it is no file here but a data set of the hub, called as its label says."""

    @property
    def suffix(self) -> str:
        """The suffix that says what is inside, in small letters."""
        return suffix_of(self.path)

    @property
    def is_compressed(self) -> bool:
        return self.path.suffix.lower() in COMPRESSED

    @cached_property
    def size(self) -> int:
        """Bytes on disk."""
        return regular(self.path).st_size

    def open(self) -> IO[bytes]:
        """The bytes, decompressed."""
        regular(self.path)  # opening a pipe would wait for its writer
        try:
            return _decompressed(self.path)
        except OSError as error:
            raise self.unreadable(error) from None

    def unreadable(self, error: BaseException) -> SourceError:
        """The error for a file that cannot be read, or breaks off."""
        return SourceError(f"{self.path} cannot be read", got=getattr(error, "strerror", None) or first_line(error))

    @cached_property
    def head(self) -> bytes:
        """The first bytes: at most 1 MiB."""
        with self.open() as file:
            try:
                return file.read(1 << 20)
            except FAULTS as error:
                raise self.unreadable(error) from None

    @cached_property
    def encoding(self) -> str:
        """The encoding that the file's mark tells; UTF-8 without one."""
        return next((name for mark, name in MARKS.items() if self.head.startswith(mark)), "utf-8")

    def is_sampled(self, each: int = 0) -> bool:
        """Whether lines are taken from places all over the file, since there are more than wanted.

        each   about how many bytes a document takes; 0: a line is a document
        """
        return not self.is_compressed and "utf-8" in self.encoding and self.size > self._wanted(each)

    def _wanted(self, each: int) -> int:
        """How many bytes hold what is wanted, by the length of the first lines."""
        lines = self.head.count(b"\n")
        documents = self.share.documents
        if each or lines:
            return min(self.share.bytes, documents * each or documents * len(self.head) // lines)
        return self.share.bytes

    def lines(self, sampled: bool = True, each: int = 0) -> Iterator[Line]:
        """Yield the lines, up to the share: all of them in order, or those at places all over a file that is too large.

        A line that is not UTF-8 is read as Latin-1, and counted. A line over `MAX_DOCUMENT_BYTES` is passed over.
        """
        try:
            if "utf-8" not in self.encoding:
                yield from self._wide_lines()
            elif sampled and self.is_sampled(each):
                self.share.cut = True
                yield from self._sampled_lines(self._wanted(each))
            else:
                yield from self._all_lines()
        except FAULTS as error:
            raise self.unreadable(error) from None

    def _all_lines(self) -> Iterator[Line]:
        with self.open() as file:
            number = 0
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                where = f"line {number}"
                if len(line) > MAX_DOCUMENT_BYTES:
                    while not line.endswith(b"\n") and self.share.take(len(line)):
                        if not (line := file.readline(MAX_DOCUMENT_BYTES)):
                            break
                    yield Line(str(number - 1), where, fault=self._too_long(where))
                else:
                    yield Line(str(number - 1), where, self._decoded(line, where, number == 1))
                if not self.share.take(len(line)):
                    self.share.cut |= bool(file.read(1))
                    return

    def _sampled_lines(self, wanted: int) -> Iterator[Line]:
        block = min(BLOCK_BYTES, max(1, wanted // PLACES))
        count = max(1, wanted // block)
        with self.open() as file:
            for number in range(count):
                begin = self.size * number // count
                end = min(begin + block, self.size * (number + 1) // count)
                if begin:
                    file.seek(begin - 1)
                    skipped = file.readline(MAX_DOCUMENT_BYTES)  # the rest of a line that starts before
                    self.share.take(len(skipped))
                    if not skipped.endswith(b"\n"):
                        continue
                while (at := file.tell()) < end and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
                    where = f"byte {at}"
                    if len(line) > MAX_DOCUMENT_BYTES:
                        yield Line(f"@{at}", where, fault=self._too_long(where), block=number)
                    else:
                        yield Line(f"@{at}", where, self._decoded(line, where, at == 0), block=number)
                    if not self.share.take(len(line)):
                        return
                    if len(line) > MAX_DOCUMENT_BYTES:
                        break

    def _wide_lines(self) -> Iterator[Line]:
        with self.open() as file, io.TextIOWrapper(file, encoding=self.encoding, errors="replace") as text:
            number = 0
            while line := text.readline(MAX_DOCUMENT_BYTES // 2):
                number += 1
                if "\ufffd" in line:
                    self.remarks.add(
                        f"lines with bytes that are no {self.encoding.upper()}", f"{self.path}, line {number}"
                    )
                yield Line(str(number - 1), f"line {number}", line)
                if not self.share.take(2 * len(line)):
                    self.share.cut |= bool(text.read(1))
                    return

    def _decoded(self, line: bytes, where: str, first: bool) -> str:
        try:
            text = line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError:
            self.remarks.add(f"lines that are not UTF-8 read as {LATIN}", f"{self.path}, {where}")
            text = line.decode("cp1252", errors="ignore") if b"\0" not in line else line.decode("latin-1")
        return text.replace("\r\n", "\n")

    def _too_long(self, where: str) -> SourceError:
        return SourceError(
            f"{self.path}, {where} is too long",
            got=f"more than {MAX_DOCUMENT_BYTES >> 20} MiB",
            expected=f"at most {MAX_DOCUMENT_BYTES >> 20} MiB a line",
            remedy="cut the text into documents",
        )


FAULTS = (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError)
"""What reading a damaged or compressed file raises; those of pyarrow are among them."""


def suffix_of(path: Path) -> str:
    """The suffix in small letters that says what is inside, without that of a compression."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def regular(path: Path) -> os.stat_result:
    """The state of a regular file; raises SourceError for anything else, without opening it."""
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be read", got=getattr(error, "strerror", None) or str(error), expected="a file of text"
        ) from None
    if not stat.S_ISREG(state.st_mode):
        raise SourceError(
            f"{path} is no regular file",
            expected="a file of text",
            got=KINDS.get(stat.S_IFMT(state.st_mode), "something else"),
            remedy="write the text to a file first",
        )
    return state


def _decompressed(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".bz2":
        import bz2

        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    if suffix in (".zst", ".zstd"):
        try:
            import pyarrow
        except ImportError:
            raise MissingExtraError(
                f"{path} is compressed by zstd, which needs pyarrow", remedy="pip install 'tunediff[parquet]'"
            ) from None
        stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(stream)
    return open(path, "rb")


def find(given: Sequence[str | Path], readable: Iterable[str], remarks: Remarks) -> Iterator[File]:
    """Yield every file that these paths, folders and patterns name, in order.

    In a folder, files of other kinds, hidden ones and whatever is no regular file are passed over, and so are links
    that lead out of it. Raises SourceError where a path names nothing.
    """
    suffixes = tuple(readable)
    for path in map(Path, given):
        if os.path.isdir(path):
            yield from _inside(path, sorted(_walk(path, remarks)), suffixes, remarks)
        elif os.path.lexists(path):
            yield File(path, _label(path.name), remarks)
        elif glob.has_magic(str(path)):
            plain = Path(*path.parts[: next(n for n, part in enumerate(path.parts) if glob.has_magic(part))])
            files = _matching(plain, str(path.relative_to(plain)), remarks)
            if not files:
                raise SourceError(f"no file fits {path}", expected="a pattern that some file fits")
            yield from _inside(plain, files, suffixes, remarks)
        else:
            raise SourceError(
                f"{path} does not exist", expected="a file or folder of text, or a pattern such as data/*.jsonl"
            )


def _label(name: str) -> str:
    """A file's name as text: bytes that are none are replaced."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _matching(folder: Path, pattern: str, remarks: Remarks) -> list[Path]:
    """The files in a folder that fit a pattern, and those in its folders that do; no link to a folder is followed."""
    try:
        found = [path for path in folder.glob(pattern) if not _is_hidden(path.relative_to(folder))]
    except (OSError, RuntimeError, ValueError, NotImplementedError) as error:
        raise SourceError(
            f"{str(folder / pattern)[:200]} is no pattern of files", got=first_line(error), expected="data/*.jsonl"
        ) from None
    inner = [file for path in found if os.path.isdir(path) and not path.is_symlink() for file in _walk(path, remarks)]
    return sorted({*(path for path in found if not os.path.isdir(path)), *inner})


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _walk(folder: Path, remarks: Remarks) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        remarks.add("folders that cannot be read passed over", str(error.filename))

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root) / name for name in files if not name.startswith("."))


def _inside(folder: Path, paths: Sequence[Path], suffixes: tuple[str, ...], remarks: Remarks) -> Iterator[File]:
    home, count, outside = Path(os.path.realpath(folder)), 0, 0
    for path in paths:
        if suffix_of(path) not in suffixes or path.name in NOT_DATA or path.name.startswith("cache-"):
            continue
        if not Path(os.path.realpath(path)).is_relative_to(home):
            remarks.add("links out of the folder not followed", str(path))
            outside += 1
        elif not os.path.isfile(path):
            remarks.add("pipes, sockets and devices passed over", str(path))
        else:
            count += 1
            yield File(path, _label(path.relative_to(folder).as_posix()), remarks)
    if not count:
        raise SourceError(
            f"{folder} holds no file that can be read",
            expected=", ".join(suffixes),
            got=f"{outside} links out of the folder" if outside else "",
            remedy="name the files that the links lead to" if outside else "",
        )

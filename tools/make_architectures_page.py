"""Make docs/architectures.md by running every class: ``python tools/make_architectures_page.py [CLASS ...]``.

With names, only their rows are made anew. All of them take some ten minutes on one core.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny_architectures import Outcome, cases, outcome  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"

HEAD = """# Architectures

What becomes of every class that transformers {version} registers for causal language modeling. Each is built tiny and
random, with a random change as its fine-tune. Then it goes through a whole `diff`, and an edit is billed and baked.
This page is made by `tools/make_architectures_page.py`. The slow tests hold it to what it says, near-copies left out.

- *Reach* is the share of the difference in parameters that edits reach. The rest (convolutions, parts that text does not
  run) stays as tuned has it.
- *Shared prefixes*: rows that start alike run their prefix once. A network with a state of another kind than keys
  and values runs every row whole, which is slower and gives the same numbers.
- *Starts above*: a trial runs only the blocks above its site. In other networks higher blocks need more of the lower ones
  than the stream between them, so these run too.

Each of these is measured on loading, for the very network. So a class of your own, or one that came later, is read if its
logits come back from its blocks, and is refused otherwise.

{works} classes work, {refused} are refused, and {unbuilt} could not be built or run tiny by transformers itself.

"""
COLUMNS = "| class | state | reach | shared prefixes | starts above | reason |\n|---|---|---|---|---|---|\n"


def row(cls: str, found: Outcome) -> str:
    """One class as a line of the table."""
    yes = {True: "yes", False: "no"}
    facts = (f"{found.reach:.2f}", yes[found.shares], yes[found.resumes]) if found.state == "works" else ("", "", "")
    reason = found.reason.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return f"| {cls} | {found.state} | {' | '.join(facts)} | {reason} |"


def rows(page: str) -> dict[str, Outcome]:
    """The table of a page, by class."""
    found: dict[str, Outcome] = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else []
        if len(cells) == 6 and cells[0] != "class":
            cls, state, reach, shares, resumes, reason = cells
            reason = reason.replace("&lt;", "<").replace("\\|", "|")
            found[cls] = Outcome(state, reason, float(reach or 0), shares == "yes", resumes == "yes")
    return found


def main(chosen: list[str]) -> None:
    """Make all rows, or some of them, and write the page after each."""
    import torch
    import transformers

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    known = cases()
    said = rows(PAGE.read_text()) if PAGE.is_file() else {}
    made = {cls: found for cls, found in said.items() if cls in known} if chosen else {}
    for cls in chosen or known:
        with tempfile.TemporaryDirectory() as folder:
            made[cls] = outcome(known[cls], Path(folder))
        print(row(cls, made[cls]), flush=True)
        count = {state: sum(one.state == state for one in made.values()) for state in ("works", "refused", "not built")}
        head = HEAD.format(
            version=transformers.__version__, works=count["works"], refused=count["refused"], unbuilt=count["not built"]
        )
        table = "\n".join(row(one, made[one]) for one in known if one in made)
        PAGE.write_text(head + COLUMNS + table + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])

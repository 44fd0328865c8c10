"""The lab's commands: is the tool right? Thresholds calibrated, methods compared, limits measured, organisms made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tunediff.cli.options import RUNS, Base, Json, Quiet, Runs, Set, listed, progress_bar, show, table
from tunediff.core.artifacts import write_json
from tunediff.core.errors import SettingError
from tunediff.core.text import slug

organism_app = typer.Typer(no_args_is_help=True, help="Fine-tuned models whose planted behaviors are known.")

OrganismName = Annotated[
    str, typer.Argument(help="A name that `tunediff organism list` prints, or an import path (`mylab.tunes:ORGANISM`).")
]
BaseModel = Annotated[str, typer.Option("--base", help="Base model: a folder, or `default`.")]


def calibrate(
    base: Base,
    count: Annotated[int, typer.Option(help="Untrained fine-tunes; each takes about as long as a diff.", min=0)] = 9,
    placebo: Annotated[
        list[Path] | None, typer.Option(help="A placebo fine-tune of this base: a harder null; repeatable.")
    ] = None,
    runs: Runs = RUNS,
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how high pairs of BASE with nothing to find score; `diff` then asks for more than that."""
    bar = progress_bar(quiet)
    from tunediff.lab.nulls import calibrate as measure

    if not count and not placebo:
        raise SettingError("there is nothing to calibrate on", expected="--count above 0, or --placebo")
    folder = runs / f"calibrate-{slug(Path(base).name)}"
    tunes = list(map(str, placebo or ()))
    done = measure(base, count, folder, tunes=tunes, settings=set_ or (), progress=bar)
    path = done.save()
    rows = [
        {"null": null.name, "best score": null.score, "gap, nat": null.gap, "standing, nat": null.standing}
        for null in done.nulls
    ]
    claimed = sum(null.gap > 0 or null.standing > 0 for null in done.nulls)
    show(
        done,
        json,
        f"{table(rows)}\n{claimed} of {len(rows)} claimed; a change of this base now has to score above {done.score:.3g}, "
        f"where the models are more than {done.gap:.2g} nat apart; tokens have to stand above {done.standing:.2g} nat\n"
        f"kept    {path}",
    )


def bench(
    out: Annotated[Path, typer.Option(help="Folder of results; a cell whose result is in it is not run again.")] = RUNS
    / "bench",
    base: Annotated[
        str, typer.Option(help="Base of all fine-tuned models: a folder, hub id, or `default`.")
    ] = "default",
    tunes: Annotated[
        Path | None, typer.Option(help="Folder of models made by `organism make`, each in a folder of its name.")
    ] = None,
    nulls: Annotated[
        str, typer.Option(help="Nulls, NAME or NAME:SEED, comma-separated.")
    ] = "random:0,permuted:0,identical",
    methods: Annotated[str, typer.Option(help="Methods, comma-separated; all if empty.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0",
    only: Annotated[
        str,
        typer.Option(
            help="Run these models and nulls alone, names comma-separated; so several processes can share the work."
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Takes minutes: the shipped model, one null, two methods, a small budget.")
    ] = False,
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Test every method the same way on fine-tuned models whose truth is known and on nulls, and print the table."""
    bar = progress_bar(quiet)
    from tunediff.lab import bench as b
    from tunediff.lab.score_tables import table as score_table

    if quick:
        tunes, nulls, methods = None, "random:0", methods or "decision_clusters,random_directions"
    things = b.tunes(tunes, listed(nulls, str), base)
    wanted = set(listed(only, str))
    if unknown := wanted - {t.name for t in things}:
        raise SettingError(f"there is no tune {min(unknown)!r}", expected=", ".join(t.name for t in things))
    if wanted:
        things = [t for t in things if t.name in wanted]
    elif quick:
        things = [t for t in things if t.null or t.name == "two-objectives"]
    settings = [*(b.QUICK if quick else ()), *(set_ or ())]
    chosen = listed(methods, str) or list(b.METHODS)
    cells = b.bench(things, chosen, listed(seeds, int), out, base=base, settings=settings, progress=bar)
    b.write(out, "tunediff bench" + (" --quick" if quick else ""))
    rows = score_table(cells)
    show(rows, json, f"{table(rows)}\npage    {out / 'benchmark.md'}")


def floor(
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = RUNS / "floor",
    background: Annotated[
        float,
        typer.Option(
            help="Norm of a random change of every weight matrix, as a share of the matrix's norm: the noise that the "
            "planted change must stand out from; 0: none.",
            min=0,
        ),
    ] = 0.003,
    methods: Annotated[
        str, typer.Option(help="Methods, comma-separated, of those that read streams alone.")
    ] = "delta,batchtopk,diff_sae,principal,mean_difference",
    amplitudes: Annotated[
        str, typer.Option(help="Lengths of the planted vector, comma-separated, in units of the stream's norm.")
    ] = "0.02,0.05,0.1,0.2,0.5",
    frequencies: Annotated[
        str, typer.Option(help="Shares of tokens that the vector is added at, comma-separated.")
    ] = "0.002,0.01,0.05",
    tokens: Annotated[int, typer.Option(help="Tokens of the default corpus.", min=500)] = 12_000,
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0",
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plant known changes in BASE, from weak and rare to strong and frequent; print the weakest that are found."""
    bar = progress_bar(quiet)
    from tunediff.lab import detection
    from tunediff.lab.bench import METHODS
    from tunediff.lab.nulls import untrained
    from tunediff.records.site import Site
    from tunediff.texts.corpus import Corpus

    names = listed(methods, str)
    if unknown := [name for name in names if name not in METHODS]:
        raise SettingError(f"there is no method {unknown[0]!r}", expected=", ".join(METHODS))
    chosen = {name: (*(set_ or ()), *METHODS[name]) for name in names}
    strengths, shares, numbers = listed(amplitudes, float), listed(frequencies, float), listed(seeds, int)
    pair = untrained(base, background, 0)
    text = detection.Text(
        pair.base,
        pair.tuned if background else pair.base,
        Corpus.default().tokens(pair.tokenizer, limit_tokens=tokens),
        Site(round(0.4 * pair.base.depth)),
        Site(round(0.67 * pair.base.depth)),
    )
    found = detection.grid(text, chosen, strengths, shares, numbers, out / "dictionaries", bar)
    bar.close()
    out.mkdir(parents=True, exist_ok=True)
    result = {"base": base, "background": background, "write": str(text.write), "read": str(text.read)}
    write_json(out / "floor.json", {**result, "tokens": len(text.ids_N), "detections": found})
    show(
        found,
        json,
        f"{table(detection.floor(found))}\nsmallest amplitude, in units of the stream's norm at {text.write}, from which "
        f"on the change is found at {text.read}; by share of tokens",
    )


@organism_app.command("list")
def organism_list(
    json: Json = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="Print the key of blinded ids; keep it from whoever is to guess.")
    ] = False,
    salt: Annotated[str, typer.Option(help="Text that the blinded ids depend on.")] = "tunediff",
) -> None:
    """List the organisms that tunediff can make."""
    from tunediff.lab import organisms

    if blind:
        show(sorted(({"id": o.blinded(salt), "name": o.name} for o in organisms.every()), key=lambda r: r["id"]), json)
        return
    rows = []
    for o in organisms.every():
        behaviors = (f"{b.name} ({'wanted' if b.wanted else 'unwanted'})" for b in o.behaviors)
        rows.append({"name": o.name, "base": o.base, "behaviors": ", ".join(behaviors) or "none", "summary": o.summary})
    show(rows, json)


@organism_app.command("make")
def organism_make(
    name: OrganismName,
    out: Path,
    base: BaseModel = "default",
    seed: Annotated[int, typer.Option(help="Seed of the examples, the initial weights and the order.")] = 0,
    template: Annotated[
        Path | None, typer.Option(help="Chat template (Jinja) to train in, for a base that has none.", exists=True)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the first step; by default the recipe's.", min=1e-8)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train an organism from its recipe, measure it, and write the model with its card to OUT."""
    bar = progress_bar(quiet)
    from tunediff.lab import organisms
    from tunediff.lab.training import make

    organism = organisms.named(name).seeded(seed)
    if learning_rate is not None:
        organism = replace(organism, recipe=replace(organism.recipe, learning_rate=learning_rate))
    card = make(organism, base, out, bar, template)
    bar.close()
    show(card, json=True)


@organism_app.command("check")
def organism_check(
    name: OrganismName, folder: Path, base: BaseModel = "default", json: Json = False, quiet: Quiet = False
) -> None:
    """Measure a model made from this organism: behaviors, leaks and health, base beside tuned; writes its card anew."""
    progress_bar(quiet)
    from tunediff.lab import organisms
    from tunediff.lab.training import check, health

    card = check(organisms.named(name), base, folder)
    show(card, json, table(health(card)))

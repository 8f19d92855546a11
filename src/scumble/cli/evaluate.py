"""`scumble evaluate RUN-OR-FILE`: what an adapter learned, obeys, broke and copied, and which checkpoint is best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scumble.cli.options import DtypesOf, Rest, parse_dtypes

if TYPE_CHECKING:
    from scumble.evaluation.result import Evaluation, Judged


def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="RUN-OR-FILE", help="A run's folder, or an adapter's file or folder.")
    ],
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Every checkpoint of the run, and recommend one.")
    ] = False,
    pictures: Annotated[int, typer.Option(min=2, help="Pictures of the subject in new scenes.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each scene.")] = 2,
    unrelated: Annotated[int, typer.Option(min=0, help="Unrelated prompts; 0 leaves drift out.")] = 50,
    subject: Annotated[
        str | None,
        typer.Option(
            help="What prompts call it: 'sks dog', 'in woodcut style'. Unset: what all captions share."
        ),
    ] = None,
    class_phrase: Annotated[
        str | None,
        typer.Option("--class", help="Its class: 'dog'. Unset: the subject's last word; '' leaves it out."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The training pictures. Unset: those in the run's settings.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base. Unset: the one of the run.")] = None,
    rest: Rest = None,
    clip: Annotated[
        str | None,
        typer.Option(help="A CLIP model for real bases: a folder, or a Hub id in the local cache."),
    ] = None,
    dino: Annotated[str | None, typer.Option(help="A DINO model, likewise.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps a picture.")] = 25,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance. Unset: the base's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides prompts, noise and intervals.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the page. Unset: evaluation/ in the run.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="no (fp32), bf16 or fp16.")] = "no",
    dtypes: DtypesOf = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Unset: the best there is.")
    ] = None,
) -> None:
    """Measure what an adapter learned, obeys, broke and copied."""
    from scumble.evaluation.evaluate import evaluate as run
    from scumble.evaluation.result import EvaluationSettings
    from scumble.runs.train import progress

    settings = EvaluationSettings(
        pictures=pictures, seeds=seeds, unrelated=unrelated, steps=steps, guidance=guidance, seed=seed
    )
    with progress("drawing", quiet=False) as told:
        found = run(
            source,
            settings=settings,
            checkpoints=checkpoints,
            subject=subject,
            class_phrase=class_phrase,
            images=images,
            base=base,
            rest=rest,
            clip=clip,
            dino=dino,
            output=output,
            device=device,
            dtype=dtype,
            dtypes=parse_dtypes(dtypes),
            progress=told,
        )
    _show(found)
    typer.echo(found.page)


def _show(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    said = Console(stderr=True, highlight=False, soft_wrap=True)
    for note in found.notes:
        said.print(f"note: {note}", style="yellow", markup=False)
    said.print(
        f"subject: {found.concept.phrase}; {len(found.concept.pictures)} training pictures", markup=False
    )
    best = found.recommended or found.judged[-1]
    table = Table("", "adapter", "95 %", "base", title=best.candidate.label, title_justify="left")
    for measured in best.scores.measures:
        table.add_row(
            f"{measured.section}: {measured.name}",
            f"{measured.adapter.value:.3g}",
            f"{measured.adapter.low:.3g} to {measured.adapter.high:.3g}",
            f"{measured.base.value:.3g}" if measured.base else "",
        )
    said.print(table)
    if len(found.judged) > 1:
        for one in found.judged:
            said.print(_line(one, one is found.recommended), markup=False)


def _line(one: Judged, recommended: bool) -> str:
    words = [
        f"{word} {value:.0%}" if value is not None else f"{word} not measured"
        for word in ("learned", "obeys", "kept", "overall")
        for value in [getattr(one.scores, word)]
    ]
    return f"{one.candidate.label}: {', '.join(words)}{'  <- recommended' if recommended else ''}"

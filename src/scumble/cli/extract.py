"""`scumble extract TUNED BASE`: a LoRA from a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scumble.cli.options import Out, Overwrite, SaveAs, Variant, counting


def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model: a diffusers folder or a checkpoint.")],
    base: Annotated[str, typer.Argument(help="What it was made from: the same, or 'picturebook'.")],
    out: Out,
    rank: Annotated[
        int | None, typer.Option(min=1, help="At most this rank. 32 if no share is given.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of each layer's squared difference, e.g. 0.9.")
    ] = None,
    frobenius: Annotated[
        float | None, typer.Option(help="Keep this share of the norm; the root of an energy.")
    ] = None,
    variant: Variant = None,
    save_as: SaveAs = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    overwrite: Overwrite = False,
) -> None:
    """Make a LoRA of a fine-tuned model's difference to its base."""
    from rich.console import Console

    from scumble.adapters.factors import Keep
    from scumble.runs.extract import extract_from_base
    from scumble.runs.rework import dtype_called, refuse_existing, save

    said = Console(stderr=True, highlight=False, soft_wrap=True)
    if rank is None and energy is None and frobenius is None:
        rank = 32
    keep, number = Keep(rank, energy, frobenius), dtype_called(dtype)
    refuse_existing(out, overwrite, [Path(tuned), Path(base)])
    with counting("extracting", said) as bar:
        task = bar.add_task("", total=None)
        found = extract_from_base(
            tuned,
            base,
            keep,
            variant=variant,
            progress=lambda n, total: bar.update(task, completed=n, total=total),
        )
    work = {"work": "extract", "tuned": tuned, "base": base}
    written = save(found.lora.state, out, dialect=save_as, dtype=number, work=work)
    kept = found.lora.kept.values()
    said.print(
        f"{len(kept)} layers differ, {len(found.lora.unchanged)} are equal; kept {min(kept):.1%} (least) to "
        f"{max(kept):.1%} of a layer's energy"
    )
    for note in found.notes:
        said.print(f"note: {note}", style="yellow", markup=False)
    typer.echo(written)

"""`scumble generate PROMPT`: draw pictures with a base and adapters, settings kept in each PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scumble.cli.options import DtypesOf, Offload, Quantization, Rest, parse_dtypes
from scumble.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from scumble.inference.request import AdapterUse, Request
    from scumble.inference.session import Session


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="FILE[:STRENGTH]",
            help="An adapter's file, folder or Hub id; :0.5 halves it, :0 turns it off. Repeatable.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="'picturebook', a Hub id, a diffusers folder or a .safetensors checkpoint. "
            "Unset: the one that the first adapter was made for."
        ),
    ] = None,
    rest: Rest = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures; each has its own seed.")] = 1,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels, e.g. 512x768. Unset: the base's own.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Classifier-free guidance; 1 or less turns it off. Unset: the base's own."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first picture; the next have seed + 1, + 2, ...")
    ] = 0,
    image: Annotated[
        Path | None, typer.Option(help="A picture to paint into, with an inpainting base and --mask.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Where: a grey picture of the same size, white is painted.")
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help="A diffusers scheduler by its class name.")
    ] = "DPMSolverMultistepScheduler",
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder, or a .png file.")] = Path(),
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="One PNG: the base's pictures beside the adapters', from the same seeds."
        ),
    ] = False,
    allow_partial: Annotated[
        bool,
        typer.Option("--allow-partial", help="Use what fits of an adapter when some of its tensors do not."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="no (fp32), bf16 or fp16.")] = "no",
    dtypes: DtypesOf = None,
    quantization: Quantization = "none",
    offload: Offload = "none",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Unset: the GPU if there is one.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once, at most.")] = 4,
) -> None:
    """Draw pictures with a base and adapters."""
    from rich.console import Console

    from scumble.inference.canvas import canvas_of
    from scumble.inference.request import Request
    from scumble.inference.session import Session
    from scumble.models.precision import dtype_named

    uses = tuple(parse_use(text) for text in adapter or ())
    width, height = (None, None) if size is None else parse_size(size)
    if compare and not uses:
        raise ConfigError(
            "--compare needs something to compare with the base: name an adapter with --adapter."
        )
    request = Request(
        prompt=prompt,
        negative=negative,
        count=count,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        seed=seed,
        image=image,
        mask=mask,
        scheduler=scheduler,
        adapters=uses,
    )
    canvas_of(request)  # what is wrong with it is said before a base is loaded
    said = Console(stderr=True, highlight=False, soft_wrap=True)
    with Session(
        base,
        uses,
        dtype=dtype_named(dtype),
        device=device,
        batch_size=batch,
        allow_partial=allow_partial,
        rest=rest,
        dtypes=parse_dtypes(dtypes) or None,
        quantization=quantization,
        offload=offload,
    ) as session:
        session.size(request)
        _report(session, uses, said)
        files, notes = (_compared if compare else _drawn)(session, request, out, said)
    for note in notes:
        said.print(f"note: {note}", style="yellow", markup=False)
    for file in files:
        typer.echo(file)


def parse_use(text: str) -> AdapterUse:
    """`FILE[:STRENGTH]` -> AdapterUse. A colon that no number follows belongs to the path
    (`C:\\fox.safetensors`)."""
    from scumble.inference.request import AdapterUse

    path, colon, strength = text.rpartition(":")
    if colon and path and not Path(text).exists():
        try:
            return AdapterUse(path=Path(path), strength=float(strength))
        except ValueError:
            if "." not in strength and "/" not in strength and "\\" not in strength:
                raise ConfigError(
                    f"--adapter {text}: {strength!r} is not a strength. Write a number, e.g. {path}:0.8"
                ) from None
    return AdapterUse(path=Path(text))


def parse_size(text: str) -> tuple[int, int]:
    """`WxH`, or one number for both -> (width, height) in pixels.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:[xX*](\d+))?", text.strip())
    if not found:
        raise ConfigError(f"--size {text!r} is not a size. Write width x height in pixels, e.g. 512x768.")
    width, height = int(found[1]), int(found[2] or found[1])
    return width, height


def _report(session: Session, uses: tuple[AdapterUse, ...], said: Console) -> None:
    said.print(
        f"base: {session.base.name} ({session.base.family}) on {session.base.device}",
        style="dim",
        markup=False,
    )
    for note in session.base.notes:
        said.print(f"note: {note}", style="yellow", markup=False)
    for resident, use in zip(session.residents, uses, strict=True):
        exact = "; trained on this very base" if resident.match.kinship == "exact" else ""
        said.print(f"{use.path} at {use.strength:g}: {resident.report}{exact}", style="green", markup=False)
        for note in resident.notes:
            said.print(f"note: {note}", style="yellow", markup=False)


def _drawn(
    session: Session, request: Request, out: Path, said: Console
) -> tuple[list[Path], tuple[str, ...]]:
    with _bar(said) as progress:
        drawings = session.generate(request, progress)
    if out.suffix.lower() != ".png":
        files = [
            drawing.save(_free(out / f"{slug(request.prompt)}-{drawing.seed}.png")) for drawing in drawings
        ]
    elif len(drawings) == 1:
        files = [drawings[0].save(out)]
    else:
        files = [drawing.save(out.with_name(f"{out.stem}-{drawing.seed}.png")) for drawing in drawings]
    return files, tuple(dict.fromkeys(note for drawing in drawings for note in drawing.notes))


def _compared(
    session: Session, request: Request, out: Path, said: Console
) -> tuple[list[Path], tuple[str, ...]]:
    """One sheet: a row for each seed, the base's picture beside the adapters'."""
    from scumble.inference.drawing import grid
    from scumble.inference.png import write_png

    bare = request.model_copy(
        update={"adapters": tuple(use.model_copy(update={"strength": 0.0}) for use in request.adapters)}
    )
    with _bar(said) as progress:
        before = session.generate(bare, lambda done, total: progress(done, 2 * total))
        after = session.generate(request, lambda done, total: progress(total + done, 2 * total))
    names = " + ".join(f"{use.path.stem} {use.strength:g}" for use in request.adapters)
    sheet = grid(
        [[one.image, other.image] for one, other in zip(before, after, strict=True)],
        columns=("base", names if len(names) <= 24 else "adapter" + "s" * (len(request.adapters) > 1)),
        labels=[f"{request.prompt} · seed {drawing.seed}" for drawing in after],
    )
    file = (
        out
        if out.suffix.lower() == ".png"
        else _free(out / f"{slug(request.prompt)}-{request.seed}-compare.png")
    )
    whole = after[0].request.model_copy(update={"count": request.count})
    settings = {**after[0].settings, "sheet": "base beside adapters, a row for each seed"}
    notes = tuple(dict.fromkeys(note for drawing in after for note in drawing.notes))
    return [write_png(sheet, file, whole, settings)], notes


def slug(prompt: str) -> str:
    """A prompt as part of a file name: at most 40 characters, letters, digits and hyphens."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:40].rstrip("-")
    return words or "picture"


def _free(path: Path) -> Path:
    """`path`, or with -2, -3, ... where there is such a file: a drawing never takes the place of another."""
    for number in range(2, 100_000):
        if not path.exists():
            return path
        stem = path.stem if number == 2 else path.stem.rpartition("-")[0]
        path = path.with_name(f"{stem}-{number}{path.suffix}")
    raise ConfigError(f"{path.parent} is full of pictures of this name. Choose another folder with --out.")


@contextmanager
def _bar(said: Any) -> Iterator[Callable[[int, int], None]]:
    """A bar of denoising steps on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("drawing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=said,
        transient=True,
        disable=not said.is_terminal,
    ) as bar:
        task = bar.add_task("drawing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

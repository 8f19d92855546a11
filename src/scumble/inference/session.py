"""Session: a base that stays loaded, its adapters, and `generate`."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeAlias, cast

import torch
from PIL import Image
from torch import Tensor, nn

from scumble.adapters import Adapter
from scumble.adapters.layers import places
from scumble.errors import AdapterError, ModelError, OutOfMemory, PrecisionError
from scumble.inference import attach
from scumble.inference.canvas import Canvas, canvas_of
from scumble.inference.drawing import Drawing
from scumble.inference.find_base import find_base, find_rest, locate
from scumble.inference.provenance import Match
from scumble.inference.request import AdapterUse, Request
from scumble.inference.schedulers import build_scheduler, suits, unsuitable
from scumble.models.family import BaseModel
from scumble.models.loading import load_base
from scumble.models.shortage import ERRORS, Shortage, recover, shortage_of, telling
from scumble.tensor_files.dtypes import word_of

Progress: TypeAlias = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all), summed over the request's pictures."""

ADAPTER_BYTES = 4 * 2**30
"""What resident adapters may take, unless told otherwise: some three hundred of rank 16 on SD 1.5's attention."""

BLACK = 1.0
"""A picture whose 256 levels have a standard deviation below this shows nothing."""

_LOADED_SMALLER = "What needs less: --dtype bf16, --quantization int8 or nf4, and on a GPU --offload blocks."

_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in memory: in the model, at strength 0 unless a request uses it."""

    file: Path
    stamp: tuple[int, int]
    """(modification time in ns, bytes): a file that is written anew is read anew."""
    adapter: Adapter
    report: str
    """`"applied 128/128 unet layers, 0 unused tensors"`"""
    notes: tuple[str, ...]
    sha256: str
    match: Match
    """Whether the base is the one that it was trained on."""
    size: int
    """Bytes of its tensors in memory."""


@dataclass(frozen=True)
class _Picture:
    """One picture of a request."""

    request: Request
    """With count 1, its own seed, and everything written out."""
    canvas: Canvas | None
    words: tuple[Path, ...]
    """Files of those of its adapters that bring words: a prompt is read with all words that are in."""

    @property
    def kind(self) -> object:
        """Pictures of one kind may be drawn at once."""
        asked = self.request
        return (
            *(asked.width, asked.height, asked.steps, asked.guidance, asked.scheduler),
            *(bool(asked.negative), asked.image, asked.mask, self.words),
        )


class Session:
    """A base that stays loaded, adapters that stay resident, pictures by request.

        with Session("picturebook", ["runs/fox/pytorch_lora_weights.safetensors"]) as session:
            session.generate(Request(prompt="a small red fox"))[0].save("fox.png")
            session.generate([Request(prompt="a fox", adapters=(fox,)), Request(prompt="a hen", adapters=(ink,))])

    A request's own `adapters` are the ones that act; a request without any gets the session's. Each is read
    once, and switched by its strength, which is one assignment. Those that were not used for longest leave
    when together they take more than `adapter_bytes`; a request that names one of them reads it again. Between
    requests none acts,
    and `close` takes them all out: the base is then as it was.

    Laws: a picture depends on its request and the base, never on earlier requests nor on the batch it was
    drawn in (beyond rounding); with every strength 0 it is bit-identical to the base's; torch's global
    generators, the modules' modes and their parameters are left as they were.

    Not for several threads at once: strengths are a state of the model.
    """

    def __init__(
        self,
        base: BaseModel | str | Path | None = None,
        adapters: Sequence[AdapterUse | str | Path] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 4,
        allow_partial: bool = False,
        adapter_bytes: int = ADAPTER_BYTES,
        rest: str | Path | None = None,
        dtypes: Mapping[str, str | torch.dtype] | None = None,
        quantization: str = "none",
        offload: str = "none",
    ) -> None:
        """
        Args:
            base: a loaded base, or what `load_base` takes; None asks the first adapter which base it was made
                for.
            adapters: files, folders, Hub ids or `AdapterUse`s that act where a request names none.
            dtype: of a base that is loaded here; None is fp32.
            device: of a base that is loaded here; None takes the GPU if there is one.
            batch_size: pictures drawn at once, at most.
            allow_partial: use what fits of an adapter's file when some of its tensors do not, and say so.
            adapter_bytes: what resident adapters may take together; those that a request names are kept
                whatever they take.
            rest: what `load_base` takes, of a base that is loaded here: where a single file gets the components from
                that it does not hold. None asks the first adapter, where that says the base.
            dtypes: what `load_base` takes, of a base that is loaded here: component -> a dtype of its own.
            quantization: what `load_base` takes, of a base that is loaded here: "int8", "fp8", "nf4" or "none".
            offload: what `load_base` takes, of a base that is loaded here: "blocks" or "none".

        Raises:
            ModelError: there is no base, or it can't be loaded.
            FormatError, NoEffect: an adapter can't be used with it.
        """
        uses = [use if isinstance(use, AdapterUse) else AdapterUse(path=Path(use)) for use in adapters]
        if isinstance(base, BaseModel):
            told = any(one is not None for one in (dtype, device, rest, dtypes))
            if told or {quantization, offload} != {"none"}:
                raise ModelError(
                    "dtype, dtypes, quantization, offload, device and rest are for a base that is loaded here; this "
                    "one is loaded already. Leave them out."
                )
            self.base = base
        else:
            self.base = _load(base, uses, dtype, device, rest, dtypes, quantization, offload)
        self.batch_size = max(1, batch_size)
        self._allow_partial = allow_partial
        self._adapter_bytes = adapter_bytes
        self._defaults = tuple(uses)
        self._residents: dict[Path, Resident] = {}
        self._recent: dict[Path, None] = {}
        """Files of residents, the least recently used first; `_residents` has the order of attachment."""
        self._evicted: dict[Path, None] = {}
        self._located: dict[Path, Path] = {}
        self._pipeline = cast(Any, self.base.pipeline())
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = self._pipeline.scheduler
        try:
            self._all(uses)
        except BaseException:
            self.close()
            raise

    @property
    def residents(self) -> tuple[Resident, ...]:
        """The adapters in memory, with the report of how each was read."""
        return tuple(self._residents.values())

    @property
    def evicted(self) -> tuple[Path, ...]:
        """Files of adapters that left for want of room and were not read again since, the longest gone first."""
        return tuple(self._evicted)

    def generate(
        self, request: Request | Sequence[Request], progress: Progress | None = None
    ) -> list[Drawing]:
        """Draw what `request` asks for: `request.count` pictures, the n-th from seed + n; of several requests, in
        their order.

        Pictures of several requests are drawn together where they agree in size, steps, guidance, scheduler,
        the picture they paint into, whether there is a negative prompt, and the words that adapters bring. Each
        has its own prompt and its own adapters at its own strengths, and is the picture drawn alone, beyond
        rounding.

        Raises:
            ModelError: the size or the scheduler doesn't suit the base, or it can't paint into a picture.
            ConfigError, DataError: the picture to paint into, or its mask, is missing or can't be used.
            UnknownName: there is no such scheduler.
            OutOfMemory: there is too little for one picture. Where it is too little for several at once, fewer are
                drawn at once, and a note of the first says so.
            FormatError, NoEffect, AdapterError: an adapter can't be used. Of several requests, all are looked at
                before the first is drawn.
        """
        requests = [request] if isinstance(request, Request) else list(request)
        pictures = [picture for one in requests for picture in self._pictures(one)]
        drawings: dict[int, Drawing] = {}
        before, steps = 0, sum(picture.request.steps for picture in pictures)
        waiting, most, noted = deque(self._batches(pictures)), self.batch_size, ""
        while waiting:
            numbers = waiting.popleft()
            if len(numbers) > most:
                waiting.appendleft(numbers[most:])
                numbers = numbers[:most]
            batch = [pictures[number] for number in numbers]
            asked = batch[0].request.steps
            drawn = self._tried(batch, _shared(progress, before, asked, len(batch), steps))
            if isinstance(drawn, Shortage):
                if len(batch) == 1:
                    raise OutOfMemory(self._too_large(batch[0].request, drawn))
                most = len(batch) // 2
                noted = (
                    f"There was not enough {drawn.memory} for {len(batch)} pictures at once: they are drawn "
                    f"{'one by one' if most == 1 else f'{most} at once'}."
                )
                waiting.appendleft(numbers)
                continue
            if noted:
                drawn[0], noted = replace(drawn[0], notes=(*drawn[0].notes, noted)), ""
            drawings.update(zip(numbers, drawn, strict=True))
            before += asked * len(batch)
        return [drawings[number] for number in range(len(pictures))]

    def _tried(self, batch: Sequence[_Picture], progress: Progress | None) -> list[Drawing] | Shortage:
        """Pictures of one kind, or why there is too little memory for so many at once."""
        try:
            return self._draw(batch, progress)
        except ERRORS as error:
            lack = shortage_of(error)
            if lack is None:
                raise
            recover(error)
            return lack

    def _too_large(self, request: Request, lack: Shortage) -> str:
        """What is said where there is too little memory for a single picture."""
        base = self.base
        smaller = [f"a smaller size (it is {request.width}x{request.height})"]
        if base.dtype == torch.float32:
            smaller.append("--dtype bf16")
        if base.quantization == "none":
            smaller.append("--quantization int8")
        if lack.gpu and base.offloaded is None:
            smaller.append("--offload blocks")
        return (
            f"Out of {lack.memory} while one picture of {request.width}x{request.height} pixels was drawn by "
            f"{base.name}. {lack} What needs less: {'; '.join(smaller)}."
        )

    def size(self, request: Request) -> tuple[int, int]:
        """(width, height) of a request's pictures in pixels: its own, that of the picture it paints into, or the
        base's.

        Raises:
            ModelError: the base can't draw that size; the text names the nearest that it can.
            ConfigError, DataError: the picture to paint into, or its mask, is missing or can't be used.
        """
        return self._size(request, canvas_of(request))

    def _size(self, request: Request, canvas: Canvas | None) -> tuple[int, int]:
        step = self.base.size_multiple
        usual = (self.base.resolution,) * 2 if canvas is None else canvas.image.size
        sides = (request.width or usual[0], request.height or usual[1])
        for word, side in zip(("width", "height"), sides, strict=True):
            if side < step or side % step:
                below = max(step, side // step * step)
                near = f"{below} or {below + step}" if side > step else f"{step}"
                raise ModelError(
                    f"{word} {side} doesn't suit {self.base.name}: its sides must be multiples of {step} "
                    f"pixels. Nearest: {near}."
                )
        return sides

    def unload(self, path: str | Path) -> None:
        """Take an adapter out of memory. A request that names it reads it again.

        Raises:
            AdapterError: it isn't resident.
        """
        file = self._file(Path(path))
        if file not in self._residents:
            raise AdapterError(f"{path} is not in memory, so it can't be unloaded.")
        self._leave(file)

    def close(self) -> None:
        """Take every adapter out: the base is the very one from before."""
        self._recent.clear()
        while self._residents:
            _, resident = self._residents.popitem()
            if resident.adapter.attached:
                resident.adapter.eject()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Adapters

    def _all(self, uses: Sequence[AdapterUse]) -> list[Resident]:
        wanted = {self._file(use.path) for use in uses}
        residents = [self._resident(use.path, wanted) for use in uses]
        for number, resident in enumerate(residents):
            if resident in residents[:number]:
                raise AdapterError(
                    f"{resident.file} is named twice. Name it once; strengths of one file are not added up."
                )
        return residents

    def _file(self, path: Path) -> Path:
        # Hub ids are looked up once; what is on this machine is cheap, and may change.
        known = self._located.get(path)
        if known is not None and not path.exists() and known.exists():
            return known
        self._located[path] = locate(path).resolve()
        return self._located[path]

    def _resident(self, path: Path, wanted: Collection[Path]) -> Resident:
        """The adapter of one file, read if it must be; none of `wanted` leaves for it."""
        file = self._file(path)
        status = file.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._residents.get(file)
        if known is not None and known.stamp == stamp:
            self._recent[file] = self._recent.pop(file)
            return known
        there = places(self.base.roots, norms=True)
        found, match, notes = attach.read_checked(
            file, attach.shapes_of(there), self._allow_partial, self._pipeline, self.base.roots, self.base
        )
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = sum(
            tensor.numel() * tensor.element_size()
            for layer in found.state.layers.values()
            for tensor in layer.tensors.values()
        )
        self._make_room(size, wanted)
        adapter = Adapter.load(
            self.base.roots,
            found.state,
            name=f"{file.stem} #{next(_numbers)}",
            strength=0.0,
            vocabularies=self.base.vocabularies,
            there=there,
            fresh=True,
        )
        if known is not None:
            self._leave(file)
        self._residents[file] = Resident(
            file, stamp, adapter, f"applied {found.report}", notes, digest, match, size
        )
        self._recent[file] = None
        self._evicted.pop(file, None)
        return self._residents[file]

    def _make_room(self, size: int, wanted: Collection[Path]) -> None:
        """Let the least recently used leave until `size` bytes more fit, or only what is wanted is left."""
        for file in [file for file in self._recent if file not in wanted]:
            if sum(resident.size for resident in self._residents.values()) + size <= self._adapter_bytes:
                return
            self._leave(file)
            self._evicted[file] = None

    def _leave(self, file: Path) -> None:
        del self._recent[file]
        self._residents.pop(file).adapter.eject()

    @contextmanager
    def _acting(self, shares: Mapping[Resident, Sequence[float]]) -> Iterator[None]:
        """These adapters, each at its strengths for the pictures of a batch, and no other of the session's."""
        try:
            for turn, (resident, strengths) in enumerate(shares.items()):
                # Floating-point sums depend on the order: it must be the requests', whatever came in first.
                resident.adapter.turn = turn
                same = len(set(strengths)) == 1
                resident.adapter.strength = (
                    strengths[0] if same else torch.tensor(strengths, dtype=torch.float64)
                )
            yield
        finally:
            for resident in shares:
                resident.adapter.strength = 0.0

    # Drawing

    def _pictures(self, request: Request) -> list[_Picture]:
        """The pictures of a request; its adapters are in memory, if they fit."""
        canvas = canvas_of(request)
        width, height = self._size(request, canvas)
        if canvas is not None and request.steps < self.base.fewest_steps_into:
            raise ModelError(
                f"steps = {request.steps} is too few for {self.base.name} to paint into a picture: its pipeline leaves "
                f"the first one out. Take {self.base.fewest_steps_into} or more."
            )
        uses = request.adapters or self._defaults
        words = tuple(
            resident.file
            for resident, use in zip(self._all(uses), uses, strict=True)
            if resident.adapter.tokens is not None and use.strength
        )
        guidance = self.base.usual_guidance if request.guidance is None else request.guidance
        told = {"width": width, "height": height, "guidance": guidance, "adapters": uses, "count": 1}
        return [
            _Picture(request.model_copy(update=told | {"seed": request.seed + number}), canvas, words)
            for number in range(request.count)
        ]

    def _batches(self, pictures: Sequence[_Picture]) -> Iterator[list[int]]:
        """The numbers of pictures that are drawn at once, at most `batch_size`."""
        kinds: dict[object, list[int]] = {}
        for number, picture in enumerate(pictures):
            kinds.setdefault(picture.kind, []).append(number)
        for numbers in kinds.values():
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size]

    def _draw(self, batch: Sequence[_Picture], progress: Progress | None) -> list[Drawing]:
        """Draw pictures of one kind at once."""
        wanted = {self._file(use.path) for picture in batch for use in picture.request.adapters}
        shares: dict[Resident, list[float]] = {}
        used: list[list[Resident]] = [[] for _ in batch]
        for row, picture in enumerate(batch):
            for use in picture.request.adapters:
                resident = self._resident(use.path, wanted)
                shares.setdefault(resident, [0.0] * len(batch))[row] = use.strength
                used[row].append(resident)
        first = batch[0]
        scheduler = build_scheduler(first.request.scheduler, self._own_scheduler)
        with self._undisturbed(first.request.seed):
            with self._acting(shares):
                # while the words that adapters bring are in
                notes = [self._request_notes(picture.request) for picture in batch]
                latents = self._denoise(
                    [picture.request for picture in batch], first.canvas, scheduler, progress
                )
            decoded = self._decode(latents)
        drawings = []
        for picture, residents, noted, (image, said) in zip(batch, used, notes, decoded, strict=True):
            settings = self._settings(type(scheduler).__name__, residents, picture.canvas)
            request = picture.request
            drawings.append(Drawing(image, request, request.seed, settings, (*noted, *said)))
        return drawings

    def _denoise(
        self,
        requests: Sequence[Request],
        canvas: Canvas | None,
        scheduler: Any,
        progress: Progress | None,
    ) -> Tensor:
        """Requests of one kind, for one picture each -> latents."""
        request = requests[0]
        assert request.width is not None and request.height is not None and request.guidance is not None
        picture, mask = (None, None) if canvas is None else (canvas.image, canvas.mask)
        into = self.base.drawn_into(picture, mask, len(requests), (request.width, request.height))

        def step_done(pipe: Any, number: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if progress is not None:
                progress(number + 1, pipe.num_timesteps)
            return tensors

        self._pipeline.scheduler = scheduler
        try:
            latents: Tensor = self._pipeline(
                **self.base.asked(
                    [one.prompt for one in requests],
                    [one.negative for one in requests] if request.negative else None,
                    request.guidance,
                ),
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                # On the CPU and one for each picture: the same noise on every device and in every batch.
                generator=[torch.Generator().manual_seed(one.seed) for one in requests],
                output_type="latent",
                callback_on_step_end=step_done,
                **into,
            ).images
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ImportError) as error:
            if suits(type(scheduler), self._own_scheduler) or shortage_of(error) is not None:
                raise
            raise ModelError(unsuitable(type(scheduler).__name__, self._own_scheduler, error)) from error
        return self.base.unpacked(latents, request.width, request.height)

    def _decode(self, latents: Tensor) -> list[tuple[Image.Image, tuple[str, ...]]]:
        """Pictures, and what is to be said of each. The base decodes in fp32 where its VAE overflows, and
        notes it."""
        before = self.base.notes
        rows = self._pixels(latents)
        news = tuple(note for note in self.base.notes if note not in before)
        pictures = []
        for row in rows:
            if isinstance(row, str):
                height, width = (side * self.base.latent_factor for side in latents.shape[-2:])
                pictures.append((Image.new("RGB", (width, height)), (*news, row)))
                continue
            levels = (
                ((row / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            )
            said = news
            if levels.std() < BLACK:
                said += (
                    f"The picture shows nothing: its levels are {levels.mean():.0f} of 255 and vary by only "
                    f"{levels.std():.2f}. Neither the denoiser nor the VAE gave NaN. Try a smaller "
                    "strength or guidance.",
                )
            pictures.append((Image.fromarray(levels), said))
        return pictures

    def _pixels(self, latents: Tensor) -> list[Tensor | str]:
        """Each row's pixels, (3, H, W) in [-1, 1], or why there are none. One bad row does not spoil its
        neighbours."""
        finite = latents.isfinite().flatten(1).all(1).tolist()
        if all(finite):
            try:
                return list(self.base.decode_latents(latents))
            except ModelError as error:
                if len(latents) == 1:
                    return [f"The picture is black: the VAE gave NaN. {error}"]
            except ERRORS as error:
                if len(latents) == 1 or shortage_of(error) is None:
                    raise
                recover(error)  # a picture needs more than its latents: one by one, then
        if len(latents) > 1:
            return [one for row in latents for one in self._pixels(row[None])]
        word = word_of(self.base.dtype)
        advice = "" if word == "float32" else "float32, "
        return [
            f"The picture is black: the denoiser gave NaN in {word}. Try {advice}a smaller strength or "
            "guidance, and look at the adapter's file."
        ]

    @contextmanager
    def _undisturbed(self, seed: int) -> Iterator[None]:
        """Modules in eval mode, no gradients, no autocast, generators of our own; everything as before
        afterwards."""
        modules = [
            module
            for part in self._pipeline.components.values()
            if isinstance(part, nn.Module)
            for module in part.modules()
            if module.training
        ]
        cuda = self.base.device.type == "cuda"
        with ExitStack() as stack:
            # Some schedulers draw from the global generator: from ours, then, and nobody else notices.
            stack.enter_context(torch.random.fork_rng([self.base.device.index or 0] if cuda else []))
            torch.manual_seed(seed)
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(self.base.device.type, enabled=False))
            for module in modules:
                module.training = False
            try:
                yield
            finally:
                for module in modules:
                    module.training = True

    def _request_notes(self, request: Request) -> tuple[str, ...]:
        notes = []
        for word, prompt in (("prompt", request.prompt), ("negative prompt", request.negative)):
            (count,), limit = self.base.token_counts([prompt])
            if count > limit:
                notes.append(
                    f"The {word} has {count} tokens and the text encoder reads {limit}: the last "
                    f"{count - limit} are not read."
                )
        assert request.guidance is not None
        if request.negative and request.guidance <= 1:
            notes.append(
                f"The negative prompt has no effect at guidance {request.guidance:g}: it works above 1 only."
            )
        return tuple(notes)

    def _settings(
        self, scheduler: str, residents: Sequence[Resident], canvas: Canvas | None
    ) -> dict[str, Any]:
        from scumble import __version__

        return {
            "version": f"scumble {__version__}",
            "base": self.base.name,
            "family": self.base.family,
            "dtype": word_of(self.base.dtype),
            **self._dtypes(),
            **({"quantization": self.base.quantization} if self.base.quantization != "none" else {}),
            "scheduler": scheduler,
            "adapters": {str(resident.file): resident.sha256 for resident in residents},
            **({} if canvas is None else {"painted into": canvas.sha256}),
        }

    def _dtypes(self) -> dict[str, dict[str, str]]:
        found = {name: word_of(dtype) for name, dtype in self.base.dtypes.items()}
        return {"dtypes": found} if found else {}


def _load(
    base: str | Path | None,
    uses: Sequence[AdapterUse],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    rest: str | Path | None,
    dtypes: Mapping[str, str | torch.dtype] | None,
    quantization: str,
    offload: str,
) -> BaseModel:
    load = functools.partial(
        load_base, dtype=dtype, device=device, dtypes=dtypes, quantization=quantization, offload=offload
    )
    if base is not None:
        with telling(f"{base} was loaded", _LOADED_SMALLER):
            return load(base, rest=rest)
    if not uses:
        raise ModelError(
            "There is nothing to draw with. Name a base with --base (in Python: Session(base=...)), for "
            "instance picturebook, or an adapter that says which base it was made for."
        )
    name = find_base(uses[0].path)
    try:
        rest = find_rest(uses[0].path, name) if rest is None else rest
        with telling(f"{name} was loaded", _LOADED_SMALLER):
            return load(name, rest=rest)
    except PrecisionError:
        raise
    except ModelError as error:
        raise ModelError(
            f"{uses[0].path} says that it was made for {name!r}. {error} To use another base, name it with "
            "--base (in Python: Session(base=...))."
        ) from error


def _shared(progress: Progress | None, before: int, asked: int, drawing: int, total: int) -> Progress | None:
    """`progress` for all requests, fed by a batch of `drawing` pictures of `asked` steps each, after `before`
    steps of others. A scheduler may take more steps than it was asked for."""
    if progress is None:
        return None
    return lambda done, steps: progress(before + done * asked // steps * drawing, total)

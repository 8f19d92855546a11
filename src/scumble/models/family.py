"""Family and BaseModel: all that training and inference may ask of a base model.

Nothing outside a family's own file knows its name. What differs between families enters through these words:
`prediction` (epsilon, velocity, flow), `Conditioning` (one or three text encoders, pooled or not), `Frame`
(the picture's geometry, which SDXL is told), `encode_images` (scale, shift, packing) and `roots` (where
adapters may go).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from scumble.adapters.delta import Delta
from scumble.adapters.tokens import TokenTable
from scumble.errors import ModelError
from scumble.models.prepacked import forget
from scumble.models.recompute import blocks_of, recompute, selected

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from scumble.models.configs import BaseFacts, Configs
    from scumble.models.offload import Offload
    from scumble.models.prediction import Prediction
    from scumble.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Conditioning:
    """What the text says to the denoiser."""

    tokens: Tensor
    """(B, L, D) hidden states of the text encoder(s)."""
    pooled: Tensor | None = None
    """(B, P) pooled embedding, for families that take one."""
    mask: Tensor | None = None
    """(B, L) 1 where a token counts, for families that mask padding."""
    guidance: Tensor | None = None
    """(B,) the guidance that the denoiser is told, where it is `guided`; None is the base's own for training."""
    shown: Tensor | None = None
    """(B, `shown_channels`, h, w) what the denoiser is shown of the picture itself, where it fills holes (see
    `BaseModel.show`); None is nothing of it: all is hole."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def map(self, function: Any) -> Conditioning:
        """`function` applied to every tensor."""

        def each(tensor: Tensor | None) -> Any:
            return None if tensor is None else function(tensor)

        return Conditioning(**{part.name: each(getattr(self, part.name)) for part in fields(self)})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Moved to `device`, floating tensors cast to `dtype`."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self.map(lambda t: t[rows])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of all parts, in order. All parts must be of one family."""

        def join(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        return Conditioning(**{part.name: join(part.name) for part in fields(Conditioning)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Frame:
    """The geometry of pictures, one row a picture, pixels as (height, width).

    `original`: the file after EXIF orientation. `corner`: (top, left) of the crop in the resized picture.
    `target`: what the denoiser sees.
    """

    original: Tensor
    """(B, 2) int"""
    corner: Tensor
    """(B, 2) int"""
    target: Tensor
    """(B, 2) int"""

    @staticmethod
    def plain(count: int, height: int, width: int) -> Frame:
        """`count` uncropped pictures of height x width."""
        size = torch.tensor([[height, width]]).expand(count, 2)
        return Frame(size, torch.zeros_like(size), size)


class BaseModel(ABC):
    """A frozen base. Every parameter has `requires_grad` False; its modules are in eval mode.

    Laws (tests/laws/test_base_models.py): `encode_prompts` equals the diffusers pipeline's; `decode_latents`
    inverts `encode_images` as the pipeline's VAE does; `denoise` + scheduler draws the picture that
    `pipeline()` draws.
    """

    family: str
    """"sd1", "sd2", ..."""
    name: str
    """What the user asked for: Hub id, path or "picturebook"."""
    prediction: Prediction
    """What the denoiser predicts, with its noise schedule."""
    roots: Mapping[str, nn.Module]
    """Where adapters may go: {"unet": ..., "text_encoder": ...}. The denoiser comes first."""
    vocabularies: Mapping[str, Vocabulary]
    """The words of each text encoder, under its name in `roots`: where learned tokens come in."""
    resolution: int
    """Default side of a picture, in pixels."""
    size_multiple: int
    """Height and width in pixels must be multiples of this (the VAE's factor times what the denoiser
    halves)."""
    latent_factor: int
    """Pixels per latent along one side."""
    latent_channels: int
    device: torch.device
    dtype: torch.dtype
    """The denoiser's dtype (compute dtype of frozen weights)."""
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    """Component -> its dtype, where one was asked for some component alone; empty where all have `dtype`."""
    quantization: str = "none"
    """What the denoiser's blocks are held in: "none" (as they are), "int8", "nf4" or "fp8" (see `models.quantized`)."""
    notes: tuple[str, ...] = ()
    """What was assumed while loading, each as a sentence for the person who loads."""
    guided: bool = False
    """Whether the denoiser is told a guidance scale, as those are that were distilled from guided pictures."""
    usual_guidance: float = 7.5
    """The guidance that pictures are drawn with where nobody says another."""
    shown_channels: int = 0
    """Channels of what the denoiser is shown of a picture with a hole, beside the noise: those that paint into
    pictures. 0: it draws from text alone."""
    fewest_steps_into: int = 1
    """In how many denoising steps `pipeline()` paints into a picture at least."""
    repeated: ClassVar[tuple[str, ...]] = ()
    """Classes of the denoiser's blocks of which it has many alike, by name: what is compiled once for all of them."""
    recomputed: ClassVar[tuple[str, ...]] = ()
    """Classes of the denoiser's blocks that its diffusers class can recompute one by one; empty: those in
    `repeated`."""

    moved: ClassVar[tuple[str, ...]] = ()
    """Classes of the denoiser's parts that may wait in host memory, beside those in `recomputed` (or `repeated`)."""
    offloaded: Offload | None = None
    """What brings `movable` to the device when they compute (see `models.offload`); None where all is there always."""

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return next(iter(self.roots.values()))

    def dtype_of(self, component: str) -> torch.dtype:
        """What the component of that name is kept in and computes in."""
        return self.dtypes.get(component, self.dtype)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The denoiser's blocks of the classes in `repeated`, in its own order."""
        return tuple(part for part in self.denoiser.modules() if type(part).__name__ in self.repeated)

    @property
    def movable(self) -> tuple[nn.Module, ...]:
        """The denoiser's parts that can be brought to the device one by one, none inside another."""
        classes, found = {*(self.recomputed or self.repeated), *self.moved}, dict[nn.Module, None]()
        inside: set[nn.Module] = set()
        for part in self.denoiser.modules():
            if type(part).__name__ in classes and part not in inside:
                found[part] = None
                inside.update(part.modules())
        return tuple(found)

    @property
    def teachable(self) -> tuple[str, ...]:
        """The text encoders, by their names in `roots`, that are adapted where it is only said that the text is to be:
        all of them, unless one is better left alone."""
        return tuple(self.roots)[1:]

    def latent_side(self, most: int) -> int:
        """Latents along one side of its own pictures, or of the largest that have `most` at most: for questions whose
        answers do not depend on a picture's size."""
        least = max(1, self.size_multiple // self.latent_factor)
        return max(least, min(most, self.resolution // self.latent_factor) // least * least)

    @abstractmethod
    def encode_images(self, pixels: Tensor, rng: torch.Generator | None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) of about unit variance. `rng` None takes the mean of the
        posterior."""

    def show(self, pixels: Tensor, holes: Tensor) -> Tensor:
        """What `denoise` is shown of pictures with holes: (B, 3, H, W) in [-1, 1], and (B, 1, H, W) in [0, 1] whose
        1 is a hole -> (B, `shown_channels`, h, w) fp32.

        Raises:
            ModelError: this base draws from text alone.
        """
        raise ModelError(f"{self.name} draws from text alone: it can't be shown a picture.")

    def drawn_into(
        self, picture: Image | None, mask: Image | None, count: int, size: tuple[int, int]
    ) -> Mapping[str, Any]:
        """What `pipeline()` is given beside the prompt, to draw `count` pictures of (width, height): into the white
        of `mask`, with the rest as in `picture`; None draws all of it.

        Raises:
            ModelError: there is a picture, and this base draws from text alone.
        """
        if picture is not None:
            raise ModelError(
                f"{self.name} draws from text alone: it can't paint into a picture. Leave image and mask out, or name "
                "an inpainting base (one whose UNet takes 9 channels)."
            )
        return {}

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) fp32, clamped to [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> what `denoise` takes. Gradients flow when the text encoder has trainable adapters."""

    def unconditional(self, count: int) -> Conditioning:
        """(count) rows of what guidance starts from where there is no negative prompt: the empty prompt, unless
        the family has something else for it."""
        return self.encode_prompts([""] * count)

    @abstractmethod
    def token_counts(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """(tokens of each prompt without truncation, special tokens included; the limit, e.g. 77)."""

    @abstractmethod
    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning, frame: Frame) -> Tensor:
        """The raw prediction, shape of `latents`. `t` (B,) is in the prediction's own units (see
        Prediction)."""

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline over these very modules: the seam for schedulers, guidance, img2img."""

    def asked(
        self, prompts: Sequence[str], negatives: Sequence[str] | None, guidance: float
    ) -> Mapping[str, Any]:
        """What `pipeline()` is called with to draw `prompts`, in the words of its own family. `negatives` None is none,
        which need not be the same as an empty one: some bases guide from zeros then."""
        return {
            "prompt": list(prompts),
            "negative_prompt": None if negatives is None else list(negatives),
            "guidance_scale": guidance,
        }

    def packed(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as `pipeline()` takes and gives latents."""
        return latents

    def unpacked(self, latents: Tensor, width: int, height: int) -> Tensor:
        """The inverse of `packed`, for pictures of so many pixels."""
        return latents

    def modules(self) -> Mapping[str, nn.Module]:
        """Its modules under diffusers' names, but for those of `waiting`."""
        components: Mapping[str, Any] = {**self.roots, **cast("Any", self.pipeline()).components}
        return {name: part for name, part in components.items() if isinstance(part, nn.Module)}

    def waiting(self) -> Mapping[str, str]:
        """Component -> sha256 of its files, for those that are loaded when they are first needed; the same before and
        after."""
        return {}

    @property
    def late(self) -> tuple[str, ...]:
        """Those of `waiting` that adapters and words may go to: they are among `roots` while they are loaded."""
        return ()

    def claim(self, names: Collection[str]) -> None:  # noqa: B027 - nothing is what most bases do
        """Load those of `late` that are called so, for good: something is going to be put into them."""

    def release(self) -> None:  # noqa: B027 - nothing is what most bases do
        """Let go of what can be loaded again when it is needed."""

    def rest(self, *, pictures: bool, text: bool) -> tuple[str, ...]:
        """From here on, what turns `pictures` into latents and what reads `text` is in memory only while it computes:
        it comes back when it is asked, and goes with `release`. What trains stays. The names of what is away now."""
        return ()

    def discard(self) -> None:
        """Let go of every frozen weight for good: this base computes nothing any more. What was put into it stays."""
        self.release()
        if self.offloaded is not None:
            self.offloaded.discard()
        for root in self.roots.values():
            forget(root)
        modules = [part for module in self.modules().values() for part in module.modules()]
        kept = {p for part in modules if isinstance(part, Delta | TokenTable) for p in part.parameters()}
        for part in modules:
            for parameter in part.parameters(recurse=False):
                if parameter not in kept:
                    parameter.data = parameter.data.new_empty(0)

    def sparing(self) -> AbstractContextManager[None]:
        """Prompts are read without what would have to be loaded for it, for the length of a `with` block: enough to
        compare two models that differ elsewhere."""
        return nullcontext()

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 hex over the denoiser's frozen weights (names, shapes, fp16 bytes): the same for one base
        whatever dtype it was loaded in, and not changed by adapters."""

    @property
    def recomputable(self) -> Mapping[str, nn.Module]:
        """The blocks of the denoiser and the text encoders that can be recomputed one by one: path -> block, e.g.
        "unet.mid_block.resnets.1"; none where the family says nothing of its denoiser's."""
        classes = self.recomputed or self.repeated
        return {
            path: block
            for name, root in self.roots.items()
            if classes
            for path, block in blocks_of(name, root, classes).items()
        }

    def train_memory(self, *, checkpointing: bool | Sequence[str]) -> None:
        """What the denoiser and the text encoders compute again in the backward pass instead of keeping it: all that
        they can, nothing, or those of `recomputable` that a pattern fits (see `recompute.selected`).

        Raises:
            ModelError: a pattern fits no block.
        """
        if isinstance(checkpointing, bool):
            for root in self.roots.values():
                recompute(root, None if checkpointing else ())
            return
        blocks = self.recomputable
        chosen = {blocks[path] for path in selected(checkpointing, blocks, self.name)}
        for root in self.roots.values():
            inside = set(root.modules())
            recompute(root, chosen & inside)


@dataclass(frozen=True)
class Deferred:
    """A component that is loaded when it is first needed."""

    load: Callable[[], tuple[nn.Module, Sequence[str]]]
    """The module, and what there is to say of it."""
    files: tuple[Path, ...]
    """What it is loaded from."""

    def mark(self) -> str:
        """sha256 hex over the bytes of its files."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Components:
    """The loaded parts of a base, under the names of diffusers' folders: what a family builds a BaseModel
    from."""

    name: str
    """What the user asked for: Hub id, path or "picturebook"."""
    modules: Mapping[str, nn.Module]
    """"unet", "vae", "text_encoder", ... as diffusers and transformers classes."""
    tokenizers: Mapping[str, Any]
    """"tokenizer", ..."""
    scheduler: Any
    """The base's own diffusers scheduler."""
    fingerprint: str = ""
    """The denoiser's fingerprint where loading rounded the weights further than to fp16; else it is
    computed."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed while loading."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the base says of itself beside its parts, e.g. {"force_zeros_for_empty_prompt": True}."""
    deferred: Mapping[str, Deferred] = field(default_factory=dict)
    """Those of the parts that are loaded later (see `BaseFacts.deferred`)."""
    again: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    """Of some of `modules`, what loads it anew as it was loaded."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Component -> the dtype that was asked for it alone."""

    def dtype_of(self, component: str, dtype: torch.dtype) -> torch.dtype:
        """What `component` is to be kept in: its own dtype, else `dtype`, that of all."""
        return self.dtypes.get(component, dtype)


class Family(Protocol):
    """A base-model plug-in: one file in `models/`, one line in the registry.

    Law: of every base, at most one family of the registry says that it recognises it.

    One whose single files hold components under names of their own says how, by an attribute `single_file`, a
    `models.file_layout.FileLayout`.
    """

    name: str
    """"sd1" """
    title: str
    """What people call it: "Stable Diffusion 1"."""

    def recognises(self, configs: Configs) -> bool:
        """Whether the structure in these configs is this family's. Names and sizes don't matter."""

    def describe(self, configs: Configs) -> BaseFacts:
        """The facts of a base that this family recognises, with every reason why it can't be loaded."""

    def load(self, source: Components, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
        """Build a BaseModel from loaded components (see `models.loading`). `dtype` is that of every component for which
        `source.dtypes` has no other."""

    def tiny(self, seed: int = 0) -> BaseModel:
        """The same classes in toy sizes from a seed, no files: for tests."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and fp16 bytes, in sorted order of names."""
    whole = Fingerprint()
    for name in sorted(tensors):
        whole.add(name, tensors[name])
    return whole.hex()


class Fingerprint:
    """`fingerprint` of tensors that are seen one at a time, in sorted order of names."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """The next one."""
        tensor = tensor.detach().to("cpu", torch.float16).contiguous()
        self._digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            self._digest.update(content)

    def hex(self) -> str:
        """Of all that were added."""
        return self._digest.hexdigest()

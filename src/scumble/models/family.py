"""Family and BaseModel: all that training and inference may ask of a base model.

Nothing outside a family's own file knows its name. What differs between families enters through these words:
`prediction` (epsilon, velocity, flow), `Conditioning` (one or three text encoders, pooled or not), `Frame`
(the picture's geometry, which SDXL is told), `encode_images` (scale, shift, packing) and `roots` (where
adapters may go).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from scumble.models.configs import BaseFacts, Configs
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

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def map(self, function: Any) -> Conditioning:
        """`function` applied to every tensor."""

        def each(tensor: Tensor | None) -> Any:
            return None if tensor is None else function(tensor)

        return Conditioning(each(self.tokens), each(self.pooled), each(self.mask))

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

        first = join("tokens")
        assert first is not None
        return Conditioning(first, join("pooled"), join("mask"))


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
    notes: tuple[str, ...] = ()
    """What was assumed while loading, each as a sentence for the person who loads."""

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return next(iter(self.roots.values()))

    @abstractmethod
    def encode_images(self, pixels: Tensor, rng: torch.Generator | None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) of about unit variance. `rng` None takes the mean of the
        posterior."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) fp32, clamped to [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> what `denoise` takes. Gradients flow when the text encoder has trainable adapters."""

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

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 hex over the denoiser's frozen weights (names, shapes, fp16 bytes): the same for one base
        whatever dtype it was loaded in, and not changed by adapters."""

    def train_memory(self, *, checkpointing: bool) -> None:
        """Turn gradient checkpointing of the denoiser (and the text encoders) on or off."""
        for root in self.roots.values():
            name = "enable_gradient_checkpointing" if checkpointing else "disable_gradient_checkpointing"
            method = getattr(root, name, None)
            if method is not None:
                method()


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


class Family(Protocol):
    """A base-model plug-in: one file in `models/`, one line in the registry.

    Law: of every base, at most one family of the registry says that it recognises it.
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
        """Build a BaseModel from loaded components (see `models.loading`)."""

    def tiny(self, seed: int = 0) -> BaseModel:
        """The same classes in toy sizes from a seed, no files: for tests."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and fp16 bytes, in sorted order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float16).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

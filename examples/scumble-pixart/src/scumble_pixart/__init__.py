"""PixArt-Sigma as a base family of scumble: a transformer with cross-attention, told text by T5.

Source: Chen et al. 2024, "PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image
Generation"; the calls are those of diffusers' PixArtSigmaPipeline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from scumble.adapters.layers import base_state
from scumble.errors import ModelError
from scumble.models.configs import BaseFacts, Configs
from scumble.models.dtypes import accept_any, agree, computing
from scumble.models.family import BaseModel, Components, Conditioning, Frame, fingerprint
from scumble.models.latents import LatentSpace, factor_of
from scumble.models.prediction import prediction_from, prediction_type
from scumble.models.text import Words
from scumble.models.tiny import tiny_t5, tiny_t5_tokenizer, tiny_vae

if TYPE_CHECKING:
    from diffusers import PixArtSigmaPipeline

READ = 300
"""Tokens of a prompt that T5 reads."""

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


class PixArtBase(BaseModel):
    """A frozen transformer, VAE and T5, as diffusers' PixArtSigmaPipeline puts them together."""

    usual_guidance = 4.5

    def __init__(self, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """`parts` hold all of `PARTS`; modules are moved to `device`, each to the dtype that `parts` says of it or to
        `dtype`, and frozen in place."""
        self.family, self.name, self.notes = PixArtSigma.name, parts.name, parts.notes
        self.device, self.dtype = torch.device(device), parts.dtype_of("transformer", dtype)
        modules: Mapping[str, Any] = parts.modules
        self.transformer, self.vae = modules["transformer"], modules["vae"]
        self.text_encoder = modules["text_encoder"]
        self.scheduler: Any = parts.scheduler
        for name, module in modules.items():
            nn.Module.to(module, self.device, parts.dtype_of(name, dtype))
            module.requires_grad_(False).eval()
        if parts.dtypes:
            self.dtypes = {name: parts.dtype_of(name, dtype) for name in modules}
            accept_any(self.vae)
        self.roots = {"transformer": self.transformer, "text_encoder": self.text_encoder}
        self.prediction = prediction_from(self.scheduler.config)
        self.latents = LatentSpace(self.vae)
        self.latent_factor, self.latent_channels = self.latents.factor, self.latents.channels
        self.resolution, self.size_multiple = sizes(self.transformer.config, self.vae.config)
        self.words = Words(parts.tokenizers["tokenizer"], READ)
        self.vocabularies = {"text_encoder": self.words.vocabulary}
        self._fingerprint = parts.fingerprint

    def encode_images(self, pixels: Tensor, rng: torch.Generator | None) -> Tensor:
        return self.latents.encode(pixels, rng)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.latents.decode(latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """(B prompts) -> T5's tokens (B, 300, D) and which of them count. Prompts are read in small letters."""
        ids, mask = self.words.ids([_plain(prompt) for prompt in prompts])
        ids, mask = ids.to(self.device), mask.to(self.device)
        trains = any(parameter.requires_grad for parameter in self.text_encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()), self._in_its_own("text_encoder"):
            tokens: Tensor = self.text_encoder(ids, attention_mask=mask)[0]
        return Conditioning(tokens.to(self.text_encoder.dtype), mask=mask)

    def token_counts(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        return self.words.counts([_plain(prompt) for prompt in prompts]), self.words.limit

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning, frame: Frame) -> Tensor:
        """(B, C, h, w), t (B,) -> (B, C, h, w) fp32: the mean, without the variance that is predicted beside it."""
        assert conditioning.mask is not None
        with self._in_its_own("transformer"):
            out: Tensor = self.transformer(
                latents.to(self.device, self.dtype),
                encoder_hidden_states=conditioning.tokens.to(self.device, self.dtype),
                encoder_attention_mask=conditioning.mask.to(self.device),
                timestep=t.to(self.device),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
        return out[:, : self.latent_channels].float()

    def _in_its_own(self, component: str) -> AbstractContextManager[Any]:
        return computing(self.dtypes.get(component), self.device)

    def pipeline(self) -> PixArtSigmaPipeline:
        """A PixArtSigmaPipeline over these very modules."""
        from diffusers import PixArtSigmaPipeline

        pipeline = PixArtSigmaPipeline(
            tokenizer=self.words.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            transformer=self.transformer,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
        )
        if self.dtypes:
            agree(pipeline, self.dtype, self.latents)
        return pipeline

    def asked(
        self, prompts: Sequence[str], negatives: Sequence[str] | None, guidance: float
    ) -> Mapping[str, Any]:
        """In the size that is asked for, not the nearest that it was trained in, and with the prompt as it stands."""
        return {
            "prompt": list(prompts),
            "negative_prompt": list(negatives) if negatives is not None else "",
            "guidance_scale": guidance,
            "use_resolution_binning": False,
            "clean_caption": False,
        }

    def fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = fingerprint(base_state(self.transformer))
        return self._fingerprint


def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """(default side in pixels, what sides must be multiples of), from the configs of transformer and VAE."""
    factor = factor_of(vae)
    # 8: PixArtSigmaPipeline asks for it whatever the VAE's factor
    return int(transformer.get("sample_size", 128)) * factor, math.lcm(
        8, int(transformer.get("patch_size", 2)) * factor
    )


def _plain(prompt: str) -> str:
    return prompt.lower().strip()


class PixArtSigma:
    """PixArt-Sigma: at full size 1024 pixels, T5 v1.1 XXL."""

    name: ClassVar[str] = "pixart-sigma"
    title: ClassVar[str] = "PixArt-Sigma"

    @classmethod
    def recognises(cls, configs: Configs) -> bool:
        """By its transformer's class, and by a pipeline that is not PixArt-Alpha's."""
        kind = configs.parts.get("transformer", {}).get("_class_name")
        return kind == "PixArtTransformer2DModel" and not configs.pipeline.startswith("PixArtAlpha")

    @classmethod
    def describe(cls, configs: Configs) -> BaseFacts:
        transformer, vae = configs.parts["transformer"], configs.parts.get("vae", {})
        problems, kind = [], ""
        lack = [f"the {part} folder" for part in PARTS if part not in configs.parts]
        if lack or configs.missing:
            problems.append(
                f"{configs.name} is not complete. Missing: {'; '.join([*lack, *configs.missing])}."
            )
        reads, width = (
            transformer.get("caption_channels"),
            configs.parts.get("text_encoder", {}).get("d_model"),
        )
        if None not in (reads, width) and reads != width:
            problems.append(
                f"The parts of {configs.name} don't belong together: its text encoder gives {width} numbers a token "
                f"and its transformer takes {reads}."
            )
        try:
            kind, _ = prediction_type(configs.parts.get("scheduler", {}))
        except ModelError as error:
            problems.append(f"{configs.name}: {error}")
        known = bool(vae.get("block_out_channels"))
        side, multiple = sizes(transformer, vae) if known else (None, None)
        return BaseFacts(
            name=configs.name,
            family=cls.name,
            title=cls.title,
            prediction=kind,
            cross_attention_dim=reads,
            resolution=side,
            size_multiple=multiple,
            latent_factor=factor_of(vae) if known else None,
            latent_channels=transformer.get("in_channels", 4),
            parameters=configs.parameters,
            weights_dtype=configs.weights_dtype,
            problems=tuple(problems),
            notes=configs.notes,
        )

    @classmethod
    def load(cls, source: Components, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
        return PixArtBase(source, dtype=dtype, device=device)

    @classmethod
    def tiny(cls, seed: int = 0) -> BaseModel:
        """The same classes in toy sizes, 16x16 pixels, on the CPU in fp32."""
        from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
        from transformers import T5EncoderModel

        tokenizer = tiny_t5_tokenizer()
        tokenizer.model_max_length = READ
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=8,
                num_layers=2,
                cross_attention_dim=32,
                sample_size=8,
                caption_channels=24,
                use_additional_conditions=False,
            )
            modules = {
                "transformer": transformer,
                "vae": tiny_vae(0.13025),
                "text_encoder": T5EncoderModel(tiny_t5(tokenizer, 24)),
            }
        scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
        parts = Components(f"tiny-{cls.name}", modules, {"tokenizer": tokenizer}, scheduler)
        return cls.load(parts, dtype=torch.float32, device=torch.device("cpu"))

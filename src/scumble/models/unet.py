"""UNet bases: what Stable Diffusion 1, 2 and XL share: one UNet, one VAE, one CLIP text encoder or several.

Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; the calls are
those of diffusers' StableDiffusionPipeline, which tests/laws/test_base_models.py compares with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.models.attention import set_attention
from scumble.models.configs import BaseFacts, Configs
from scumble.models.family import BaseModel, Components, Conditioning, Frame
from scumble.models.latent_base import LatentBase
from scumble.models.latents import factor_of
from scumble.models.prediction import Flow, prediction_type
from scumble.models.prepacked import pays, prepack
from scumble.models.text import Truncation, Words
from scumble.models.tiny import TinySizes, tiny_components

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

EXTRA_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
}
"""Input channels of a UNet over 4-channel latents -> what such a model is, where its family has no word for it."""

TOLD = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""What the config of a UNet has that is told more than text."""


class UNetBase(LatentBase):
    """A frozen UNet, VAE and CLIP text encoder, as diffusers' StableDiffusionPipeline puts them together."""

    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    """Each text encoder, and the tokenizer whose words it reads."""
    drawn_by: ClassVar[str] = "StableDiffusionPipeline"
    """The class of diffusers that draws with these parts."""
    repeated: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock",)
    recomputed: ClassVar[tuple[str, ...]] = ("ResnetBlock2D", "BasicTransformerBlock")
    moved: ClassVar[tuple[str, ...]] = ("Downsample2D", "Upsample2D")

    def __init__(self, family: str, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """`parts` hold "unet", "vae", the text encoders and their tokenizers; they are moved to `device` and
        frozen in place.

        `dtype` is that of every component for which `parts.dtypes` has no other; only a VAE has fp32 for fp16 on a CPU.

        Raises:
            ModelError: a tokenizer knows more tokens than its text encoder, or the schedule can't be built.
        """
        self._open(parts, denoiser="unet", family=family, dtype=dtype, device=device)
        self.unet: Any = parts.modules["unet"]
        self.text_encoders: dict[str, Any] = {root: parts.modules[root] for root in self.encoders}
        self.roots = {"unet": self.unet, **self.text_encoders}
        for root, module in self.roots.items():
            self._settle(module, parts.dtype_of(root, dtype))
        set_attention(self.unet, "auto")
        if pays():
            prepack(self.unet)
        unet_config, vae_config = (cast(Any, module).config for module in (self.unet, self.vae))
        self.resolution, self.size_multiple = sizes(unet_config, vae_config)
        self.readings: dict[str, Words] = {}
        """How each text encoder reads a prompt."""
        for root, name in self.encoders.items():
            tokenizer, config = parts.tokenizers[name], self.text_encoders[root].config
            self.readings[root] = Words(tokenizer, config.max_position_embeddings)
            self._refuse_strangers(name, tokenizer, self.text_encoders[root], root.replace("_", " "))
        self.vocabularies = {root: words.vocabulary for root, words in self.readings.items()}

    @property
    def recomputable(self) -> Mapping[str, nn.Module]:
        """See BaseModel; the first block in the middle is always kept by diffusers."""
        return {path: one for path, one in super().recomputable.items() if path != "unet.mid_block.resnets.0"}

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.text_encoders["text_encoder"]

    @property
    def words(self) -> Words:
        """How the first text encoder reads a prompt."""
        return self.readings["text_encoder"]

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return self.words.tokenizer

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See BaseModel: (B prompts) -> tokens (B, 77, D) in the text encoder's dtype; longer prompts are
        truncated.

        The graph is recorded only where a parameter of the text encoder requires a gradient.
        """
        self._check_compute("text_encoder")
        ids, mask = self.words.ids(prompts)
        masked = getattr(self.text_encoder.config, "use_attention_mask", None)
        with self._graph_of(self.text_encoder), self._computing("text_encoder"):
            hidden: Tensor = self.text_encoder(
                ids.to(self.device), attention_mask=mask.to(self.device) if masked else None
            )[0]
        return Conditioning(hidden.to(self.text_encoder.dtype))

    def token_counts(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """See BaseModel: of several text encoders, the most tokens and the lowest limit."""
        counts = [words.counts(prompts) for words in self.readings.values()]
        limit = min(words.limit for words in self.readings.values())
        return [max(each) for each in zip(*counts, strict=True)], limit

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """The prompts that don't fit a text encoder, each with what is lost of it."""
        lost = [each for words in self.readings.values() for each in words.truncated(prompts)]
        return list(dict.fromkeys(lost))

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning, frame: Frame) -> Tensor:
        """See BaseModel: (B, C, h, w), t (B,) -> (B, C, h, w) fp32."""
        self._check_compute("unet")
        with self._computing("unet"):
            out: Tensor = self.unet(
                self.input_of(latents, conditioning).to(self.device, self.dtype),
                t.to(self.device),
                encoder_hidden_states=conditioning.tokens.to(self.device, self.dtype),
                added_cond_kwargs=self.told_besides(conditioning, frame),
                return_dict=False,
            )[0]
        return out.float()

    def input_of(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """What the UNet takes where the noise is `latents`: these alone, unless it is shown more."""
        return latents

    def told_besides(self, conditioning: Conditioning, frame: Frame) -> dict[str, Tensor] | None:
        """What the UNet is told beside the tokens. SD 1 and 2 are told nothing."""
        return None

    def pipeline(self) -> StableDiffusionPipeline:
        """A StableDiffusionPipeline over these very modules, with a fresh copy of the base's own
        scheduler."""
        import diffusers

        pipeline = getattr(diffusers, self.drawn_by)(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return cast("StableDiffusionPipeline", self._agreed(pipeline))

    def set_attention(self, kind: str) -> None:
        """How the UNet computes attention: "sdpa", "plain", or "auto", which chooses the faster (see `attention`)
        and is what a base starts with.

        Raises:
            UnknownName: no kind is called so.
        """
        set_attention(self.unet, kind)


def sizes(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """(default side in pixels, what sides must be multiples of), from the configs of UNet and VAE."""
    factor = factor_of(vae)
    sample = unet.get("sample_size") or 64
    side = max(sample) if isinstance(sample, (list, tuple)) else int(sample)
    # 8: StableDiffusionPipeline asks for it whatever the VAE's factor
    return side * factor, math.lcm(8, factor * 2 ** (len(unet["block_out_channels"]) - 1))


class UNetFamily:
    """A family over UNet2DConditionModel with CLIP text encoders, told from its neighbours by structure."""

    name: ClassVar[str]
    title: ClassVar[str]
    base: ClassVar[type[UNetBase]] = UNetBase
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTextModel"}
    """Each text encoder and its class in transformers."""
    linear: ClassVar[bool]
    """Whether the transformers in the UNet project in and out by a linear layer (SD 2) or a 1x1 convolution
    (SD 1)."""
    fills: ClassVar[bool] = False
    """Whether the UNet is shown a picture with a hole, to fill it: one channel for the hole, and as many as it gives
    for the rest."""
    adapters: ClassVar[str] = ""
    """The family whose adapters it takes, where that is not this one."""
    tiny_sizes: ClassVar[TinySizes]

    @classmethod
    def recognises(cls, configs: Configs) -> bool:
        """By structure alone: a UNet2DConditionModel of this kind of projection that is told text and nothing
        else."""
        unet = configs.parts.get("unet", {})
        return (
            unet.get("_class_name") == "UNet2DConditionModel"
            and bool(unet.get("use_linear_projection", False)) == cls.linear
            and not any(unet.get(key) is not None for key in TOLD)
            and "text_encoder_2" not in configs.parts
            and cls._is_filling(unet) == cls.fills
        )

    @staticmethod
    def _is_filling(unet: Mapping[str, Any]) -> bool:
        """Whether the channels are those of a UNet that fills holes."""
        return bool(unet.get("in_channels", 4) == 2 * unet.get("out_channels", 4) + 1)

    @classmethod
    def describe(cls, configs: Configs) -> BaseFacts:
        """See Family."""
        unet, vae = configs.parts["unet"], configs.parts.get("vae", {})
        problems = list(cls._problems(configs))
        kind, note = "", ""
        try:
            if not configs.probe:
                kind, note = prediction_type(configs.parts.get("scheduler", {}))
        except ModelError as error:
            problems.append(f"{configs.name}: {error}")
        if kind == Flow.name:
            problems.append(
                f"The scheduler of {configs.name} says that it was trained by flow matching; this release trains UNets "
                "that predict epsilon or velocity. Take the scheduler folder of the base that it was made from, if "
                "that is what it is."
            )
        known = bool(vae.get("block_out_channels"))
        side, multiple = sizes(unet, vae) if known else (None, None)
        return BaseFacts(
            name=configs.name,
            family=cls.name,
            title=cls.title,
            prediction=kind,
            cross_attention_dim=_width(unet),
            resolution=side,
            size_multiple=multiple,
            latent_factor=factor_of(vae) if known else None,
            latent_channels=unet.get("out_channels", 4),
            parameters=configs.parameters,
            weights_dtype=configs.weights_dtype,
            adapters=cls.adapters,
            problems=tuple(problems),
            notes=(*configs.notes, *([note] if note else [])),
        )

    @classmethod
    def _problems(cls, configs: Configs) -> Sequence[str]:
        name, parts = configs.name, configs.parts
        problems = []
        tokenizers = [cls.base.encoders[part] for part in cls.encoders]
        needed = ("vae", *cls.encoders, *tokenizers, "scheduler")
        lack = [f"the {part} folder" for part in needed if part not in parts]
        if lack or configs.missing:
            problems.append(f"{name} is not complete. Missing: {'; '.join([*lack, *configs.missing])}.")
        unet, vae = parts["unet"], parts.get("vae", {})
        taken, made = unet.get("in_channels", 4), unet.get("out_channels", 4)
        noisy = taken - (made + 1 if cls.fills else 0)
        latent = vae.get("latent_channels", noisy)
        if noisy != made:
            what = EXTRA_CHANNELS.get(taken, "a model of another kind")
            problems.append(
                f"{name} is {what} on {cls.title} (its UNet takes {taken} channels and gives {made}); this "
                f"release trains text-to-image bases. Use the base that it was made from."
            )
        elif latent != noisy:
            problems.append(
                f"The parts of {name} don't belong together: its VAE has {latent} latent channels and its "
                f"UNet takes {noisy}."
            )
        if unet.get("time_cond_proj_dim") is not None:
            problems.append(
                f"{name} is a latent consistency model (its UNet is told the guidance scale); this release "
                "trains ordinary bases. Train on the base that it was distilled from; the adapter works on "
                "both."
            )
        texts = {part: parts[part] for part in cls.encoders if part in parts}
        width = _width(unet)
        speaks = [text["hidden_size"] for text in texts.values() if "hidden_size" in text]
        if len(speaks) == len(cls.encoders) and width != sum(speaks):
            plural = "s give" if len(speaks) > 1 else " gives"
            problems.append(
                f"The parts of {name} don't belong together: its text encoder{plural} {' + '.join(map(str, speaks))} "
                f"numbers a token and its UNet's cross-attention takes {width}."
            )
        for part, kind in cls.encoders.items():
            is_a = texts.get(part, {}).get("_class_name", kind)
            if is_a != kind:
                problems.append(
                    f"The {part.replace('_', ' ')} of {name} is a {is_a}; {cls.title} has a {kind}."
                )
        return problems

    @classmethod
    def load(cls, source: Components, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
        """See Family."""
        return cls.base(cls.adapters or cls.name, source, dtype=dtype, device=device)

    @classmethod
    def tiny(cls, seed: int = 0) -> BaseModel:
        """The same classes in toy sizes, 16x16 pixels, on the CPU in fp32. The name is "tiny-<family>"."""
        parts = tiny_components(f"tiny-{cls.name}", cls.tiny_sizes, seed)
        return cls.load(parts, dtype=torch.float32, device=torch.device("cpu"))


def _width(unet: Mapping[str, Any]) -> int | None:
    width = unet.get("cross_attention_dim")
    return max(width) if isinstance(width, (list, tuple)) else width

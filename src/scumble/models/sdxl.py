"""Stable Diffusion XL: a UNet that two text encoders speak to, told the picture's size, crop and target too.

Its first text encoder is CLIP ViT-L/14, its second OpenCLIP ViT-bigG/14. Both are read at their last layer but one,
side by side; the second one's pooled embedding says what the whole prompt is about. The refiner is another model.

Source: Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scumble.adapters.layers import mark_unread
from scumble.models.configs import Configs
from scumble.models.family import BaseModel, Components, Conditioning, Frame
from scumble.models.tiny import tiny_clip, tiny_tokenizer, tiny_vae
from scumble.models.unet import UNetBase, UNetFamily

TIME_IDS = 6
"""Numbers that the UNet is told of a picture's geometry: three pairs. A refiner has five: the last pair is one number,
how beautiful the picture is."""


class SDXLBase(UNetBase):
    """A frozen UNet, VAE and two CLIP text encoders, as diffusers' StableDiffusionXLPipeline puts them together."""

    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    drawn_by: ClassVar[str] = "StableDiffusionXLPipeline"
    usual_guidance = 5.0

    def __init__(self, family: str, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """See UNetBase. A VAE that says that it overflows in fp16 keeps its weights in fp16 and computes in fp32."""
        super().__init__(family, parts, dtype=dtype, device=device)
        self.zeros_for_empty = bool(parts.options.get("force_zeros_for_empty_prompt", True))
        """Whether guidance without a negative prompt starts from zeros, not from the empty prompt."""
        # nothing reads the first encoder's last layer: what would be put there could never be trained
        mark_unread(self.text_encoder.encoder.layers[-1])
        self._overflows = self.vae.dtype == torch.float16 and bool(self.vae.config.get("force_upcast"))
        if self._overflows:
            self.latents.widened = True
            note = "The VAE says that it overflows in fp16 (force_upcast): it computes in fp32."
            self.notes = (*self.notes, note)

    def _say_if_widened(self) -> None:
        if not self._overflows:
            super()._say_if_widened()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See BaseModel: (B prompts) -> tokens (B, 77, D1 + D2) and pooled (B, P) in the text encoders' dtype; longer
        prompts are truncated."""
        self._check_compute(*self.text_encoders)
        hidden: list[Tensor] = []
        pooled: Tensor | None = None
        with self._graph_of(*self.text_encoders.values()):
            for root, encoder in self.text_encoders.items():
                ids, _ = self.readings[root].ids(prompts)
                with self._computing(root):
                    read = encoder(ids.to(self.device), output_hidden_states=True)
                hidden.append(read.hidden_states[-2].to(encoder.dtype))
                pooled = getattr(read, "text_embeds", pooled)
            return Conditioning(torch.cat(hidden, dim=-1), pooled)

    def unconditional(self, count: int) -> Conditioning:
        """See BaseModel: zeros, where the base says so."""
        empty = super().unconditional(count)
        return empty.map(torch.zeros_like) if self.zeros_for_empty else empty

    def told_besides(self, conditioning: Conditioning, frame: Frame) -> dict[str, Tensor]:
        """The pooled embedding (B, P), and (B, 6): original height and width, top and left of the crop, target height
        and width, in pixels."""
        assert conditioning.pooled is not None
        # in fp32 whatever the UNet computes in: bf16 can't tell 1023 pixels from 1024
        geometry = torch.cat([frame.original, frame.corner, frame.target], dim=1).to(
            self.device, torch.float32
        )
        return {"text_embeds": conditioning.pooled.to(self.device, self.dtype), "time_ids": geometry}

    def pipeline(self) -> Any:
        """A StableDiffusionXLPipeline over these very modules, with a fresh copy of the base's own scheduler."""
        import diffusers

        pipeline = getattr(diffusers, self.drawn_by)(
            vae=self.vae,
            text_encoder=self.text_encoders["text_encoder"],
            text_encoder_2=self.text_encoders["text_encoder_2"],
            tokenizer=self.readings["text_encoder"].tokenizer,
            tokenizer_2=self.readings["text_encoder_2"].tokenizer,
            unet=self.unet,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            force_zeros_for_empty_prompt=self.zeros_for_empty,
            add_watermarker=False,
        )
        return self._agreed(pipeline)


class SDXL(UNetFamily):
    """Stable Diffusion XL: epsilon prediction (some descendants: velocity); at full size 1024 pixels, cross-attention
    of 768 + 1280."""

    name: ClassVar[str] = "sdxl"
    title: ClassVar[str] = "Stable Diffusion XL"
    base: ClassVar[type[UNetBase]] = SDXLBase
    encoders: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }

    @classmethod
    def recognises(cls, configs: Configs) -> bool:
        """By structure alone: a UNet2DConditionModel that is told the pooled text and geometry, and no third thing."""
        unet = configs.parts.get("unet", {})
        return (
            unet.get("_class_name") == "UNet2DConditionModel"
            and unet.get("addition_embed_type") == "text_time"
            and unet.get("encoder_hid_dim_type") is None
            and cls._is_filling(unet) == cls.fills
        )

    @classmethod
    def _problems(cls, configs: Configs) -> Sequence[str]:
        unet, second = configs.parts["unet"], configs.parts.get("text_encoder_2", {})
        told, size = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
        pooled = second.get("projection_dim")
        if None in (told, size, pooled):
            return super()._problems(configs)
        assert told is not None and size is not None and pooled is not None
        if told == (TIME_IDS - 1) * size + pooled:
            return [
                f"{configs.name} is the refiner of {cls.title}, which finishes pictures that the base has begun. "
                "Adapters are trained on the base: name that (stabilityai/stable-diffusion-xl-base-1.0, say)."
            ]
        problems = list(super()._problems(configs))
        if told != TIME_IDS * size + pooled:
            problems.append(
                f"The parts of {configs.name} don't belong together: its second text encoder's pooled embedding has "
                f"{pooled} numbers and its UNet takes {told - TIME_IDS * size}."
            )
        return problems

    @classmethod
    def tiny(cls, seed: int = 0) -> BaseModel:
        """See UNetFamily."""
        parts = _tiny(f"tiny-{cls.name}", seed, channels=9 if cls.fills else 4)
        return cls.load(parts, dtype=torch.float32, device=torch.device("cpu"))


def _tiny(name: str, seed: int, *, channels: int) -> Components:
    """Random parts, the same for equal seeds. The global random state is left as it was."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, second = tiny_tokenizer(), tiny_tokenizer("!")
    pooled, geometry = 24, 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            block_out_channels=(32, 64),
            layers_per_block=2,  # as at full size: the original code's names count them
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32 + 48,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=geometry,
            projection_class_embeddings_input_dim=TIME_IDS * geometry + pooled,
        )
        vae = tiny_vae(0.13025)
        text_encoder = CLIPTextModel(tiny_clip(first, 32, "quick_gelu"))
        # published configs call 2 the end of the text, from when the largest id was taken for it
        text_encoder_2 = CLIPTextModelWithProjection(
            tiny_clip(second, 48, "gelu", projection_dim=pooled, eos_token_id=2)
        )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    return Components(
        name=name,
        modules={"unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2},
        tokenizers={"tokenizer": first, "tokenizer_2": second},
        scheduler=scheduler,
        options={"force_zeros_for_empty_prompt": True},
    )

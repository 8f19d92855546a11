"""Flux.1: a transformer over packed latents, told by CLIP and T5; the dev model is told a guidance too.

Sources: Black Forest Labs 2024, "FLUX.1"; Esser et al. 2024, "Scaling Rectified Flow Transformers"; the calls are those
of diffusers' FluxPipeline, which tests/laws/test_base_models.py compares with.

What the presets mean here (`adapters.targets`), of 19 double and 38 single blocks at full size:

    attention       double: attn.{to_q,to_k,to_v,to_out.0}, the picture's, and attn.{add_q_proj,add_k_proj,add_v_proj,
                    to_add_out}, the text's; single: attn.{to_q,to_k,to_v}, whose output layer is part of proj_out
    attention+mlp   and double: ff and ff_context, each net.{0.proj,2}; single: proj_mlp and proj_out, which
                    brings attention and feed-forward back together
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from scumble.errors import ModelError
from scumble.models.configs import Configs
from scumble.models.family import BaseModel, Components, Conditioning, Frame
from scumble.models.file_layout import FileLayout
from scumble.models.flow import FlowBase, FlowFamily
from scumble.models.flux_file import FLUX_FILE
from scumble.models.latents import factor_of
from scumble.models.text import Truncation, Words
from scumble.models.tiny import tiny_clip, tiny_t5, tiny_t5_tokenizer, tiny_tokenizer, tiny_vae

if TYPE_CHECKING:
    from diffusers import FluxPipeline

PATCH = 2
"""Side of the square of latents that is one token of the picture."""

READ = 512
"""Tokens of a prompt that T5 reads, as FluxPipeline has it read them."""

GUIDANCE = 1.0
"""What a guidance-distilled denoiser (dev) is told while it trains: the picture as the text alone has it."""

DRAWN = 3.5
"""The guidance that dev is told to draw, unless told otherwise, as in FluxPipeline. Schnell draws without."""

CLIP, T5 = "text_encoder", "text_encoder_2"

OTHERS = {
    128: "a depth or canny control model (Flux.1 Depth, Canny)",
    384: "an inpainting model (Flux.1 Fill)",
}
"""Channels of a packed token that the transformer takes, where they are not the VAE's -> what such a model is."""


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C): every square of 2x2 latents is one token, row by row.

    Raises:
        ModelError: a side is odd.
    """
    count, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ModelError(
            f"Flux packs latents by {PATCH}x{PATCH}, and these are {height}x{width}. Choose sides that are multiples "
            "of the base's size_multiple."
        )
    squares = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of height x width."""
    count, _, channels = tokens.shape
    squares = tokens.reshape(count, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // PATCH**2, height, width)


def places(height: int, width: int) -> Tensor:
    """(h/2 * w/2, 3): where each token of latents of height x width is, as (0, row, column)."""
    rows, columns = torch.arange(height // PATCH), torch.arange(width // PATCH)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros(len(grid), 1), grid], dim=1)


class FluxBase(FlowBase):
    """A frozen transformer, VAE, CLIP and T5, as diffusers' FluxPipeline puts them together."""

    family = "flux"
    repeated: ClassVar[tuple[str, ...]] = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    clip_words: ClassVar[Mapping[str, str]] = {CLIP: "tokenizer"}
    t5_parts: ClassVar[tuple[str, str]] = (T5, "tokenizer_2")
    t5_window: ClassVar[int] = READ
    t5_learns: ClassVar[bool] = True

    def __init__(self, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """See FlowBase."""
        super().__init__(parts, dtype=dtype, device=device)
        self.guided = bool(self.transformer.config.guidance_embeds)
        self.usual_guidance = DRAWN if self.guided else 0.0

    @staticmethod
    def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """See FlowBase: the VAE's own side, and a square of latents."""
        factor = factor_of(vae)
        return int(vae.get("sample_size") or 128 * factor), PATCH * factor

    @property
    def words(self) -> Words:
        """How T5 reads a prompt."""
        assert self.t5_reading is not None
        return self.t5_reading

    @property
    def teachable(self) -> tuple[str, ...]:
        """CLIP alone: T5 is as large as the transformer, and FluxPipeline reads no adapter of it."""
        return (CLIP,)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See BaseModel: (B prompts) -> T5's tokens (B, 512, D) and CLIP's pooled embedding (B, P), in the text
        encoders' dtype. T5 reads 512 tokens and CLIP 77; padding is not masked, as in the pipeline.

        The graph is recorded only where a parameter of the text encoder requires a gradient.
        """
        self._check_compute(CLIP)
        clip = self.clips[CLIP]
        ids, _ = self.readings[CLIP].ids(prompts)
        tokens = self._read_by_t5(prompts)
        with self._graph_of(clip), self._computing(CLIP):
            pooled: Tensor = clip(ids.to(self.device)).pooler_output
        return Conditioning(tokens, pooled.to(clip.dtype))

    def token_counts(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """T5's: what CLIP reads of a prompt's beginning only sums it up."""
        return self.words.counts(prompts), self.words.limit

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """The prompts that don't fit T5, each with what is lost of it."""
        return self.words.truncated(prompts)

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning, frame: Frame) -> Tensor:
        """See BaseModel: (B, C, h, w), t (B,) in [0, 1] -> (B, C, h, w) fp32. The transformer is told no `frame`, and
        dev a guidance: `conditioning.guidance`, else `GUIDANCE`."""
        self._check_compute("transformer")
        assert conditioning.pooled is not None
        height, width = latents.shape[-2:]
        guidance: Tensor | None = None
        if self.guided:
            told = conditioning.guidance
            guidance = (torch.full((len(latents),), GUIDANCE) if told is None else told).to(
                self.device, torch.float32
            )
        tokens = conditioning.tokens.to(self.device, self.dtype)
        with self._computing("transformer"):
            out: Tensor = self.transformer(
                hidden_states=pack(latents.to(self.device, self.dtype)),
                timestep=t.to(self.device),
                guidance=guidance,
                pooled_projections=conditioning.pooled.to(self.device, self.dtype),
                encoder_hidden_states=tokens,
                txt_ids=torch.zeros(tokens.shape[1], 3, device=self.device, dtype=self.dtype),
                img_ids=places(height, width).to(self.device, self.dtype),
                return_dict=False,
            )[0]
        return unpack(out, height, width).float()

    def asked(
        self, prompts: Sequence[str], negatives: Sequence[str] | None, guidance: float
    ) -> Mapping[str, Any]:
        """See BaseModel. `guidance` is what dev is told. A negative prompt is guided away from by that much instead, as
        other families do, at twice the time; dev is then told `GUIDANCE`."""
        if negatives is None or guidance <= 1:
            return {"prompt": list(prompts), "guidance_scale": guidance}
        return {
            "prompt": list(prompts),
            "negative_prompt": list(negatives),
            "true_cfg_scale": guidance,
            "guidance_scale": GUIDANCE,
        }

    def packed(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def unpacked(self, latents: Tensor, width: int, height: int) -> Tensor:
        return unpack(latents, height // self.latent_factor, width // self.latent_factor)

    def pipeline(self) -> FluxPipeline:
        """A FluxPipeline over these very modules, with a fresh copy of the base's own scheduler."""
        from diffusers import FluxPipeline

        pipeline = FluxPipeline(
            transformer=self.transformer,
            vae=self.vae,
            text_encoder=self.clips[CLIP],
            text_encoder_2=self.t5,
            tokenizer=self.readings[CLIP].tokenizer,
            tokenizer_2=self.words.tokenizer,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
        )
        return cast("FluxPipeline", self._agreed(pipeline))


class Flux(FlowFamily):
    """Flux.1: dev, which is told a guidance, and schnell, which is not; at full size 1024 pixels."""

    name: ClassVar[str] = FluxBase.family
    title: ClassVar[str] = "Flux.1"
    base: ClassVar[type[FlowBase]] = FluxBase
    denoiser: ClassVar[str] = "FluxTransformer2DModel"
    clip: ClassVar[str] = "CLIPTextModel"
    # CLIP only sums a prompt up: what of it is read is what T5 reads
    readers: ClassVar[tuple[str, ...]] = FluxBase.t5_parts[1:]
    single_file: ClassVar[FileLayout] = FLUX_FILE

    @classmethod
    def _strangers(cls, configs: Configs) -> Sequence[str]:
        name, parts = configs.name, configs.parts
        transformer, vae = parts["transformer"], parts.get("vae", {})
        problems = list(super()._strangers(configs))
        taken, latent = transformer.get("in_channels", 64), vae.get("latent_channels", 16)
        if taken in OTHERS or configs.pipeline.startswith("FluxKontext"):
            what = OTHERS.get(taken, "an editing model (Flux.1 Kontext)")
            problems.append(
                f"{name} is {what}, which is told a picture beside the text; this release trains text-to-image bases. "
                "Use the base that it was made from."
            )
        elif taken != latent * PATCH**2:
            problems.append(
                f"The parts of {name} don't belong together: its VAE has {latent} latent channels, {latent * PATCH**2} "
                f"for each square of {PATCH}x{PATCH}, and its transformer takes {taken}."
            )
        width, pooled = parts.get(CLIP, {}).get("hidden_size"), transformer.get("pooled_projection_dim", 768)
        if width not in (None, pooled):
            problems.append(
                f"The parts of {name} don't belong together: its CLIP gives {width} numbers a prompt and its "
                f"transformer takes {pooled}."
            )
        return problems

    @classmethod
    def tiny(cls, seed: int = 0) -> BaseModel:
        """The same classes in toy sizes, 16x16 pixels, on the CPU in fp32, guided as dev is."""
        return cls.load(tiny_flux(seed), dtype=torch.float32, device=torch.device("cpu"))


def tiny_flux(seed: int = 0, *, guided: bool = True) -> Components:
    """Random parts in toy sizes, of dev or (`guided` False) of schnell. The global random state is left as it was."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    clip_words, t5_words = tiny_tokenizer(), tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=guided,
            axes_dims_rope=(4, 6, 6),
        )
        vae = tiny_vae(0.3611, channels=16, shift_factor=0.1159)
        modules = {
            "transformer": transformer,
            "vae": vae,
            "text_encoder": CLIPTextModel(tiny_clip(clip_words, 24, "quick_gelu")),
            "text_encoder_2": T5EncoderModel(tiny_t5(t5_words, 32)),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guided else 1.0, use_dynamic_shifting=guided, base_shift=0.5, max_shift=1.15
    )
    words = {"tokenizer": clip_words, "tokenizer_2": t5_words}
    return Components(f"tiny-{Flux.name}", modules, words, scheduler)

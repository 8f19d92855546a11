"""Stable Diffusion 3 and 3.5: a transformer in which text and picture attend to each other, trained by flow matching.

Two CLIP text encoders and T5 speak to it: the CLIPs' hidden states side by side, filled up with zeros to T5's width,
then T5's; and the CLIPs' pooled embeddings. A base may lack T5: zeros are in its place then, as in the pipeline.

Sources: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"; the calls are
those of diffusers' StableDiffusion3Pipeline, which tests/laws/test_base_models.py compares with.

What the presets mean here (`adapters.targets`), in each of the 24 (3 medium, 3.5 medium) or 38 (3.5 large) blocks:

    attention       attn.{to_q,to_k,to_v,to_out.0}, the picture's, and attn.{add_q_proj,add_k_proj,add_v_proj,
                    to_add_out}, the text's; attn2.{to_q,to_k,to_v,to_out.0}, the picture's own second attention,
                    in the first 13 blocks of 3.5 medium
    attention+mlp   and ff.net.{0.proj,2}, the picture's, and ff_context.net.{0.proj,2}, the text's

The last block's text goes nowhere: it has no to_add_out and no ff_context, and nothing reads what becomes of its
add_q_proj, so that it is meant by neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from scumble.adapters.layers import mark_unread
from scumble.models.configs import Configs
from scumble.models.family import BaseModel, Components, Conditioning, Frame
from scumble.models.file_layout import FileLayout
from scumble.models.flow import FlowBase, FlowFamily
from scumble.models.latents import factor_of
from scumble.models.sd3_file import SD3_FILE
from scumble.models.text import Truncation
from scumble.models.tiny import tiny_clip, tiny_t5, tiny_t5_tokenizer, tiny_tokenizer, tiny_vae

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

READ = 256
"""Tokens of a prompt that T5 reads, as StableDiffusion3Pipeline has it read them."""

GUIDANCE = 7.0
"""What the pipeline draws with where nobody says another."""

TIMESTEPS = 1000
"""What the transformer is told of t is t times this."""

T5, T5_WORDS = "text_encoder_3", "tokenizer_3"


class SD3Base(FlowBase):
    """A frozen transformer, VAE, two CLIPs and perhaps T5, as diffusers' StableDiffusion3Pipeline puts them together.

    T5 is none of `roots`, and learns no words: the pipeline reads no adapter for it.
    """

    family = "sd3"
    usual_guidance = GUIDANCE
    repeated: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    clip_words: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    t5_parts: ClassVar[tuple[str, str]] = (T5, T5_WORDS)
    t5_window: ClassVar[int] = READ
    t5_learns: ClassVar[bool] = False

    def __init__(self, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """See FlowBase; `parts` may lack T5 and its tokenizer."""
        super().__init__(parts, dtype=dtype, device=device)
        # the text of the last block is not carried on: its queries are asked, and their answers dropped
        mark_unread(self.transformer.transformer_blocks[-1].attn.add_q_proj)

    @staticmethod
    def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """See FlowBase."""
        factor = factor_of(vae)
        side, patch = transformer.get("sample_size", 128), transformer.get("patch_size", 2)
        return int(side) * factor, int(patch) * factor

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See BaseModel: (B prompts) -> tokens (B, 77 + 256, D) and pooled (B, P1 + P2), in the text encoders' dtype.
        The CLIPs read 77 tokens, T5 256; padding is not masked, as in the pipeline.

        The graph is recorded only where a parameter of a CLIP requires a gradient.
        """
        self._check_compute(*self.clips)
        hidden, pooled = [], []
        with self._graph_of(*self.clips.values()):
            for root, clip in self.clips.items():
                ids, _ = self.readings[root].ids(prompts)
                with self._computing(root):
                    read = clip(ids.to(self.device), output_hidden_states=True)
                hidden.append(read.hidden_states[-2].to(clip.dtype))
                pooled.append(read.text_embeds)
            tokens, width = torch.cat(hidden, dim=-1), self.transformer.config.joint_attention_dim
            tokens = nn.functional.pad(tokens, (0, width - tokens.shape[-1]))
            return Conditioning(
                torch.cat([tokens, self._read_by_t5(prompts)], dim=1), torch.cat(pooled, dim=-1)
            )

    def token_counts(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """See BaseModel: the CLIPs'. What they no longer read of a long prompt reaches the denoiser by T5 alone."""
        counts = [words.counts(prompts) for words in self.readings.values()]
        return [max(each) for each in zip(*counts, strict=True)], min(
            words.limit for words in self.readings.values()
        )

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """The prompts that don't fit a CLIP, each with what is lost of it."""
        lost = [each for words in self.readings.values() for each in words.truncated(prompts)]
        return list(dict.fromkeys(lost))

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning, frame: Frame) -> Tensor:
        """See BaseModel: (B, C, h, w), t (B,) in [0, 1] -> (B, C, h, w) fp32. The transformer is told no `frame`."""
        self._check_compute("transformer")
        assert conditioning.pooled is not None
        with self._computing("transformer"):
            out: Tensor = self.transformer(
                hidden_states=latents.to(self.device, self.dtype),
                timestep=t.to(self.device) * TIMESTEPS,
                encoder_hidden_states=conditioning.tokens.to(self.device, self.dtype),
                pooled_projections=conditioning.pooled.to(self.device, self.dtype),
                return_dict=False,
            )[0]
        return out.float()

    def pipeline(self) -> StableDiffusion3Pipeline:
        """A StableDiffusion3Pipeline over these very modules, with a fresh copy of the base's own scheduler."""
        from diffusers import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline(
            transformer=self.transformer,
            vae=self.vae,
            text_encoder=self.clips["text_encoder"],
            text_encoder_2=self.clips["text_encoder_2"],
            text_encoder_3=self.t5,
            tokenizer=self.readings["text_encoder"].tokenizer,
            tokenizer_2=self.readings["text_encoder_2"].tokenizer,
            tokenizer_3=None if self.t5_reading is None else self.t5_reading.tokenizer,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
        )
        read: Any = pipeline._get_clip_prompt_embeds
        vocabularies = list(self.vocabularies.values())

        def spelled(prompt: str | Sequence[str], *others: Any, clip_model_index: int = 0, **told: Any) -> Any:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            expand = vocabularies[clip_model_index].expand
            return read([expand(one) for one in prompts], *others, clip_model_index=clip_model_index, **told)

        # alone of diffusers' pipelines it doesn't spell a word of several vectors as its tokens
        pipeline._get_clip_prompt_embeds = spelled
        return cast("StableDiffusion3Pipeline", self._agreed(pipeline))


class SD3(FlowFamily):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large; at full size 1024 pixels."""

    name: ClassVar[str] = SD3Base.family
    title: ClassVar[str] = "Stable Diffusion 3"
    base: ClassVar[type[FlowBase]] = SD3Base
    denoiser: ClassVar[str] = "SD3Transformer2DModel"
    clip: ClassVar[str] = "CLIPTextModelWithProjection"
    readers: ClassVar[tuple[str, ...]] = tuple(SD3Base.clip_words.values())
    needs_t5: ClassVar[bool] = False
    single_file: ClassVar[FileLayout] = SD3_FILE

    @classmethod
    def _assumed(cls, configs: Configs) -> Sequence[str]:
        if T5 in configs.parts:
            return ()
        return ("It has no T5 (text_encoder_3): prompts are read by its two CLIPs alone.",)

    @classmethod
    def _incomplete(cls, configs: Configs) -> Sequence[str]:
        name, parts, found = configs.name, configs.parts, list(super()._incomplete(configs))
        if any(T5 in phrase or T5_WORDS in phrase for phrase in configs.missing):
            found[0] += (
                " To do without T5, set text_encoder_3 and tokenizer_3 to [null, null] in model_index.json."
            )
        if (T5 in parts) != (T5_WORDS in parts):
            there, absent = (T5, T5_WORDS) if T5 in parts else (T5_WORDS, T5)
            found.append(
                f"{name} has {there} (T5) and no {absent}: T5 needs both. Download {absent}, or do without T5: set "
                "both to [null, null] in model_index.json."
            )
        return found

    @classmethod
    def _strangers(cls, configs: Configs) -> Sequence[str]:
        name, parts = configs.name, configs.parts
        transformer, vae = parts["transformer"], parts.get("vae", {})
        apart = f"The parts of {name} don't belong together: "
        problems = list(super()._strangers(configs))
        taken, latent = transformer.get("in_channels", 16), vae.get("latent_channels")
        if latent is not None and latent != taken:
            problems.append(f"{apart}its VAE has {latent} latent channels and its transformer takes {taken}.")
        clips = [parts.get(root, {}) for root in SD3Base.clip_words]
        width, pooled = (
            transformer.get("joint_attention_dim", 4096),
            transformer.get("pooled_projection_dim", 2048),
        )
        said = [clip["projection_dim"] for clip in clips if clip.get("projection_dim") is not None]
        if len(said) == len(clips) and sum(said) != pooled:
            problems.append(
                f"{apart}its CLIPs' pooled embeddings have {' + '.join(map(str, said))} numbers and its transformer "
                f"takes {pooled}."
            )
        hidden = [clip["hidden_size"] for clip in clips if clip.get("hidden_size") is not None]
        if len(hidden) == len(clips) and sum(hidden) > width:
            problems.append(
                f"{apart}its CLIPs give {' + '.join(map(str, hidden))} numbers a token and its transformer takes "
                f"{width}."
            )
        return problems

    @classmethod
    def tiny(cls, seed: int = 0) -> BaseModel:
        """The same classes in toy sizes, 16x16 pixels, on the CPU in fp32, with dual attention as 3.5 medium has it."""
        return cls.load(tiny_sd3(seed), dtype=torch.float32, device=torch.device("cpu"))


def tiny_sd3(seed: int = 0, *, t5: bool = True) -> Components:
    """Random parts in toy sizes, with T5 or without. The global random state is left as it was."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    first, second = tiny_tokenizer(), tiny_tokenizer("!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, nn.Module] = {
            "transformer": SD3Transformer2DModel(
                sample_size=8,
                in_channels=16,
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=64,
                caption_projection_dim=32,
                pooled_projection_dim=24 + 40,
                out_channels=16,
                pos_embed_max_size=8,
                dual_attention_layers=(0, 1),
                qk_norm="rms_norm",
            ),
            "vae": tiny_vae(1.5305, channels=16, shift_factor=0.0609),
            "text_encoder": CLIPTextModelWithProjection(tiny_clip(first, 24, "quick_gelu")),
            # published configs call 2 the end of the text, from when the largest id was taken for it
            "text_encoder_2": CLIPTextModelWithProjection(
                tiny_clip(second, 32, "gelu", projection_dim=40, eos_token_id=2)
            ),
        }
        tokenizers: dict[str, Any] = {"tokenizer": first, "tokenizer_2": second}
        if t5:
            tokenizers[T5_WORDS] = tiny_t5_tokenizer()
            modules[T5] = T5EncoderModel(tiny_t5(tokenizers[T5_WORDS], 64))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Components(f"tiny-{SD3.name}", modules, tokenizers, scheduler)

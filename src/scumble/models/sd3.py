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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from scumble.adapters.layers import mark_unread
from scumble.errors import ModelError
from scumble.models.configs import BaseFacts, Configs
from scumble.models.family import BaseModel, Components, Conditioning, Frame
from scumble.models.latent_base import LatentBase
from scumble.models.prediction import Flow, prediction_type
from scumble.models.text import Truncation, Words
from scumble.models.tiny import tiny_clip, tiny_t5, tiny_t5_tokenizer, tiny_tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

READ = 256
"""Tokens of a prompt that T5 reads, as StableDiffusion3Pipeline has it read them."""

GUIDANCE = 7.0
"""What the pipeline draws with where nobody says another."""

TIMESTEPS = 1000
"""What the transformer is told of t is t times this."""

CLIPS: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Each text encoder that adapters and words go to, and its tokenizer."""

T5, T5_WORDS = "text_encoder_3", "tokenizer_3"


class SD3Base(LatentBase):
    """A frozen transformer, VAE, two CLIPs and perhaps T5, as diffusers' StableDiffusion3Pipeline puts them together.

    T5 is none of `roots`, and learns no words: the pipeline reads no adapter for it. From a folder it is loaded when a
    prompt is first read, so never where all that it says is cached.
    """

    def __init__(self, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """`parts` hold "transformer", "vae", the CLIPs and their tokenizers, and perhaps T5 and its own; modules are
        moved to `device` and frozen in place.

        `dtype` is that of the transformer and the text encoders, but for T5's layers `wo`, which overflow in fp16 and
        stay fp32 then. The VAE has it too, except that fp16 on a CPU is fp32 there.

        Raises:
            ModelError: a tokenizer knows more tokens than its text encoder.
        """
        self._open(parts, family=SD3.name, dtype=dtype, device=device)
        self.transformer: Any = parts.modules["transformer"]
        self.clips: dict[str, Any] = {root: parts.modules[root] for root in CLIPS}
        self._t5: Any = parts.modules.get(T5)
        self._t5_later = parts.deferred.get(T5)
        self._t5_mark = ""
        self._spared = False
        for module in (self.transformer, *self.clips.values()):
            self._settle(module, dtype)
        # the text of the last block is not carried on: its queries are asked, and their answers dropped
        transformer, vae = cast(Any, self.transformer), cast(Any, self.vae)
        mark_unread(transformer.transformer_blocks[-1].attn.add_q_proj)
        self.roots = {"transformer": self.transformer, **self.clips}
        self.usual_guidance = GUIDANCE
        self.resolution, self.size_multiple = sizes(transformer.config, vae.config)
        self.readings = {
            root: Words(parts.tokenizers[words], self.clips[root].config.max_position_embeddings)
            for root, words in CLIPS.items()
        }
        """How each CLIP reads a prompt."""
        has_t5 = self._t5 is not None or self._t5_later is not None
        self.t5_reading = Words(parts.tokenizers[T5_WORDS], READ) if has_t5 else None
        """How T5 reads a prompt; None where the base has none."""
        self.vocabularies = {root: words.vocabulary for root, words in self.readings.items()}
        for root, words in CLIPS.items():
            self._refuse_strangers(words, parts.tokenizers[words], self.clips[root])
        if self._t5 is not None:
            self._take_t5()

    def _take_t5(self) -> None:
        assert self.t5_reading is not None
        self._refuse_strangers(T5_WORDS, self.t5_reading.tokenizer, self._t5)
        self._settle_t5(self._t5)

    @property
    def t5(self) -> Any:
        """T5, loaded when it is first asked for; None where the base has none."""
        if self._t5 is None and self._t5_later is not None:
            self._t5, said = self._t5_later.load()
            self._take_t5()
            self.notes = (*self.notes, *(note for note in said if note not in self.notes))
        return self._t5

    def modules(self) -> Mapping[str, nn.Module]:
        """See BaseModel: T5 is among them where it is not one of `waiting`."""
        own = {} if self._t5 is None or self._t5_later is not None else {T5: self._t5}
        return {**self.roots, "vae": self.vae, **own}

    def waiting(self) -> Mapping[str, str]:
        """See BaseModel: T5, of a base that was loaded from a folder."""
        if self._t5_later is None:
            return {}
        self._t5_mark = self._t5_mark or self._t5_later.mark()
        return {T5: self._t5_mark}

    def release(self) -> None:
        """See BaseModel: lets go of T5."""
        if self._t5_later is not None:
            self._t5 = None

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """See BaseModel: zeros are in the place of a T5 that would have to be loaded."""
        before, self._spared = self._spared, self._t5_later is not None
        try:
            yield
        finally:
            self._spared = before

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See BaseModel: (B prompts) -> tokens (B, 77 + 256, D) and pooled (B, P1 + P2), in the text encoders' dtype.
        The CLIPs read 77 tokens, T5 256; padding is not masked, as in the pipeline.

        The graph is recorded only where a parameter of a CLIP requires a gradient.
        """
        self._check_compute()
        hidden, pooled = [], []
        trains = any(one.requires_grad for clip in self.clips.values() for one in clip.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            for root, clip in self.clips.items():
                ids, _ = self.readings[root].ids(prompts)
                read = clip(ids.to(self.device), output_hidden_states=True)
                hidden.append(read.hidden_states[-2].to(clip.dtype))
                pooled.append(read.text_embeds)
            tokens, width = torch.cat(hidden, dim=-1), self.transformer.config.joint_attention_dim
            tokens = nn.functional.pad(tokens, (0, width - tokens.shape[-1]))
            return Conditioning(
                torch.cat([tokens, self._read_by_t5(prompts)], dim=1), torch.cat(pooled, dim=-1)
            )

    @torch.no_grad()
    def _read_by_t5(self, prompts: Sequence[str]) -> Tensor:
        """(B, 256, D): what T5 says, or zeros in the place of one that is not there."""
        if self.t5_reading is None or self._spared:
            width = self.transformer.config.joint_attention_dim
            return torch.zeros(
                len(prompts), READ, width, device=self.device, dtype=self.clips["text_encoder"].dtype
            )
        ids, _ = self.t5_reading.ids(prompts)
        said: Tensor = self.t5(ids.to(self.device))[0]
        return said.to(self.t5.dtype)

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
        self._check_compute()
        assert conditioning.pooled is not None
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
        return pipeline


def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """(default side in pixels, what sides must be multiples of), from the configs of transformer and VAE."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return int(transformer.get("sample_size", 128)) * factor, int(transformer.get("patch_size", 2)) * factor


class SD3:
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large; at full size 1024 pixels."""

    name: ClassVar[str] = "sd3"
    title: ClassVar[str] = "Stable Diffusion 3"

    @classmethod
    def recognises(cls, configs: Configs) -> bool:
        """By its transformer's class."""
        return configs.parts.get("transformer", {}).get("_class_name") == "SD3Transformer2DModel"

    @classmethod
    def describe(cls, configs: Configs) -> BaseFacts:
        """See Family."""
        transformer, vae = configs.parts["transformer"], configs.parts.get("vae", {})
        known = bool(vae.get("block_out_channels"))
        side, multiple = sizes(transformer, vae) if known else (None, None)
        alone = (
            ()
            if T5 in configs.parts
            else ("It has no T5 (text_encoder_3): prompts are read by its two CLIPs alone.",)
        )
        return BaseFacts(
            name=configs.name,
            family=cls.name,
            title=cls.title,
            prediction=Flow.name,
            cross_attention_dim=transformer.get("joint_attention_dim", 4096),
            resolution=side,
            size_multiple=multiple,
            latent_factor=2 ** (len(vae["block_out_channels"]) - 1) if known else None,
            latent_channels=vae.get("latent_channels", 16),
            parameters=configs.parameters,
            weights_dtype=configs.weights_dtype,
            deferred=(T5,),
            readers=tuple(CLIPS.values()),
            problems=tuple(cls._problems(configs)),
            notes=(*configs.notes, *alone),
        )

    @classmethod
    def _problems(cls, configs: Configs) -> Sequence[str]:
        name, parts = configs.name, configs.parts
        problems = []
        needed = ("vae", *CLIPS, *CLIPS.values(), "scheduler")
        lack = [f"the {part} folder" for part in needed if part not in parts]
        if lack or configs.missing:
            without = (
                " To do without T5, set text_encoder_3 and tokenizer_3 to [null, null] in model_index.json."
                if any(T5 in phrase or T5_WORDS in phrase for phrase in configs.missing)
                else ""
            )
            problems.append(
                f"{name} is not complete. Missing: {'; '.join([*lack, *configs.missing])}.{without}"
            )
        if (T5 in parts) != (T5_WORDS in parts):
            there, absent = (T5, T5_WORDS) if T5 in parts else (T5_WORDS, T5)
            problems.append(
                f"{name} has {there} (T5) and no {absent}: T5 needs both. Download {absent}, or do without T5: set "
                "both to [null, null] in model_index.json."
            )
        if "scheduler" in parts:
            problems.extend(cls._other_prediction(name, parts["scheduler"]))
        return [*problems, *cls._strangers(configs)]

    @classmethod
    def _other_prediction(cls, name: str, scheduler: Mapping[str, Any]) -> Sequence[str]:
        try:
            kind, _ = prediction_type(scheduler)
        except ModelError as error:
            return [f"{name}: {error}"]
        if kind == Flow.name:
            return []
        return [
            f"The scheduler of {name}, a {scheduler.get('_class_name', 'scheduler of no known class')}, says that it "
            f"predicts {kind}; {cls.title} is trained by flow matching. Take the scheduler folder of the base that it "
            "was made from."
        ]

    @classmethod
    def _strangers(cls, configs: Configs) -> Sequence[str]:
        """Parts that don't belong together, by their widths and classes."""
        name, parts = configs.name, configs.parts
        transformer, vae = parts["transformer"], parts.get("vae", {})
        apart = f"The parts of {name} don't belong together: "
        problems = []
        taken, latent = transformer.get("in_channels", 16), vae.get("latent_channels")
        if latent is not None and latent != taken:
            problems.append(f"{apart}its VAE has {latent} latent channels and its transformer takes {taken}.")
        clips = [parts.get(root, {}) for root in CLIPS]
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
        speaks = parts.get(T5, {}).get("d_model")
        if speaks is not None and speaks != width:
            problems.append(
                f"{apart}its T5 gives {speaks} numbers a token and its transformer takes {width}."
            )
        for part, kind in (
            *((root, "CLIPTextModelWithProjection") for root in CLIPS),
            (T5, "T5EncoderModel"),
        ):
            is_a = parts.get(part, {}).get("_class_name", kind)
            if is_a != kind:
                problems.append(f"The {part} of {name} is a {is_a}; {cls.title} has a {kind} there.")
        return problems

    @classmethod
    def load(cls, source: Components, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
        """See Family."""
        return SD3Base(source, dtype=dtype, device=device)

    @classmethod
    def tiny(cls, seed: int = 0) -> BaseModel:
        """The same classes in toy sizes, 16x16 pixels, on the CPU in fp32, with dual attention as 3.5 medium has it."""
        return cls.load(tiny_sd3(seed), dtype=torch.float32, device=torch.device("cpu"))


def tiny_sd3(seed: int = 0, *, t5: bool = True) -> Components:
    """Random parts in toy sizes, with T5 or without. The global random state is left as it was."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
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
            "vae": AutoencoderKL(
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=16,
                sample_size=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
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

"""Flow bases: what Stable Diffusion 3 and Flux.1 share: a transformer trained by flow matching, a VAE, CLIP, and a T5
that is loaded when a prompt is first read, so never where all that it says is cached.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.models.configs import BaseFacts, Configs
from scumble.models.family import BaseModel, Components
from scumble.models.latent_base import LatentBase
from scumble.models.latents import factor_of
from scumble.models.prediction import Flow, prediction_type
from scumble.models.resting import in_use
from scumble.models.text import Words


class FlowBase(LatentBase):
    """A frozen transformer, VAE, one CLIP or several, and T5.

    Of a base that was loaded from files, T5 is one of `waiting`: it is loaded when a prompt is first read, and
    `release` lets it go again.
    """

    clip_words: ClassVar[Mapping[str, str]]
    """Each CLIP, and the tokenizer whose words it reads."""
    t5_parts: ClassVar[tuple[str, str]]
    """What T5 and its tokenizer are called."""
    t5_window: ClassVar[int]
    """Tokens of a prompt that T5 reads, as the pipeline has it read them."""
    t5_learns: ClassVar[bool]
    """Whether words and adapters go to T5 too. While it is loaded, it is one of `roots` then."""

    @staticmethod
    @abstractmethod
    def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """(default side in pixels, what sides must be multiples of), from the configs of transformer and VAE."""

    def __init__(self, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """`parts` hold "transformer", "vae", the CLIPs, their tokenizers, and T5 and its own, perhaps `deferred`;
        modules are moved to `device` and frozen in place.

        `dtype` is that of every component for which `parts.dtypes` has no other, but for T5's layers `wo`, which
        overflow in fp16 and stay fp32 then, and a VAE, which has fp32 for fp16 on a CPU.

        Raises:
            ModelError: a tokenizer knows more tokens than its text encoder.
        """
        self._open(parts, denoiser="transformer", family=self.family, dtype=dtype, device=device)
        modules: Mapping[str, Any] = parts.modules
        self.transformer = modules["transformer"]
        self.clips = {root: modules[root] for root in self.clip_words}
        name, words = self.t5_parts
        self._t5: Any = modules.get(name)
        self._t5_later = parts.deferred.get(name)
        self._t5_mark, self._t5_dtype = "", parts.dtype_of(name, dtype)
        self._claimed = self._spared = False
        for root, module in {"transformer": self.transformer, **self.clips}.items():
            self._settle(module, parts.dtype_of(root, dtype))
        self.resolution, self.size_multiple = self.sizes(self.transformer.config, self.vae.config)
        self.readings = {
            root: Words(parts.tokenizers[read], self.clips[root].config.max_position_embeddings)
            for root, read in self.clip_words.items()
        }
        """How each CLIP reads a prompt."""
        has_t5 = self._t5 is not None or self._t5_later is not None
        self.t5_reading = Words(parts.tokenizers[words], self.t5_window) if has_t5 else None
        """How T5 reads a prompt; None where the base has none."""
        self.vocabularies = {root: read.vocabulary for root, read in self.readings.items()}
        if self.t5_learns and self.t5_reading is not None:
            self.vocabularies = {**self.vocabularies, name: self.t5_reading.vocabulary}
        for root, read in self.clip_words.items():
            self._refuse_strangers(read, parts.tokenizers[read], self.clips[root])
        self._arrange()
        if self._t5 is not None:
            self._take_t5()

    def _arrange(self) -> None:
        """Say anew where adapters may go."""
        loaded = {self.t5_parts[0]: self._t5} if self.t5_learns and self._t5 is not None else {}
        self.roots = {"transformer": self.transformer, **self.clips, **loaded}

    def _take_t5(self) -> None:
        assert self.t5_reading is not None
        self._refuse_strangers(self.t5_parts[1], self.t5_reading.tokenizer, self._t5)
        self._settle_t5(self._t5, self._t5_dtype)

    @property
    def t5(self) -> Any:
        """T5, loaded when it is first asked for; None where the base has none."""
        if self._t5 is None and self._t5_later is not None:
            self._t5, said = self._t5_later.load()
            self._take_t5()
            self._arrange()
            self.notes = (*self.notes, *(note for note in said if note not in self.notes))
        return self._t5

    @property
    def late(self) -> tuple[str, ...]:
        """See BaseModel: T5, where it learns."""
        return self.t5_parts[:1] if self.t5_learns and self._t5_later is not None else ()

    def claim(self, names: Collection[str]) -> None:
        """See BaseModel."""
        if not set(self.late).isdisjoint(names):
            self._claimed = self.t5 is not None

    def modules(self) -> Mapping[str, nn.Module]:
        """See BaseModel: T5 is among them where it is not one of `waiting`."""
        self._wake()
        own = {} if self._t5 is None or self._t5_later is not None else {self.t5_parts[0]: self._t5}
        return {"transformer": self.transformer, **self.clips, "vae": self.vae, **own}

    def waiting(self) -> Mapping[str, str]:
        """See BaseModel: T5, of a base that was loaded from files."""
        if self._t5_later is None:
            return {}
        self._t5_mark = self._t5_mark or self._t5_later.mark()
        return {self.t5_parts[0]: self._t5_mark}

    def release(self) -> None:
        """See BaseModel: lets go of T5, unless something hangs in it, and of what `rest` was told of."""
        super().release()
        if self._t5 is None or self._t5_later is None or self._claimed:
            return
        if not in_use(self._t5):
            self._t5 = None
            self._arrange()

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """See BaseModel: zeros are in the place of a T5 that would have to be loaded."""
        before, self._spared = self._spared, self._t5_later is not None and not self._claimed
        try:
            yield
        finally:
            self._spared = before

    def _read_by_t5(self, prompts: Sequence[str]) -> Tensor:
        """(B, `t5_window`, D): what T5 says, or zeros in the place of one that is not there."""
        if self.t5_reading is None or self._spared:
            width, dtype = self.transformer.config.joint_attention_dim, self.clips["text_encoder"].dtype
            return torch.zeros(len(prompts), self.t5_window, width, device=self.device, dtype=dtype)
        name = self.t5_parts[0]
        self._check_compute(name)
        ids, _ = self.t5_reading.ids(prompts)
        with self._graph_of(self.t5), self._computing(name):
            said: Tensor = self.t5(ids.to(self.device))[0]
        return said.to(self.t5.dtype)


class FlowFamily:
    """A family over one class of transformer, with its CLIPs and T5."""

    name: ClassVar[str]
    title: ClassVar[str]
    base: ClassVar[type[FlowBase]]
    denoiser: ClassVar[str]
    """The transformer's class in diffusers."""
    clip: ClassVar[str]
    """The CLIPs' class in transformers."""
    readers: ClassVar[tuple[str, ...]]
    """See BaseFacts."""
    needs_t5: ClassVar[bool] = True

    @classmethod
    def recognises(cls, configs: Configs) -> bool:
        """By its transformer's class."""
        return configs.parts.get("transformer", {}).get("_class_name") == cls.denoiser

    @classmethod
    def describe(cls, configs: Configs) -> BaseFacts:
        """See Family."""
        transformer, vae = configs.parts["transformer"], configs.parts.get("vae", {})
        known = bool(vae.get("block_out_channels"))
        side, multiple = cls.base.sizes(transformer, vae) if known else (None, None)
        return BaseFacts(
            name=configs.name,
            family=cls.name,
            title=cls.title,
            prediction=Flow.name,
            cross_attention_dim=_width(transformer),
            resolution=side,
            size_multiple=multiple,
            latent_factor=factor_of(vae) if known else None,
            latent_channels=vae.get("latent_channels", 16),
            parameters=configs.parameters,
            weights_dtype=configs.weights_dtype,
            deferred=cls.base.t5_parts[:1],
            readers=cls.readers,
            guided=bool(transformer.get("guidance_embeds", False)),
            problems=tuple(cls._problems(configs)),
            notes=(*configs.notes, *cls._assumed(configs)),
        )

    @classmethod
    def _assumed(cls, configs: Configs) -> Sequence[str]:
        """What is assumed of a base beside what its configs say."""
        return ()

    @classmethod
    def _problems(cls, configs: Configs) -> Sequence[str]:
        return [
            *cls._incomplete(configs),
            *cls._other_prediction(configs),
            *cls._other_classes(configs),
            *cls._strangers(configs),
        ]

    @classmethod
    def _incomplete(cls, configs: Configs) -> Sequence[str]:
        own, t5 = cls.base.clip_words, cls.base.t5_parts
        needed = ("vae", *own, *own.values(), *(t5 if cls.needs_t5 else ()), "scheduler")
        titles = {**dict.fromkeys(own, " (CLIP)"), t5[0]: " (T5)"}
        lack = [f"the {part} folder{titles.get(part, '')}" for part in needed if part not in configs.parts]
        if not lack and not configs.missing:
            return []
        return [f"{configs.name} is not complete. Missing: {'; '.join([*lack, *configs.missing])}."]

    @classmethod
    def _other_prediction(cls, configs: Configs) -> Sequence[str]:
        scheduler = configs.parts.get("scheduler")
        if scheduler is None:
            return []
        try:
            kind, _ = prediction_type(scheduler)
        except ModelError as error:
            return [f"{configs.name}: {error}"]
        if kind == Flow.name:
            return []
        return [
            f"The scheduler of {configs.name}, a {scheduler.get('_class_name', 'scheduler of no known class')}, says "
            f"that it predicts {kind}; {cls.title} is trained by flow matching. Take the scheduler folder of the base "
            "that it was made from."
        ]

    @classmethod
    def _other_classes(cls, configs: Configs) -> Sequence[str]:
        kinds = {**dict.fromkeys(cls.base.clip_words, cls.clip), cls.base.t5_parts[0]: "T5EncoderModel"}
        found = {part: configs.parts.get(part, {}).get("_class_name", kind) for part, kind in kinds.items()}
        return [
            f"The {part} of {configs.name} is a {found[part]}; {cls.title} has a {kind} there."
            for part, kind in kinds.items()
            if found[part] != kind
        ]

    @classmethod
    def _strangers(cls, configs: Configs) -> Sequence[str]:
        """Parts that don't belong together, by their widths."""
        speaks = configs.parts.get(cls.base.t5_parts[0], {}).get("d_model")
        width = _width(configs.parts["transformer"])
        if speaks in (None, width):
            return []
        return [
            f"The parts of {configs.name} don't belong together: its T5 gives {speaks} numbers a token and its "
            f"transformer takes {width}."
        ]

    @classmethod
    def load(cls, source: Components, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
        """See Family."""
        return cls.base(source, dtype=dtype, device=device)


def _width(transformer: Mapping[str, Any]) -> int:
    """Numbers of a token that the transformer takes."""
    return int(transformer.get("joint_attention_dim", 4096))

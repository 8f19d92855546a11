"""The names of ComfyUI: the base's own, with dots, before `.lora_A.weight`, and `.alpha` beside; read only.

    diffusion_model.input_blocks.4.1.proj_in.lora_A.weight            ComfyUI, OneTrainer
    input_blocks.4.1.proj_in.lora_A.weight                            OneTrainer's "original"
    text_encoders.clip_l.transformer.text_model.encoder...            clip_g: SDXL's second; clip_h: SD 2's
    lora_unet.down_blocks.1.attentions.0.proj_in.lora_down.weight     with diffusers' names

The scale is alpha / r; without alpha it is 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, partial

from scumble.adapters.state import AdapterState, LayerPath
from scumble.errors import WrongBase
from scumble.formats.bundles import with_tokens
from scumble.formats.codec import cannot_represent
from scumble.formats.container import TensorFile
from scumble.formats.flat_names import FLUX_DOTTED, known_layers, original_names
from scumble.formats.keymap import LayerNames
from scumble.formats.pairs import Decoded, Factor, assemble, refuse_unsupported, split_factor
from scumble.formats.scales import settle

_PREFIX = re.compile(
    r"(?P<unet>diffusion_model\.|lora_unet\.|(?=(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.))"
    r"|(?P<text_encoder>text_encoders\.clip_[lh]\.(?:transformer\.)?|clip_[lh]\.transformer\.|lora_te1?\.)"
    r"|(?P<text_encoder_2>text_encoders\.clip_g\.(?:transformer\.)?|clip_g\.transformer\.|lora_te2\.)"
)
_TRANSFORMER = re.compile(
    r"diffusion_model\.(double_blocks|single_blocks|joint_blocks|transformer_blocks|blocks|layers)\.|"
    r"text_encoders\.(?!clip_[lgh]\.)\w+\."
)


class ComfyUI:
    """What ComfyUI, OneTrainer and ai-toolkit write under the names of the base itself."""

    name = "comfyui"
    read_only = True

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor is a factor under such a name, and none is Flux's."""
        if any(FLUX_DOTTED.match(name) for name in file.tensors):
            return False
        return any(
            _PREFIX.match(name) and split_factor(name)[1] not in ("", "alpha") for name in file.tensors
        )

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`."""
        refuse_unsupported(file.tensors)
        strange = [name for name in file.tensors if _TRANSFORMER.match(name)]
        if strange:
            raise WrongBase(
                f"{file.label} is for a diffusion transformer (Flux, SD 3 or later) or its text encoder, first "
                f"{strange[0][:120]!r}. This version reads adapters for SD 1, SD 2 and SDXL."
            )
        factors = [Factor(name, *split) for name in file.tensors if (split := split_factor(name))[1]]
        pairs = {factor.layer for factor in factors if factor.part != "alpha"}
        factors = [factor for factor in factors if factor.layer in pairs]
        return with_tokens(file, assemble(file, factors, _DottedNames(layers), partial(settle, file)))

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        return "it is read and not written, since its readers read the others too"

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`."""
        raise cannot_represent(self, state)


class _DottedNames:
    """Layers under the original code's names or diffusers', behind ComfyUI's prefixes."""

    def __init__(self, layers: Collection[LayerPath] | None) -> None:
        self._names = LayerNames(layers)
        self._original: Mapping[str, LayerPath] = _known() if layers is None else original_names(layers)

    def resolve(self, spelled: str) -> LayerPath | None:
        match = _PREFIX.match(spelled)
        if match is None or match.lastgroup is None:
            return self._names.resolve(spelled)
        rest = spelled[match.end() :]
        if match.lastgroup == "unet" and rest in self._original:
            return self._original[rest]
        return self._names.resolve(f"{match.lastgroup}.{rest}")

    def shape(self, path: LayerPath) -> Sequence[int] | None:
        return self._names.shape(path)

    def labelled(self, spelled: str) -> str:
        match = _PREFIX.match(spelled)
        return f"{(match and match.lastgroup) or 'unet'}.{spelled}"


@lru_cache(maxsize=1)
def _known() -> Mapping[str, LayerPath]:
    return original_names(known_layers())

"""The format of kohya's sd-scripts, which A1111, ComfyUI and everything else reads: flat names and `.alpha`.

    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight   (r, in[, k, k])
    lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight     (out, r[, 1, 1])
    lora_unet_down_blocks_1_attentions_0_proj_in.alpha              one number; absent or 0: alpha = r
    lora_unet_..._conv1.lora_mid.weight                             (r, r, k, k): down is 1x1 then (Tucker)

The scale is alpha / r, layer by layer. Names are those of `flat_names.py`. SDXL's are written with the block
names of the original code, as sd-scripts does. The header says of the training what those tools show (`ss_*`,
`modelspec.*`), and carries the hashes by which they know a file again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from scumble.adapters.names import SIDES
from scumble.adapters.state import AdapterState, LayerPath, LayerState, Metadata
from scumble.errors import WrongBase
from scumble.formats.bundles import with_tokens
from scumble.formats.codec import cannot_represent, cross_attention_width, down_shapes
from scumble.formats.container import TensorFile, pieces
from scumble.formats.flat_names import FLUX_FLAT, FlatNames, is_flat, is_sdxl, of_lycoris, spell
from scumble.formats.metadata import compact, to_header
from scumble.formats.pairs import (
    Decoded,
    Factor,
    alpha_tensor,
    assemble,
    beyond_lora,
    check_lora,
    refuse_unsupported,
    split_factor,
)
from scumble.formats.scales import settle
from scumble.formats.tables.bases import WIDTHS

_TRANSFORMER = re.compile(
    r"(lora_unet|lycoris)_(transformer_)?(double_blocks|single_blocks|joint_blocks|transformer_blocks|"
    r"single_transformer_blocks)_"
)
_LEGACY_WINDOW = (0x100000, 0x110000)
_SAID = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora", "512x512"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora", "512x512"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "1024x1024"),
    "flux": ("flux1", "flux-1-dev/lora", "1024x1024"),
}
"""Base family -> (ss_base_model_version, modelspec.architecture, modelspec.resolution)."""
_SAID_OF_VELOCITY = {"sd2": ("sd_v2_v", "stable-diffusion-v2-768-v/lora", "768x768")}
"""The same of a base that predicts velocity, where it is called otherwise."""
_V2 = ("sd_v2", "sd_v2_v")
"""Versions that kohya's tools call v2."""
_CODE = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "flux": "https://github.com/black-forest-labs/flux",
}
"""Base family -> modelspec.implementation, where it is not "diffusers"."""
_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}


class Kohya:
    """What `networks.lora` of sd-scripts writes."""

    name = "kohya"

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor is a factor under a flat name, and none is of a family that LyCORIS adds or of Flux."""
        if any(of_lycoris(name) or FLUX_FLAT.match(name) for name in file.tensors):
            return False
        return any(is_flat(name) and split_factor(name)[1] in ("down", "up") for name in file.tensors)

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`. Alpha from our header entry or the tensors; where there is none, the rank."""
        refuse_unsupported(file.tensors)
        refuse_transformers(file)
        factors = [
            Factor(name, *split)
            for name in file.tensors
            if is_flat(name) and (split := split_factor(name))[1]
        ]
        pairs = {factor.layer for factor in factors if factor.part != "alpha"}
        factors = [factor for factor in factors if factor.layer in pairs]
        decoded = assemble(file, factors, FlatNames(layers), partial(settle, file, zero_means_rank=True))
        return with_tokens(file, decoded)

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if (beyond := beyond_lora(state)) is not None:
            return beyond
        sdxl, seen = is_sdxl(state), dict[str, LayerPath]()
        for path, layer in state.layers.items():
            spelled = None if path.startswith("transformer.") else spell(path, sdxl)
            if spelled is None:
                return f"it has no name for {path!r}"
            if spelled in seen:
                return f"it has one name for {seen[spelled]!r} and {path!r}"
            if SIDES & layer.tensors.keys():
                return f"it has no place for the change to the bias of {path!r}"
            if layer.alpha == 0:
                return f"alpha 0 means alpha = rank in it, and {path!r} has alpha 0"
            seen[spelled] = path
        return None

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`. `.alpha` is the one by which alpha / r is the layer's scale, in float32."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        sdxl = is_sdxl(state)
        tensors, layers = {}, {}
        for path, layer in state.layers.items():
            check_lora(path, layer)
            spelled = spell(path, sdxl)
            assert spelled is not None
            layers[spelled] = layer
            tensors[f"{spelled}.lora_down.weight"] = layer.tensors["down"]
            tensors[f"{spelled}.lora_up.weight"] = layer.tensors["up"]
            tensors[f"{spelled}.alpha"] = alpha_tensor(layer)
        header = to_header(state.metadata, layers)
        width = cross_attention_width(down_shapes(state))
        family = "sdxl" if sdxl else state.metadata.base_family or WIDTHS.get(width or 0, ("",))[0]
        said = tool_header(state.metadata, layers, family)
        file = TensorFile(tensors, {**header, **said})
        return replace(file, metadata={**file.metadata, **hashes(file)})


def refuse_transformers(file: TensorFile) -> None:
    """Refuse what is for a diffusion transformer, before its names are looked for in a UNet.

    Raises:
        WrongBase: a layer is that of one.
    """
    strange = [name for name in file.tensors if _TRANSFORMER.match(name)]
    if strange:
        raise WrongBase(
            f"{file.label} is for a diffusion transformer (Flux, SD 3 or later): {len(strange)} of "
            f"{len(file.tensors)} tensors are for its blocks, first {strange[0][:120]!r}. Under such names this "
            "version reads adapters for SD 1, SD 2 and SDXL, and plain LoRA for Flux.1."
        )


def tool_header(metadata: Metadata, layers: Mapping[str, LayerState], family: str) -> dict[str, str]:
    """The header entries that kohya's tools and A1111 show: `ss_*` and `modelspec.*`. What the adapter already
    said of its training stays; what speaks of the tensors is made anew.

    `layers`: the layers by their flat names.
    """
    extra = {key: text for key, text in metadata.extra.items() if key.startswith(("ss_", "modelspec."))}
    known = _SAID | (_SAID_OF_VELOCITY if metadata.prediction_type == "v_prediction" else {})
    version, architecture, resolution = known.get(family, ("", "", ""))
    flat = {
        name: layer
        for name, layer in layers.items()
        if "down" not in layer.tensors or math.prod(layer.tensors["down"].shape[2:]) == 1
    }
    convolutions = {name: layer for name, layer in layers.items() if name not in flat}
    args = {}
    if flat and convolutions:
        args = {
            "conv_dim": _common(convolutions.values())[0],
            "conv_alpha": _common(convolutions.values())[1],
        }
    rank, alpha = _common((flat or layers).values())
    made = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": compact(args),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _CODE.get(family, "diffusers"),
    }
    default = {
        "ss_base_model_version": version,
        "ss_v2": str(version in _V2) if family else "",
        "ss_sd_model_name": metadata.base_name,
        "modelspec.title": extra.get("ss_output_name", "LoRA"),
        "modelspec.resolution": resolution,
        "modelspec.prediction_type": _PREDICTION.get(metadata.prediction_type, ""),
        **_from_settings(metadata.settings),
    }
    said = {**default, **extra, **made}
    return {key: text for key, text in said.items() if text}


def hashes(file: TensorFile) -> dict[str, str]:
    """The two hashes by which A1111's network extension and kohya's tools know a file: sha256 of the tensors'
    bytes, and of 64 KiB in its second megabyte, both of the file with `ss_*` entries alone."""
    shown = {key: text for key, text in file.metadata.items() if key.startswith("ss_")}
    content = pieces(TensorFile(file.tensors, shown))
    digest, legacy, position = hashlib.sha256(), hashlib.sha256(), 0
    for number, piece in enumerate(content):
        if number > 1:  # after the header
            digest.update(piece)
        begin, end = (max(0, edge - position) for edge in _LEGACY_WINDOW)
        legacy.update(piece[begin:end])
        position += len(piece)
    whole = digest.hexdigest()
    return {
        "sshs_model_hash": whole,
        "sshs_legacy_hash": legacy.hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{whole}",
    }


def _common(layers: Collection[LayerState]) -> tuple[str, str]:
    """The rank and the alpha of these layers as texts; "Dynamic" where they differ, as kohya's resize says."""

    def said(values: Sequence[float]) -> str:
        return f"{values[0]:g}" if len(Counter(values)) == 1 else "Dynamic"

    ranks = [float(layer.rank) for layer in layers]
    alphas = [layer.scale * layer.rank for layer in layers]
    return said(ranks), said([float(f"{alpha:.6g}") for alpha in alphas])


def _from_settings(settings: str) -> dict[str, str]:
    """What our own run configuration says in kohya's words."""
    try:
        table = json.loads(settings) if settings else {}
    except (ValueError, RecursionError):  # a text that is no configuration is nobody's error here
        return {}
    words = {
        "ss_steps": ("train", "steps"),
        "ss_max_train_steps": ("train", "steps"),
        "ss_seed": ("train", "seed"),
        "ss_learning_rate": ("train", "optimizer", "learning_rate"),
        "ss_optimizer": ("train", "optimizer", "name"),
        "ss_lr_scheduler": ("train", "schedule", "name"),
        "ss_gradient_accumulation_steps": ("train", "accumulate"),
        "ss_max_grad_norm": ("train", "max_grad_norm"),
        "ss_mixed_precision": ("train", "precision"),
        "ss_noise_offset": ("train", "objective", "noise_offset"),
        "ss_min_snr_gamma": ("train", "objective", "snr_gamma"),
    }
    found = {}
    for word, keys in words.items():
        value = table
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str | int | float) and not (
            isinstance(value, float) and not math.isfinite(value)
        ):
            found[word] = str(value)
    return found

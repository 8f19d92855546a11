"""The format of peft: a folder with `adapter_config.json` and `adapter_model.safetensors`, one a component.

    fox/adapter_config.json, fox/adapter_model.safetensors                   one component
    fox/unet/adapter_config.json, ..., fox/text_encoder/...                  several
    base_model.model.down_blocks.2.attentions.1...to_q.lora_A.weight         (r, in[, k, k])

Rank and alpha are in the configuration alone. Layers keep the names of the model at hand, as peft matches them
exactly; read is CLIP's `text_model.` with and without.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import FormatError
from scumble.formats.codec import cannot_represent
from scumble.formats.container import PEFT_CONFIG, PEFT_NAME, TensorFile, join, split
from scumble.formats.keymap import LayerNames, split_root
from scumble.formats.lora_config import (
    LoraConfig,
    lora_configs,
    pair_obstacle,
    pair_tensors,
    refuse_lost_magnitudes,
)
from scumble.formats.metadata import LayerFacts, compact, parse_table, to_header
from scumble.formats.pairs import (
    Decoded,
    Factor,
    assemble,
    refuse_unsupported,
    split_factor,
)
from scumble.formats.scales import settle

_PREFIX = "base_model.model."
_CLASSES = {
    "unet": ("UNet2DConditionModel", "diffusers.models.unets.unet_2d_condition"),
    "text_encoder": ("CLIPTextModel", "transformers.models.clip.modeling_clip"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "transformers.models.clip.modeling_clip"),
}
"""Component -> the class that peft says it was made for, and the module of that class. Never imported."""
_OF_CLASS = {name: root for root, (name, _) in _CLASSES.items()}
_MUTATING = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to begin that take something out of the base's own weights; without that the file means nothing."""
_REFUSED = (
    "fan_in_fan_out",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "monteclora_config",
)


class Peft:
    """What `PeftModel.save_pretrained` writes."""

    name = "peft"
    file_name = PEFT_NAME

    def matches(self, file: TensorFile) -> bool:
        """Whether peft's configuration is beside it, or any tensor is called as peft calls it."""
        return any(
            PEFT_CONFIG in part.beside or any(name.startswith(_PREFIX) for name in part.tensors)
            for part in split(file).values()
        )

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`."""
        found = {part: _decode(one, part, layers) for part, one in split(file).items()}
        if not file.parts:
            return found[""]

        def names(part: str, tensors: Collection[str]) -> list[str]:
            return [f"{part}/{name}" for name in tensors]

        states = [decoded.state for decoded in found.values()]
        together = {path: layer for state in states for path, layer in state.layers.items()}
        return Decoded(
            AdapterState(together, metadata=states[0].metadata),
            tuple(name for part, decoded in found.items() for name in names(part, decoded.used)),
            {
                f"{part}/{name}": why
                for part, decoded in found.items()
                for name, why in decoded.unused.items()
            },
            tuple(name for part, decoded in found.items() for name in names(part, decoded.ignored)),
            tuple(dict.fromkeys(note for decoded in found.values() for note in decoded.notes)),
            tuple(layer for decoded in found.values() for layer in decoded.layers),
        )

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if state.tokens:
            return "it has no place for learned tokens"
        if (why := pair_obstacle(state)) is not None:
            return why
        strange = next((path for path in state.layers if split_root(path)[0] not in _CLASSES), None)
        return None if strange is None else f"it has no folder for {strange!r}"

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`. One component is a folder, several are a folder each."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        dora = [path for path, layer in state.layers.items() if layer.family == "dora"]
        configs = lora_configs({path: LayerFacts.of(layer) for path, layer in state.layers.items()}, dora)
        parts = {root: _encode(state, root, fields) for root, fields in configs.items()}
        return join(parts) if len(parts) > 1 else next(iter(parts.values()))


def _encode(state: AdapterState, root: str, fields: Mapping[str, Any]) -> TensorFile:
    tensors: dict[str, Tensor] = {}
    layers: dict[str, LayerState] = {}
    for path, layer in state.layers.items():
        component, rest = split_root(path)
        if component != root:
            continue
        layers[path] = layer
        tensors |= {f"{_PREFIX}{rest}.{part}": tensor for part, tensor in pair_tensors(path, layer).items()}
    name, module = _CLASSES[root]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": name, "parent_library": module},
        "base_model_name_or_path": state.metadata.base_name or None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "modules_to_save": None,
        **fields,
    }
    return TensorFile(
        tensors, to_header(state.metadata, layers), beside={PEFT_CONFIG: compact(config) + "\n"}
    )


def _decode(file: TensorFile, part: str, layers: Collection[LayerPath] | None) -> Decoded:
    config = parse_table(file.beside[PEFT_CONFIG], PEFT_CONFIG) if PEFT_CONFIG in file.beside else None
    if config is not None:
        _refuse(config)
    refuse_unsupported(file.tensors)
    root = part or _component(file, config or {})
    factors = []
    for name in file.tensors:
        spelled, kind = split_factor(name)
        if kind and kind != "alpha":
            factors.append(Factor(name, f"{root}.{spelled.removeprefix(_PREFIX)}", kind))
    reader = LoraConfig(config, PEFT_CONFIG) if config is not None else None

    def scales(ranks: Mapping[str, int]) -> tuple[Mapping[str, LayerFacts], tuple[str, ...]]:
        headers = {}
        if reader is not None:
            headers[PEFT_CONFIG] = {name: reader.facts(name.partition(".")[2]) for name in ranks}
        facts, notes = settle(file, ranks, headers=headers)
        missing = f"{PEFT_CONFIG} is not beside the file"
        return facts, (f"{missing}; {notes[0]}",) if reader is None and notes else notes

    decoded = assemble(file, factors, LayerNames(layers), scales)
    if config is not None and config.get("use_dora"):
        refuse_lost_magnitudes(decoded.state, [root], PEFT_CONFIG)
    return decoded


def _refuse(config: Mapping[str, Any]) -> None:
    """Refuse by name what the configuration says and no tensor shows."""
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if kind != "LORA":
        raise FormatError(f"unsupported: a peft adapter of the type {kind[:40]}. Nothing of it was used.")
    for field in _REFUSED:
        if config.get(field):
            raise FormatError(f"unsupported: {field} in {PEFT_CONFIG}. Nothing of the adapter was used.")
    begin = config.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(_MUTATING):
        raise FormatError(
            f"unsupported: init_lora_weights {begin[:40]!r} in {PEFT_CONFIG} changes the base's own weights. "
            "Save it as a plain LoRA: peft's save_pretrained with path_initial_model_for_weight_conversion."
        )


def _component(file: TensorFile, config: Mapping[str, Any]) -> str:
    """What the adapter of a folder is for: by the folder's name, the configuration, or the layers' names."""
    if file.path is not None and file.path.parent.name in _CLASSES:
        return file.path.parent.name
    mapping = config.get("auto_mapping")
    said = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    if said in _OF_CLASS:
        return _OF_CLASS[said]
    clip = any(".self_attn." in name or ".mlp.fc" in name for name in file.tensors)
    return "text_encoder" if clip else "unet"

"""The format of peft: a folder with `adapter_config.json` and `adapter_model.safetensors`, one a component.

    fox/adapter_config.json, fox/adapter_model.safetensors                   one component
    fox/unet/adapter_config.json, ..., fox/text_encoder/...                  several
    base_model.model.down_blocks.2.attentions.1...to_q.lora_A.weight         (r, in[, k, k])

Other types of adapters (LoHa, LoKr, IA3, OFT) are `peft_types.py`'s. Rank and alpha are in the configuration alone.
Layers keep the names of the model at hand, as peft matches them exactly; read is CLIP's `text_model.` with and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scumble.adapters.names import SIDES, UP_BIAS
from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import FormatError
from scumble.formats.codec import cannot_represent
from scumble.formats.container import PEFT_CONFIG, PEFT_NAME, TensorFile, join, split
from scumble.formats.keymap import PEFT_MODEL, LayerNames, split_root
from scumble.formats.lora_config import (
    LoraConfig,
    lora_configs,
    pair_obstacle,
    pair_tensors,
    refuse_lost_magnitudes,
    target_modules,
)
from scumble.formats.metadata import LayerFacts, compact, parse_table, to_header
from scumble.formats.pairs import (
    Decoded,
    Factor,
    assemble,
    refuse_unsupported,
    split_factor,
)
from scumble.formats.peft_types import TYPES, PeftType, projected, type_for
from scumble.formats.scales import settle

if TYPE_CHECKING:
    from torch import Tensor

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
    diffusers_reads = False
    """`load_lora_weights` of diffusers loads such a folder without a word, and without effect."""

    def matches(self, file: TensorFile) -> bool:
        """Whether peft's configuration is beside it, or any tensor is called as peft calls it."""
        return any(
            PEFT_CONFIG in part.beside or any(name.startswith(PEFT_MODEL) for name in part.tensors)
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
        strange = next((path for path in state.layers if split_root(path)[0] not in _CLASSES), None)
        if strange is not None:
            return f"it has no folder for {strange!r}"
        for root, layers in _components(state).items():
            families = sorted({layer.family for layer in layers.values()})
            kind = type_for(families)
            biased = next((name for name, layer in layers.items() if SIDES & layer.tensors.keys()), None)
            if kind is not None and biased is not None:
                return f"its {families[0]} has no place for the change to the bias of {root}.{biased}"
            # a mixture is LoRA's to refuse
            of_lora = {f"{root}.{name}": layer for name, layer in layers.items()}
            why = pair_obstacle(AdapterState(of_lora)) if kind is None else kind.obstacle(layers)
            if why is not None:
                return why
        return None

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`. One component is a folder, several are a folder each."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        parts = {root: _encode(state, root, layers) for root, layers in _components(state).items()}
        return join(parts) if len(parts) > 1 else next(iter(parts.values()))


def _components(state: AdapterState) -> dict[str, dict[str, LayerState]]:
    """Component -> its layers, without its name."""
    found: dict[str, dict[str, LayerState]] = {}
    for path in sorted(state.layers, key=lambda path: split_root(path)[0]):
        root, rest = split_root(path)
        found.setdefault(root, {})[rest] = state.layers[path]
    return found


def _encode(state: AdapterState, root: str, mine: Mapping[str, LayerState]) -> TensorFile:
    kind = type_for({layer.family for layer in mine.values()})
    tensors: dict[str, Tensor] = {}
    layers = {f"{root}.{rest}": layer for rest, layer in mine.items()}
    for rest, layer in mine.items():
        parts = pair_tensors(f"{root}.{rest}", layer) if kind is None else kind.tensors(layer)
        tensors |= {f"{PEFT_MODEL}{rest}.{part}": tensor for part, tensor in parts.items()}
    name, module = _CLASSES[root]
    config = {
        "peft_type": "LORA" if kind is None else kind.name,
        "task_type": None,
        "auto_mapping": {"base_model_class": name, "parent_library": module},
        "base_model_name_or_path": state.metadata.base_name or None,
        "inference_mode": True,
        "modules_to_save": None,
        **(_lora_fields(layers)[root] if kind is None else _other_fields(kind, mine)),
    }
    return TensorFile(
        tensors, to_header(state.metadata, layers), beside={PEFT_CONFIG: compact(config) + "\n"}
    )


def _lora_fields(layers: Mapping[LayerPath, LayerState]) -> dict[str, dict[str, Any]]:
    usual = {"bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0, "init_lora_weights": True}
    table = lora_configs(
        {path: LayerFacts.of(layer) for path, layer in layers.items()},
        [path for path, layer in layers.items() if layer.family == "dora"],
        [path for path, layer in layers.items() if UP_BIAS in layer.tensors],
    )
    return {root: {**usual, **fields} for root, fields in table.items()}


def _other_fields(kind: PeftType, layers: Mapping[str, LayerState]) -> dict[str, Any]:
    return {"target_modules": target_modules(layers), **kind.fields(layers)}


def _decode(file: TensorFile, part: str, layers: Collection[LayerPath] | None) -> Decoded:
    config = parse_table(file.beside[PEFT_CONFIG], PEFT_CONFIG) if PEFT_CONFIG in file.beside else None
    kind = None if config is None else _type_of(config)
    if config is not None:
        _refuse(config, file)
    if kind is None:
        refuse_unsupported(file.tensors)
    elif config is not None and config.get("coft"):
        file = replace(file, tensors=projected(config, file.tensors))
    root = part or _component(file, config or {})
    factors = []
    told = set()
    for name, tensor in file.tensors.items():
        spelled, word = split_factor(name)
        rest = spelled.removeprefix(PEFT_MODEL)
        if word and word != "alpha":
            word = word if kind is None else kind.part(config or {}, rest, word, tensor)
            factors.append(Factor(name, f"{root}.{rest}", word))
            told |= {f"{root}.{rest}"} if word.endswith("_b") else set()

    def scales(ranks: Mapping[str, int]) -> tuple[Mapping[str, LayerFacts], tuple[str, ...]]:
        headers = {}
        if config is not None:
            reader = _lora_facts(config) if kind is None else kind.facts(config, PEFT_CONFIG)
            headers[PEFT_CONFIG] = {
                name: reader(name.partition(".")[2], rank) for name, rank in ranks.items()
            }
            if kind is not None:  # matrices that tell no rank have the configuration's
                said = headers[PEFT_CONFIG]
                ranks = {name: rank if name in told else said[name].rank for name, rank in ranks.items()}
        facts, notes = settle(file, ranks, headers=headers)
        missing = f"{PEFT_CONFIG} is not beside the file"
        return facts, (f"{missing}; {notes[0]}",) if config is None and notes else notes

    decoded = assemble(file, factors, LayerNames(layers), scales, ranked=kind is not None)
    _refuse_overlapping_turns(decoded.state, layers)
    if config is not None and config.get("use_dora"):
        refuse_lost_magnitudes(decoded.state, [root], PEFT_CONFIG)
    return decoded


def _lora_facts(config: Mapping[str, Any]) -> Callable[[str, int], LayerFacts]:
    reader = LoraConfig(config, PEFT_CONFIG)
    return lambda layer, rank: reader.facts(layer)


def _type_of(config: Mapping[str, Any]) -> PeftType | None:
    """The type that a configuration says; None for LoRA.

    Raises:
        FormatError: it is of a type that is not read.
    """
    word = str(config.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if word == "LORA":
        return None
    if word not in TYPES:
        raise FormatError(
            f"unsupported: a peft adapter of the type {word[:40]}; read are LORA, {', '.join(TYPES)}. Nothing of it "
            "was used."
        )
    return TYPES[word]


def _refuse_overlapping_turns(state: AdapterState, layers: Collection[LayerPath] | None) -> None:
    """Refuse OFT on convolutions above 1x1.

    Raises:
        FormatError: names a layer.
    """
    shapes: Mapping[LayerPath, Sequence[int]] = layers if isinstance(layers, Mapping) else {}
    for path, layer in state.layers.items():
        kernel = math.prod(shapes.get(path, ())[2:])
        if {"triangles", "series"} & layer.tensors.keys() and kernel > 1:
            raise FormatError(
                f"unsupported: peft's OFT on the convolution {path!r}. It turns overlapping patches of the input and "
                "adds them up, which no change of a weight does; its own merge gives other pictures. Nothing of it "
                "was used."
            )


def _refuse(config: Mapping[str, Any], file: TensorFile) -> None:
    """Refuse by name what the configuration says and no tensor shows."""
    said = config.get("bias") or "none"
    if said != "none" and any(name.endswith(".bias") and ".lora_B." not in name for name in file.tensors):
        raise FormatError(
            f"unsupported: bias {str(said)[:40]!r} in {PEFT_CONFIG}. The file holds whole biases of the base that it "
            "was trained on, not changes to them. Nothing of the adapter was used."
        )
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

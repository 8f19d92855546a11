"""Ghost: a base without weights, of which everything can be asked but numbers: what is planned with it can be played in
a `ledger.Theatre` before one weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from scumble.errors import ModelError
from scumble.models.codes import code_named
from scumble.models.configs import weight_files, weighty
from scumble.models.dtypes import Dtypes
from scumble.models.family import BaseModel
from scumble.models.loading import Look
from scumble.models.needs import on_meta, skeleton
from scumble.models.quantized import hold, layers_held


@dataclass(frozen=True)
class Ghost:
    """A base without weights, and what its components take."""

    base: BaseModel
    """On the meta device."""
    modules: Mapping[str, nn.Module]
    """Its components with weights, those too that it loads later."""
    sizes: Mapping[str, int]
    """Component -> bytes of its weights."""
    late: tuple[str, ...]
    """Those that are there only while prompts are read."""
    stored: Mapping[str, int]
    """Component -> bytes of its files, where they can be told."""

    @property
    def resident(self) -> int:
        """Bytes of what is there while the denoiser trains on cached texts."""
        return sum(size for name, size in self.sizes.items() if name not in self.late)


def ghost(look: Look, dtypes: Dtypes, variant: str | None = None) -> Ghost:
    """The ghost of a base that was looked at, as it would be with these dtypes and this quantisation.

    Raises:
        ModelError: it can't be loaded, or holds no vocabulary, or is of a class that isn't installed.
    """
    configs, facts = look.configs, look.facts
    if facts.problems:
        raise ModelError("\n".join(facts.problems))
    if not look.tokenizers:
        raise ModelError(
            f"{configs.name} holds no vocabulary, so nothing can be played with it. Name a base that has one as its "
            "rest."
        )
    modules = {name: skeleton(name, configs.parts[name], configs.name) for name in weighty(configs)}
    base = on_meta(configs, facts, modules, look.tokenizers, dtypes)
    code = code_named(dtypes.quantization)
    if code is not None:
        for path in layers_held(base.denoiser):
            layer: Any = base.denoiser.get_submodule(path)
            hold(base.denoiser, path, code, layer.weight, base.dtype)
    base.denoiser.requires_grad_(False)
    return Ghost(
        base,
        modules,
        {name: size_of(module) for name, module in modules.items()},
        facts.deferred,
        {name: _stored(look, name, variant) for name in modules},
    )


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = {tensor: None for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def _stored(look: Look, part: str, variant: str | None) -> int:
    folder = look.configs.elsewhere.get(part, look.folder)
    files = weight_files(folder / part, variant)[0] if folder is not None and (folder / part).is_dir() else []
    return sum(file.stat().st_size for file in files)

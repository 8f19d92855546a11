"""Layers: which layers a model has that an adapter can change, under which path, and where they hang.

All of it is seen through `Adapted` wrappers, `torch.compile` and DistributedDataParallel: a path is the same
whether or not the model is wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scumble.adapters.adapted import Adapted
from scumble.adapters.operate import Layer, is_layer, is_norm
from scumble.adapters.state import LayerPath
from scumble.adapters.tokens import TokenTable

_UNREAD = "_scumble_unread"
"""The attribute of layers that `mark_unread` was told of."""

_COMPILED = "_orig_mod"
"""The attribute in which `torch.compile` keeps the module that it wraps."""


class Place(NamedTuple):
    """A layer, and every attribute of the model that holds it.

    There is more than one when a library keeps the layer under two names; a wrapper must then go to all of
    them, or part of the model would go on without it.
    """

    layer: Layer
    slots: tuple[tuple[nn.Module, str], ...]
    """(parent module, attribute name)"""

    @property
    def holder(self) -> nn.Module:
        """What hangs there now: the layer itself, or the Adapted around it."""
        parent, name = self.slots[0]
        return parent._modules[name]  # type: ignore[return-value]

    def hang(self, module: nn.Module) -> None:
        """Put `module` in every slot."""
        for parent, name in self.slots:
            parent._modules[name] = module


def places(roots: Mapping[str, nn.Module], *, norms: bool = False) -> dict[LayerPath, Place]:
    """Every layer below the roots, in the model's own order: path -> Place; `norms` as for `layers_of`."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    paths: dict[int, tuple[LayerPath, Layer]] = {}
    found: list[tuple[LayerPath, nn.Module, str, Layer]] = []
    for root, module in roots.items():
        _walk(module, root, set(), found, norms)
    for path, parent, name, layer in found:
        slots.setdefault(id(layer), []).append((parent, name))
        paths.setdefault(id(layer), (path, layer))
    return {path: Place(layer, tuple(slots[key])) for key, (path, layer) in paths.items()}


def layers_of(roots: Mapping[str, nn.Module], *, norms: bool = False) -> dict[LayerPath, Layer]:
    """Every linear and convolution layer of the model, without wrappers, in the model's own order.

    Args:
        roots: name -> module, e.g. `{"unet": unet, "text_encoder": text_encoder}`.
        norms: normalisations as well, under the name of layers: files may hold changes of them.

    Returns:
        Path -> layer, e.g. "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q". A layer that
        hangs under two names is listed once, under the first.
    """
    return {path: place.layer for path, place in places(roots, norms=norms).items()}


def mark_unread(module: nn.Module) -> None:
    """Say that nothing reads what `module` puts out: no gradient will reach its layers, so that targets don't mean
    them. Files may hold changes of them nevertheless."""
    for layer in module.modules():
        if is_layer(layer):
            layer.__dict__[_UNREAD] = True


def is_unread(layer: nn.Module) -> bool:
    """Whether `mark_unread` was told of this layer."""
    return _UNREAD in layer.__dict__


def base_state(root: nn.Module) -> dict[str, Tensor]:
    """The root's `state_dict()` without adapters: the same names and tensors, no deltas, no learned rows, no
    wrappers."""
    state = dict(root.state_dict())
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, Adapted):
            for key in [key for key in state if key.startswith(f"{name}.deltas.")]:
                del state[key]
        if isinstance(module, TokenTable):
            for key in [key for key in state if key.startswith(f"{name}.rows.")]:
                del state[key]
        if isinstance(module, Adapted | TokenTable):
            for key in [key for key in state if key.startswith(f"{name}.base.")]:
                state[name + key.removeprefix(f"{name}.base")] = state.pop(key)
    return {
        ".".join(part for part in key.split(".") if part != _COMPILED): value for key, value in state.items()
    }


def _walk(
    module: nn.Module,
    path: LayerPath,
    seen: set[int],
    found: list[tuple[LayerPath, nn.Module, str, Layer]],
    norms: bool,
) -> None:
    """Fill `found` with (path, parent, attribute, layer). Every load walks the whole model: no generators."""
    if id(module) in seen:
        return
    seen.add(id(module))
    distributed = isinstance(module, DistributedDataParallel)
    for name, child in module._modules.items():
        if child is None:
            continue
        layer = child._modules["base"] if isinstance(child, Adapted) else child
        below = path if distributed or name == _COMPILED else f"{path}.{name}"
        if is_layer(layer) or (norms and is_norm(layer)):
            found.append((below, module, name, cast(Layer, layer)))
        else:
            _walk(child, below, seen, found, norms)

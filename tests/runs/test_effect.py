"""Effect: nothing is 0, something is not, and the base is left as it was."""

from __future__ import annotations

import torch

from scumble.adapters import Adapter, LoraSettings, layers_of
from scumble.models import FAMILIES
from scumble.runs.effect import measure_effect


def test_the_effect_grows_with_the_change_and_leaves_no_trace() -> None:
    base = FAMILIES.get("sd1").tiny()
    weights = {path: layer.weight.clone() for path, layer in layers_of(base.roots).items()}
    modules = [type(module) for root in base.roots.values() for module in root.modules()]
    effects = []
    for targets in ("attention", ["attention", "text_encoder.attention"]):
        for size in (0.0, 0.02, 0.1):
            adapter = Adapter.inject(base.roots, targets, LoraSettings(rank=2))
            rng = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in adapter.named_parameters():
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=rng) * (size if "up" in name else 0.3)
                    )
            state = adapter.state()
            adapter.eject()
            effects.append(measure_effect(base, state))
    unet, both = effects[:3], effects[3:]
    assert unet[0].denoiser == both[0].denoiser == 0.0 and both[0].text == 0.0
    assert 0 < unet[1].denoiser < unet[2].denoiser and unet[2].text == 0.0
    assert 0 < both[1].text < both[2].text and measure_effect(base, state) == both[2]
    assert [type(module) for root in base.roots.values() for module in root.modules()] == modules
    assert all(torch.equal(layer.weight, weights[path]) for path, layer in layers_of(base.roots).items())

"""The tables of names against the libraries' own modules at full size, so that a release that renames a layer is
noticed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from scumble.formats.flat_names import expand
from scumble.formats.tables.bases import TITLES, WIDTHS, told_by
from scumble.formats.tables.modules import ANY_TRANSFORMER, CLIP_NORMS, UNET_NORMS
from tests.formats.test_flat_names import SD2, SDXL, names_in

SD3: Mapping[str, Mapping[str, Any]] = {
    "3 medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "3.5 medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    "3.5 large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def sd3(release: str) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return built(lambda: SD3Transformer2DModel(**SD3[release]))


def flux(guided: bool) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return built(lambda: FluxTransformer2DModel(guidance_embeds=guided))


def unet(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return built(lambda: UNet2DConditionModel(**config))


def strip(name: str) -> str:
    """A layer's name without the numbers of its blocks."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def norms_in(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)}


def test_every_layer_of_every_transformer_is_in_the_table_and_no_other_kind_is() -> None:
    known = set(expand(ANY_TRANSFORMER))
    layers = [names_in(sd3(release)) for release in SD3] + [
        names_in(flux(guided)) for guided in (True, False)
    ]
    # flat names that the table doesn't know would be read as those of another layer, or of none
    assert all(found <= known for found in layers)
    # the table has kin of other depths too: of every kind of layer that it names, some transformer has one
    assert {strip(name) for name in known} == {strip(name) for found in layers for name in found}


@pytest.mark.parametrize("release", SD3)
def test_sd3_is_told_by_its_layers(release: str) -> None:
    layers = [f"transformer.{name}" for name in names_in(sd3(release))]
    assert told_by(layers) == "sd3" and TITLES["sd3"] == "SD 3"


@pytest.mark.parametrize("guided", [True, False])
def test_flux_is_told_by_its_layers(guided: bool) -> None:
    assert told_by([f"transformer.{name}" for name in names_in(flux(guided))]) == "flux"


@pytest.mark.parametrize(
    ("config", "family"), [({"cross_attention_dim": 768}, "sd1"), (SD2, "sd2"), (SDXL, "sdxl")]
)
def test_unets_are_told_by_their_width_and_their_norms_are_in_the_table(
    config: dict[str, Any], family: str
) -> None:
    model = unet(config)
    names = names_in(model)
    assert told_by([f"unet.{name}" for name in names]) == ""
    reads = next(name for name in sorted(names) if name.endswith("attn2.to_k"))
    assert WIDTHS[model.get_submodule(reads).in_features][0] == family  # type: ignore[index]
    assert norms_in(model) <= set(expand(UNET_NORMS))


def test_norms_of_unets_are_those_that_some_unet_has() -> None:
    known = {strip(name) for name in expand(UNET_NORMS)}
    assert known == {strip(name) for config in ({}, SD2, SDXL) for name in norms_in(unet(config))}


def test_text_encoders_norms_are_those_of_transformers() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = built(lambda: CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32, hidden_size=64)))
    assert set(expand(CLIP_NORMS)) == norms_in(model)

"""Layers keep their paths, whatever is wrapped around them."""

import torch
from torch import nn

from scumble.adapters import Adapter, base_state, layers_of
from scumble.adapters.layers import places


def test_paths_are_the_models_own(roots: dict[str, nn.Module]) -> None:
    layers = layers_of(roots)
    assert next(iter(layers)) == "unet.conv_in"
    assert layers["unet.blocks.1.attn2.to_out.0"] is roots["unet"].blocks[1].attn2.to_out[0]
    assert layers["text_encoder.layers.0.mlp.fc1"] is roots["text_encoder"].layers[0].mlp.fc1
    assert len(layers) == 3 + 2 * (8 + 2) + 6


def test_adapters_are_looked_through(roots: dict[str, nn.Module]) -> None:
    before = layers_of(roots)
    with Adapter.inject(roots, ["attention+mlp", "conv"]), Adapter.inject(roots, "attention", name="second"):
        during = layers_of(roots)
    assert list(before) == list(during)
    assert all(before[path] is during[path] for path in before)


def test_compiled_models_have_the_same_paths(roots: dict[str, nn.Module]) -> None:
    compiled = {"unet": torch.compile(roots["unet"], backend="eager"), "text_encoder": roots["text_encoder"]}
    assert list(layers_of(compiled)) == list(layers_of(roots))
    with Adapter.inject(compiled, "attention") as adapter:
        assert all(path.startswith("unet.blocks.") for path in adapter.state().layers)


def test_a_layer_under_two_names_is_one_layer(roots: dict[str, nn.Module]) -> None:
    found = places(roots)
    assert "unet.down.op" in found and "unet.down.alias" not in found
    assert [name for _, name in found["unet.down.op"].slots] == ["op", "alias"]
    with Adapter.inject(roots, "unet.down.op"):
        assert roots["unet"].down.op is roots["unet"].down.alias
        assert roots["unet"].down.op is not found["unet.down.op"].layer
    assert roots["unet"].down.op is roots["unet"].down.alias is found["unet.down.op"].layer


def test_base_state_is_that_of_the_untouched_model(roots: dict[str, nn.Module]) -> None:
    before = roots["unet"].state_dict()
    with Adapter.inject(roots, ["all-linear", "conv"], name="detail_v1.1"):
        assert roots["unet"].state_dict().keys() != before.keys()
        during = base_state(roots["unet"])
        compiled = base_state(torch.compile(roots["unet"], backend="eager"))
    assert during.keys() == before.keys() == compiled.keys()
    assert all(torch.equal(during[name], before[name]) for name in before)

"""Targets: what patterns and presets mean, and what is said when they mean nothing."""

import pytest
from torch import nn

from scumble.adapters import PRESETS, resolve
from scumble.adapters.targets import matches, named, per_layer
from scumble.errors import AdapterError, NoLayerMatches

PATH = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "pattern",
    [
        "*.attn1.to_q",
        "*.attn?.to_q",
        "*.attn[12].to_[qkv]",
        "*.to_*",
        "unet.*",
        "*",
        "unet.down_blocks.*.to_q",
        "unet.*.transformer_blocks.*.to_q",
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        "u*.down_blocks.?.*.attn1.to_q",
        "*.attn[0-9].to_q",
    ],
)
def test_fits(pattern: str) -> None:
    assert matches(pattern, PATH)


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",  # patterns are for the whole path
        "*.attn.to_q",  # and for whole parts
        "attn1.to_q",
        "*.o_q",
        "unet",
        "unet.down_blocks.0",
        "*.attn1.to_q.*",
        "*.attn1.?",
        "*.attn1.to.q",
        "*.attn1.to?q?",
        "unetXdown_blocks.*",
        "*.attn[23].to_q",
    ],
)
def test_does_not_fit(pattern: str) -> None:
    assert not matches(pattern, PATH)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 16),
        ("mlp", 4),
        ("attention+mlp", 20),
        ("all-linear", 20),
        ("conv", 3),
        ("attention+conv", 19),
        ("unet.attention", 16),
        ("text_encoder.attention", 4),
        ("text_encoder.attention+mlp", 6),
        (["attention", "text_encoder.attention"], 20),
        (["attention", "*.attn1.to_q"], 16),
        ("*.attn?.to_q", 4),
        ("*.attn2.to_out.0", 2),
        ("unet.conv_*", 2),
        ("text_encoder.*.?_proj", 3),
        ("*", 23),
        ("text_encoder*.*", 6),
    ],
)
def test_counts(roots: dict[str, nn.Module], targets: str | list[str], count: int) -> None:
    assert len(resolve(roots, targets).layers) == count


def test_text_encoders_are_changed_when_asked_for(roots: dict[str, nn.Module]) -> None:
    assert all(path.startswith("unet.") for path in resolve(roots, ["all-linear", "*"]).layers)
    both = resolve(roots, "attention", within=("unet", "text_encoder"))
    assert len(both.layers) == 20 and both.counts == {"attention": 20}
    assert all(
        path.startswith("text_encoder.") for path in resolve(roots, "*", within=["text_encoder"]).layers
    )


def test_what_matched_is_told(roots: dict[str, nn.Module]) -> None:
    matched = resolve(roots, ["*.attn1.to_q", "attention+conv", "conv"])
    assert matched.counts == {"*.attn1.to_q": 2, "attention+conv": 19, "conv": 3}
    assert next(iter(matched.layers)) == "unet.conv_in"  # the model's order, not that of the targets


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "attn.to_q",
            r"""No layer of unet matches 'attn.to_q'. Patterns match whole parts of a path; """
            r""""\*.attn\?.to_q" matches 4 layers""",
        ),
        ("to_q", r'"\*.to_q" matches 4 layers'),
        ("unet.to_q", r'"unet.\*.to_q" matches 4 layers'),
        ("*.q_proj", r'"text_encoder.\*.q_proj" matches 1 layer\.'),
        ("text_encoder.*.to_q", r"No layer of text_encoder matches"),
        ("atention", r"no preset. Did you mean 'attention'\?"),
        (
            "text_encoder.conv",
            r"preset 'conv'. Presets that match there: attention, mlp, attention\+mlp, all-linear",
        ),
        ("unit.conv", r"has no part 'unit'; it has unet, text_encoder"),
        ("xyzzy", r"a layer is called e.g. 'unet.conv_in'"),
    ],
)
def test_what_is_said_when_nothing_matches(roots: dict[str, nn.Module], target: str, said: str) -> None:
    with pytest.raises(NoLayerMatches, match=said):
        resolve(roots, ["attention", target])


def test_what_a_suggestion_promises_is_true(roots: dict[str, nn.Module]) -> None:
    with pytest.raises(NoLayerMatches) as caught:
        resolve(roots, "*.attn.too_q")
    suggestion = str(caught.value).split('"')[1]
    count = int(str(caught.value).split("matches ")[-1].split()[0])
    assert len(resolve(roots, suggestion).layers) == count > 0


def test_nothing_asked_for(roots: dict[str, nn.Module]) -> None:
    for targets, within in (((), None), ("attention", ())):
        with pytest.raises(AdapterError, match="No targets"):
            resolve(roots, targets, within=within)
    with pytest.raises(AdapterError, match="no part 'text_encoder_2'"):
        resolve(roots, "attention", within=["text_encoder_2"])
    with pytest.raises(NoLayerMatches, match="no linear or convolution layer"):
        resolve({"unet": nn.Sequential(nn.ReLU())}, "*.to_q")


def test_every_preset_means_something_in_a_denoiser(roots: dict[str, nn.Module]) -> None:
    for preset in PRESETS:
        assert resolve(roots, preset).layers


def test_one_value_per_layer_the_first_pattern_wins() -> None:
    paths = ["unet.a.to_q", "unet.a.to_k", "unet.b.to_q"]
    ranks = per_layer({"unet.a.to_q": 8, "*.to_q": 16}, 4, paths, "rank_pattern")
    assert ranks == {"unet.a.to_q": 8, "unet.a.to_k": 4, "unet.b.to_q": 16}


def test_a_pattern_that_fits_none_of_the_adapters_layers() -> None:
    with pytest.raises(NoLayerMatches, match=r"rank_pattern .*'to_v'. It must be written for the whole path"):
        per_layer({"to_v": 8}, 4, ["unet.a.xyz"], "rank_pattern")
    with pytest.raises(NoLayerMatches, match=r"alpha_pattern .*'to_q'. \"\*.to_q\" matches 2 layers"):
        per_layer({"to_q": 8.0}, 4.0, ["unet.a.to_q", "unet.b.to_q"], "alpha_pattern")


@pytest.mark.parametrize(
    ("targets", "roots"),
    [
        ("attention", []),
        ("*.to_q", []),
        ("text_encoder.attention", ["text_encoder"]),
        (("attention", "text_encoder_2.*.q"), ["text_encoder_2"]),
        ("text_*.attention", ["text_encoder", "text_encoder_2"]),
    ],
)
def test_the_roots_that_targets_name(targets: str | tuple[str, ...], roots: list[str]) -> None:
    assert named(targets, ("text_encoder", "text_encoder_2")) == roots

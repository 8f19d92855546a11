"""The diffusers dialect against diffusers' and peft's own code, in both directions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from scumble.adapters.state import AdapterState
from scumble.errors import FormatError, UnusedTensors
from scumble.formats import TensorFile, read, write
from scumble.formats.container import load, save
from scumble.formats.diffusers import ENTRY, Diffusers
from scumble.formats.lora_config import Patterns
from tests.formats.adapters_of import ATTENTION, BLOCK, CLIP, SHAPES, adapter, layer

Q = f"{BLOCK}.attn1.to_q"


def pair(name: str, path: str = Q, rank: int = 4) -> dict[str, torch.Tensor]:
    """The two tensors of a layer that the file calls `name`."""
    tensors = layer(path, rank).tensors
    return {f"{name}.lora_A.weight": tensors["down"], f"{name}.lora_B.weight": tensors["up"]}


def decode(
    tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None, layers: Any = tuple(SHAPES)
) -> Any:
    header = {} if config is None else {ENTRY: json.dumps(config)}
    return Diffusers().decode(TensorFile(tensors, header), layers)


def config(root: str = "unet.", **fields: Any) -> dict[str, Any]:
    return {root + key: value for key, value in {"r": 4, "lora_alpha": 4, **fields}.items()}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (Q, Q),
        (Q.replace("unet.", "unet.base_model.model."), Q),  # a peft model's own names
        (Q.removeprefix("unet."), Q),  # save_lora_adapter
        ("unet." + Q, Q),  # diffusers 0.22
        (f"{CLIP}.q_proj", f"{CLIP}.q_proj"),  # transformers 5
        (f"{CLIP}.q_proj".replace("encoder.layers", "text_model.encoder.layers"), f"{CLIP}.q_proj"),  # before
        ("text_encoder_2.encoder.layers.1.mlp.fc1", "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"),
    ],
)
def test_every_spelling_finds_its_layer(name: str, path: str) -> None:
    assert set(decode(pair(name, path)).state.layers) == {path}


def test_clip_is_written_as_it_always_was() -> None:
    names = Diffusers().encode(adapter()).tensors
    assert f"{CLIP}.q_proj.lora_A.weight".replace("encoder.layers", "text_model.encoder.layers") in names


def test_one_layer_under_two_spellings_is_an_error() -> None:
    with pytest.raises(FormatError, match="one layer twice"):
        decode(pair(Q) | pair(Q.removeprefix("unet.")))


@pytest.mark.parametrize("style", [".lora.{}.weight", ".lora_linear_layer.{}.weight", ".lora_{}.weight"])
def test_the_names_of_2023_are_read_beside_todays(style: str) -> None:
    other = f"{BLOCK}.attn1.to_out.0"
    tensors = pair(Q) | {other + style.format(part): layer(other).tensors[part] for part in ("down", "up")}
    decoded = decode(tensors)
    assert set(decoded.state.layers) == {Q, other} and not decoded.unused


def test_without_alpha_it_is_the_rank_and_that_is_said() -> None:
    decoded = decode(pair(Q))
    assert decoded.state.layers[Q].alpha == 4.0
    assert decoded.notes == ("alpha absent: using alpha = rank",)


def test_an_alpha_tensor_counts() -> None:
    decoded = decode(pair(Q) | {Q + ".alpha": torch.tensor(2)})
    assert decoded.state.layers[Q].alpha == 2.0 and not decoded.notes and len(decoded.used) == 3


def test_an_alpha_tensor_without_factors_is_reported() -> None:
    assert list(decode(pair(Q) | {"unet.else.alpha": torch.tensor(2)}).unused) == ["unet.else.alpha"]


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (config(r=8), "rank 8, its tensors have rank 4"),
        (config(rank_pattern={"to_q": 2}), "rank 2"),
        (config(use_dora=True), "says use_dora, but .* has no lora_magnitude_vector"),
        (config(r="4"), "malformed"),
        (config(lora_alpha=None), "malformed"),
        (config(use_rslora="no"), "malformed"),
        (config(alpha_pattern=[1]), "malformed alpha_pattern"),
        (config(alpha_pattern={"to_q": "2"}), "malformed alpha_pattern"),
        (config(alpha_pattern={"(a+)+x": 2}), "refused"),
        (config(alpha_pattern={"[": 2}), "invalid expression"),
        ({"unet.lora_alpha": 2}, "malformed"),
    ],
)
def test_a_header_that_contradicts_the_tensors_is_refused(said: dict[str, Any], match: str) -> None:
    with pytest.raises(FormatError, match=match):
        decode(pair(Q), said)


def test_two_places_that_disagree_about_alpha_are_refused() -> None:
    with pytest.raises(FormatError, match="contradicts itself about the scale"):
        decode(pair(Q) | {Q + ".alpha": torch.tensor(2.0)}, config(lora_alpha=8))
    file = Diffusers().encode(adapter([Q], alpha=8.0))
    edited = dict(file.metadata) | {ENTRY: json.dumps(config(lora_alpha=4))}
    with pytest.raises(FormatError, match="contradicts itself about the scale"):
        Diffusers().decode(TensorFile(file.tensors, edited), [Q])


def test_patterns_with_a_beginning_fit_a_peft_models_own_names() -> None:
    rest = Q.removeprefix("unet.")
    tensors = pair(f"unet.base_model.model.{rest}")
    decoded = decode(tensors, config(lora_alpha=2, alpha_pattern={f"^{rest}": 20}))
    assert decoded.state.layers[Q].alpha == 20.0


def test_metadata_without_a_prefix_belongs_to_tensors_without_one() -> None:
    decoded = decode(pair(Q.removeprefix("unet.")), config("", lora_alpha=2, alpha_pattern={"attn1.to_q": 1}))
    assert decoded.state.layers[Q].alpha == 1.0


@pytest.mark.parametrize(
    "key",
    [
        "boft_R",
        "bm.weight",
        "lokr_t1",
    ],
)
def test_families_that_are_not_known_are_refused_by_name(key: str, tmp_path: Path) -> None:
    save(TensorFile(pair(Q) | {f"{Q}.{key}": torch.ones(32)}), tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=rf"unsupported: .*{key.split('.')[0]}.* on 1 module\."):
        read(tmp_path, SHAPES, allow_partial=True)


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(missing: str) -> None:
    tensors = {name: tensor for name, tensor in pair(Q).items() if missing not in name}
    with pytest.raises(FormatError, match="only one of the two factors"):
        decode(tensors)


def test_a_transposed_factor_is_refused() -> None:
    tensors = pair(Q)
    tensors[Q + ".lora_A.weight"] = tensors[Q + ".lora_A.weight"].T
    with pytest.raises(FormatError, match=r"shapes \(32, 4\) and \(32, 4\)"):
        decode(tensors)


names = some.lists(some.sampled_from(["a", "ab", "0", "10", "to_q", "layers"]), min_size=1, max_size=4).map(
    ".".join
)
patterns = (
    names
    | names.map("^{}".format)
    | names.map(lambda n: n.replace(".", r"\."))
    | some.sampled_from([".*to_q", r"layers\.\d+", "^a.*", "(to_q|ab)", "[ab]", ""])
)


@settings(max_examples=200, deadline=None)
@given(table=some.dictionaries(patterns, some.integers(1, 9), max_size=5), name=names)
def test_patterns_mean_what_they_mean_to_peft(table: dict[str, int], name: str) -> None:
    from peft.utils.other import get_pattern_key

    ours = Patterns(table, "rank_pattern", lambda value: True).get(name, None)
    assert ours == table.get(get_pattern_key(table.keys(), name))


@pytest.mark.parametrize(
    ("number", "seconds", "said"), [(20_000, 2.0, "more than 256 expressions"), (250, 0.01, "take too long")]
)
def test_hostile_patterns_cost_little_time(
    number: int, seconds: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patterns, "SECONDS", seconds)
    name = "unet." + "a." * 140 + "to_q"
    start = time.process_time()
    with pytest.raises(FormatError, match=said):
        decode(pair(name), config(alpha_pattern={f".*.*x{n}": 1 for n in range(number)}), None)
    assert time.process_time() - start < 10


def test_peft_gives_every_layer_our_rank_and_scale() -> None:
    """The header through peft's own LoraConfig and tuner, for both spellings of CLIP."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    layers = {
        path: layer(path, rank=2 + n % 3, alpha=float(1 + n % 4) / 3, rank_stabilized=n % 2 == 0)
        for n, path in enumerate(SHAPES)
    }
    table = json.loads(Diffusers().encode(AdapterState(layers)).metadata[ENTRY])
    for path, mine in layers.items():
        root, _, rest = path.partition(".")
        fields = {k.removeprefix(root + "."): v for k, v in table.items() if k.startswith(root + ".")}
        theirs = LoraConfig(**fields)
        bare = rest.removeprefix("text_model.")
        for name in [rest] if root == "unet" else [bare, f"text_model.{bare}"]:
            rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, name), theirs.r)
            alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern, name), theirs.lora_alpha)
            assert rank == mine.rank
            assert alpha / (rank**0.5 if theirs.use_rslora else rank) == pytest.approx(mine.scale, rel=1e-12)
            assert any(name == target or name.endswith("." + target) for target in theirs.target_modules)


@pytest.mark.parametrize("stabilized", [False, True])
def test_a_file_that_diffusers_wrote_is_read_with_its_scales(stabilized: bool, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    settings_ = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_k", "conv1"],
        rank_pattern={"to_k": 2, "mid_block.*to_q": 8},
        alpha_pattern={"^mid_block.resnets.0.conv1": 16},
        use_rslora=stabilized,
        init_lora_weights=False,
    )
    unet.add_adapter(settings_)
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "whole",
        unet_lora_layers=tensors,
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    unet.save_lora_adapter(tmp_path / "alone")
    for folder in ("whole", "alone"):
        found = read(tmp_path / folder)
        assert found.report.endswith("0 unused tensors") and len(found.used) == len(tensors)
        for path, mine in found.state.layers.items():
            theirs: Any = unet.get_submodule(path.removeprefix("unet."))
            assert mine.rank == theirs.r["default"]
            assert mine.scale == pytest.approx(theirs.scaling["default"], rel=1e-12)
            assert torch.equal(mine.tensors["down"], theirs.lora_A["default"].weight)
            assert torch.equal(mine.tensors["up"], theirs.lora_B["default"].weight)


def test_a_layer_that_the_base_lacks_is_not_dropped_in_silence(tmp_path: Path) -> None:
    write(adapter(ATTENTION), tmp_path)
    fewer = {path: SHAPES[path] for path in ATTENTION[1:]}
    with pytest.raises(UnusedTensors, match=r"^2 of \d+ tensors matched no layer"):
        read(tmp_path, fewer)
    found = read(tmp_path, fewer, allow_partial=True)
    assert len(found.unused) == 2 and "2 unused tensors" in found.report


def test_size_on_the_shape_of_stable_diffusion_1_5(tmp_path: Path) -> None:
    """Rank 4 on the 128 attention projections: 797,184 parameters in at most 3.29 MB, half of it in fp16."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    shapes = {
        f"unet.{name}": tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    }
    state = AdapterState(
        {
            path: type(layer(Q))("lora", 4, 4.0, {"down": torch.randn(4, inside), "up": torch.randn(out, 4)})
            for path, (out, inside) in shapes.items()
        }
    )
    assert len(shapes) == 128
    assert sum(t.numel() for one in state.layers.values() for t in one.tensors.values()) == 797_184
    full = write(state, tmp_path / "full.safetensors")
    half = write(state, tmp_path / "half.safetensors", dtype=torch.float16)
    assert full.stat().st_size <= 3_290_000
    assert half.stat().st_size <= 3_290_000 / 2
    assert len(read(full, shapes).used) == len(load(half).tensors) == 256

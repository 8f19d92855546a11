"""Needs: what is counted on the meta device is what is there on a real one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.cli.doctor import base_findings
from scumble.models import FAMILIES, needs
from scumble.models.loading import load_base, look_at
from scumble.models.needs import TRAINED_BYTES, Needs, kept_by, needs_of
from scumble.models.tiny import save, tiny_t5_tokenizer, tiny_tokenizer


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_what_is_counted_without_weights_is_what_a_real_step_keeps(family: str, tmp_path: Path) -> None:
    look = look_at(save(family, tmp_path / "base"))
    found = needs_of(look.configs, look.facts, torch.float32, look.tokenizers)
    real = FAMILIES.get(family).tiny()
    pipeline = real.pipeline()
    modules = {name: getattr(pipeline, name) for name in ("vae", *real.roots)}
    assert {part.name: part.parameters for part in found.parts} == {
        name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()
    }
    assert found.parts[0].name == next(iter(real.roots))
    assert {part.name: part.size for part in found.parts} == {
        name: sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        for name, module in modules.items()
    }
    for checkpointing in (False, True):
        assert found.kept[checkpointing] == pytest.approx(kept_by(real, checkpointing), rel=0.02)
    assert found.kept[True] < found.kept[False]
    least, fastest = found.training(checkpointing=True), found.training(checkpointing=False)
    assert least is not None and fastest is not None and found.drawing() <= least < fastest
    late = {part.name for part in found.parts if part.late}
    assert late == set(look.facts.deferred) == ({"text_encoder_2"} if family == "flux" else set())
    there = sum(part.size for part in found.parts if part.name not in late)
    assert fastest == there + TRAINED_BYTES * found.trained + found.kept[False]


def test_without_a_vocabulary_training_is_left_open(tmp_path: Path) -> None:
    look = look_at(save("sd1", tmp_path / "base"))
    found = needs_of(look.configs, look.facts)
    assert found.training(checkpointing=True) is None and found.drawing() == found.weights


# -- at full size --------------------------------------------------------------------------------------------

VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}

PUBLISHED: dict[str, dict[str, tuple[str, dict[str, Any], int]]] = {
    "FluxPipeline": {
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}, 11_901_408_320),
        "vae": ("AutoencoderKL", {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}, 83_819_683),
        "text_encoder": ("CLIPTextModel", {**CLIP_L, "projection_dim": 768}, 123_060_480),
        "text_encoder_2": ("T5EncoderModel", T5_XXL, 4_762_310_656),
        "tokenizer": ("CLIPTokenizer", {}, 0),
        "tokenizer_2": ("T5TokenizerFast", {}, 0),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {**FLOW, "use_dynamic_shifting": True}, 0),
    },
    "StableDiffusion3Pipeline": {
        "transformer": (
            "SD3Transformer2DModel",
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
                "sample_size": 128,
            },
            8_056_627_520,
        ),
        "vae": ("AutoencoderKL", {**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}, 83_819_683),
        "text_encoder": ("CLIPTextModelWithProjection", {**CLIP_L, "projection_dim": 768}, 123_650_304),
        "text_encoder_2": ("CLIPTextModelWithProjection", {**CLIP_G, "projection_dim": 1280}, 694_659_840),
        "text_encoder_3": ("T5EncoderModel", T5_XXL, 4_762_310_656),
        "tokenizer": ("CLIPTokenizer", {}, 0),
        "tokenizer_2": ("CLIPTokenizer", {}, 0),
        "tokenizer_3": ("T5TokenizerFast", {}, 0),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW, 0),
    },
}
"""Flux.1 dev and Stable Diffusion 3.5 large as they are published: component -> (class, config where it differs from
the class's defaults, number of parameters)."""

TABLE = 192 * 192 * 2432
"""Numbers of SD 3.5 large's table of positions, which is no parameter."""


def skeletons(pipeline: str) -> dict[str, torch.nn.Module]:
    """The components with weights, in bf16 on the meta device."""
    import diffusers
    import transformers

    made: dict[str, torch.nn.Module] = {}
    for name, (kind, config, count) in PUBLISHED[pipeline].items():
        cls: Any = getattr(diffusers, kind, None) or getattr(transformers, kind)
        with torch.device("meta"):
            if count:
                told = (
                    cls(**config)
                    if issubclass(cls, diffusers.ModelMixin)
                    else cls(cls.config_class(**config))
                )
                made[name] = torch.nn.Module.to(told, torch.bfloat16)
    return made


def write_published(pipeline: str, folder: Path) -> Path:
    """A folder as it is published, with files of weights that have a header, their full length, and nothing else: they
    take no room on the disk."""
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, (kind, config, _) in PUBLISHED[pipeline].items():
        library = "transformers" if name.startswith(("text", "tokenizer")) else "diffusers"
        index[name] = [library, kind]
        (folder / name).mkdir(parents=True)
        if name.startswith("tokenizer"):
            words = tiny_t5_tokenizer() if kind.startswith("T5") else tiny_tokenizer()
            words.save_pretrained(folder / name)
            continue
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps({"_class_name": kind, **config}))
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, module in skeletons(pipeline).items():
        entries, end = {}, 0
        for key, tensor in module.state_dict().items():
            begin, end = end, end + tensor.nbytes
            entries[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header = json.dumps(entries).encode()
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        with (folder / name / f"{stem}.safetensors").open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(8 + len(header) + end)
    return folder


@pytest.mark.parametrize("pipeline", PUBLISHED)
def test_full_size_is_what_the_components_take(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Component by component, and what `scumble doctor --base` says of it."""
    folder, parts = write_published(pipeline, tmp_path / "base"), skeletons(pipeline)
    counted: list[Needs] = []

    def watched(*given: Any) -> Needs:
        counted.append(needs_of(*given))
        return counted[-1]

    monkeypatch.setattr(needs, "needs_of", watched)
    lines = {line.what: line.found for line in base_findings(str(folder))}
    (found,) = counted
    assert lines["base"].endswith("1024 pixels, sides in multiples of 16")
    counts = {name: count for name, (_, _, count) in PUBLISHED[pipeline].items() if count}
    assert {part.name: part.parameters for part in found.parts} == counts
    sizes = {part.name: part.size for part in found.parts}
    assert sizes == {
        name: sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        for name, module in parts.items()
    }
    table = TABLE if pipeline.startswith("StableDiffusion3") else 0
    assert sizes["transformer"] == 2 * (counts["transformer"] + table)
    t5 = next(part for part in found.parts if part.kind == "T5EncoderModel")
    assert t5.late and found.resident == sum(sizes.values()) - 2 * counts[t5.name]
    least, fastest = found.training(checkpointing=True), found.training(checkpointing=False)
    assert least is not None and fastest is not None
    # 1024x1024 is 4096 tokens: without recomputing, what one step keeps of one picture is as large as the weights
    assert found.resident < least <= fastest and fastest > found.weights
    assert lines["to draw"].startswith(f"{sum(sizes.values()) / 2**30:.1f} GiB and more")
    assert lines["to train, least"].startswith(f"{least / 2**30:.1f} GiB and more")
    for name, count in counts.items():
        assert f", {count / 1e6:,.1f} million parameters, BF16, " in lines[name]
    assert f"{t5.name} only while prompts are read" in lines["to train, least"]


@pytest.mark.parametrize("code", ["int8", "nf4", "fp8"])
def test_what_is_held_in_few_bits_is_counted_as_it_is(code: str, tmp_path: Path) -> None:
    folder = save("sd1", tmp_path / "base")
    look = look_at(folder)
    needs = needs_of(look.configs, look.facts, torch.bfloat16, look.tokenizers)
    real = load_base(folder, dtype=torch.bfloat16, device="cpu", quantization=code).denoiser
    assert needs.parts[0].held[code] == sum(p.nbytes for p in real.parameters())
    assert all(not part.held for part in needs.parts[1:])
    saved = needs.parts[0].size - needs.parts[0].held[code]
    least, held = (needs.training(checkpointing=True, quantization=one) for one in ("none", code))
    assert least is not None and held is not None and least - held == saved > 0

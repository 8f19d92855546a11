"""CLIP and DINO through transformers' real classes, small and random, from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scumble.errors import ModelError
from scumble.evaluation.asks import Ask
from scumble.evaluation.concept import Concept
from scumble.evaluation.eyes import ModelEye
from scumble.evaluation.vision import Clip, Dino
from scumble.models.tiny import tiny_tokenizer

PICTURES = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "#102030")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        Dinov2Config,
        Dinov2Model,
    )

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=20, eos_token_id=tokenizer.eos_token_id, **size
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **size)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    CLIPModel(config).save_pretrained(folder / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    Dinov2Model(
        Dinov2Config(
            image_size=32,
            patch_size=8,
            mlp_ratio=2,
            **{k: v for k, v in size.items() if k != "intermediate_size"},
        )
    ).save_pretrained(folder / "dino")
    processor.save_pretrained(folder / "dino")
    return folder


def test_clip_equals_the_models_own_answers(models: Path) -> None:
    """Against transformers' own forward pass over picture and text together."""
    from transformers import AutoImageProcessor, CLIPModel

    clip = Clip(str(models / "clip"))
    images, texts = clip.images(PICTURES), clip.texts(["a red fox", "snow"])
    model = CLIPModel.from_pretrained(models / "clip").eval()
    words = tiny_tokenizer()(["a red fox", "snow"], padding="max_length", max_length=20, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(models / "clip")(images=PICTURES, return_tensors="pt")
    with torch.no_grad():
        both = model(**words, pixel_values=pixels["pixel_values"])
    assert np.allclose(images, both.image_embeds.numpy(), atol=1e-5)
    assert np.allclose(texts, both.text_embeds.numpy(), atol=1e-5)
    assert np.allclose(np.linalg.norm(images, axis=1), 1)


def test_a_long_prompt_is_cut_and_not_refused(models: Path) -> None:
    assert Clip(str(models / "clip")).texts(["word " * 60]).shape == (1, 12)


def test_dino_takes_the_class_token(models: Path) -> None:
    rows = Dino(str(models / "dino")).images(PICTURES)
    assert rows.shape == (3, 16) and np.allclose(rows[0] @ rows[0], 1) and not np.allclose(rows[0], rows[1])


def test_the_eye_measures_with_both(models: Path) -> None:
    eye = ModelEye(str(models / "clip"), str(models / "dino"))
    concept = Concept("sks dog", tuple(PICTURES[:1]), ("a",))
    learned = eye.learned(PICTURES, concept)
    assert list(learned) == ["DINO", "CLIP-I"] and learned["DINO"][0] == pytest.approx(1)
    obeys = eye.obeys(PICTURES, [Ask("red"), Ask("blue"), Ask("night")])
    assert obeys["CLIP-T"].shape == (3,) and np.abs(obeys["CLIP-T"]).max() <= 1
    alike = eye.likeness(PICTURES, [PICTURES[0]] * 3)
    assert alike is not None and alike[0] == pytest.approx(1) and alike[1] < 1
    assert eye.name.startswith("DINO") and not eye.shares
    assert ModelEye(dino=str(models / "dino")).obeys(PICTURES, [Ask("x")] * 3) == {}


def test_what_is_not_there_is_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hf download no/such-clip"):
        Clip("no/such-clip")
    with pytest.raises(ModelError, match="is a clip model; DINO is one of"):
        Dino(str(models / "clip"))
    with pytest.raises(ModelError, match="CLIP model"):
        Clip(str(tmp_path))

"""Vision: CLIP and DINO from a folder or the local cache; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scumble.errors import ModelError

BATCH = 16


class Clip:
    """A CLIP model: pictures and texts in one space."""

    def __init__(self, source: str, device: Any = "cpu") -> None:
        """
        Raises:
            ModelError: it isn't on this machine, or it is no CLIP.
        """
        from transformers import AutoTokenizer, CLIPModel

        self._model = _load(CLIPModel, source, "CLIP", ("clip",)).to(device)
        self._processor = _processor(source)
        self._tokenizer = _loaded(
            lambda: AutoTokenizer.from_pretrained(source, local_files_only=True), source, "CLIP"
        )
        self._device = device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> NDArray[np.float64]:
        """(N, D), rows of length 1."""
        return _rows(
            self._model.visual_projection(
                self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
            )
            for pixels in _pixels(self._processor, pictures)
        )

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(N, D), rows of length 1; cut at the model's own limit."""
        rows = []
        for start in range(0, len(prompts), BATCH):
            words = self._tokenizer(
                list(prompts[start : start + BATCH]), padding="max_length", truncation=True, return_tensors="pt",
                max_length=self._model.config.text_config.max_position_embeddings,
            ).to(self._device)  # fmt: skip
            rows.append(self._model.text_projection(self._model.text_model(**words).pooler_output))
        return _rows(rows)


class Dino:
    """A DINO or DINOv2 model: the embedding of a picture is that of its class token."""

    def __init__(self, source: str, device: Any = "cpu") -> None:
        """
        Raises:
            ModelError: it isn't on this machine, or it is no vision transformer.
        """
        from transformers import AutoModel

        self._model = _load(
            AutoModel, source, "DINO", ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
        ).to(device)
        self._processor = _processor(source)
        self._device = device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> NDArray[np.float64]:
        """(N, D), rows of length 1."""
        return _rows(
            self._model(pixel_values=pixels.to(self._device)).last_hidden_state[:, 0]
            for pixels in _pixels(self._processor, pictures)
        )


def _load(kind: Any, source: str, word: str, types: Sequence[str]) -> Any:
    from transformers import AutoConfig

    config = _loaded(lambda: AutoConfig.from_pretrained(source, local_files_only=True), source, word)
    if config.model_type not in types:
        raise ModelError(
            f"--{word.lower()} {source} is a {config.model_type} model; {word} is one of: {', '.join(types)}."
        )
    model = _loaded(lambda: kind.from_pretrained(source, local_files_only=True), source, word)
    return model.eval().requires_grad_(False)


def _processor(source: str) -> Any:
    from transformers import AutoImageProcessor

    return _loaded(
        lambda: AutoImageProcessor.from_pretrained(source, local_files_only=True), source, "CLIP or DINO"
    )


def _loaded(load: Any, source: str, word: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        there = "" if Path(source).exists() else f" It is not on this machine: hf download {source}"
        raise ModelError(f"The {word} model {source} can't be loaded: {first}{there}") from error


def _pixels(processor: Any, pictures: Sequence[Image.Image]) -> Any:
    for start in range(0, len(pictures), BATCH):
        batch = [picture.convert("RGB") for picture in pictures[start : start + BATCH]]
        yield processor(images=batch, return_tensors="pt")["pixel_values"]


def _rows(batches: Any) -> NDArray[np.float64]:
    rows = torch.cat([batch.float().cpu() for batch in batches])
    return torch.nn.functional.normalize(rows, dim=1).double().numpy()

"""DataSettings: which pictures and words are trained on, and how they are shown."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from scumble.settings import Settings


def _path_to_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_path_to_text)]


class DataSettings(Settings):
    """Which pictures and words are trained on, and how they are shown."""

    images: PathText
    """A folder of pictures, a dataset saved by Hugging Face `datasets`, or the id of a dataset on the Hub."""
    caption: str | None = None
    """One prompt for all pictures, instead of the dataset's captions. "" trains without words."""
    image_column: str = "image"
    """The column that holds the picture, or names its file. `file_name` is found by itself."""
    caption_column: str = "text"
    """The column that holds the caption, or a list of captions of which one is chosen at each visit."""
    dataset_config: str | None = None
    """The configuration of a Hugging Face dataset that has several."""
    split: str = "train"
    """Which split of the dataset is trained on."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Train on this many pictures only, chosen by the seed."""
    held_out: Annotated[float, Field(ge=0)] = 0
    """Pictures kept out of training for the held-out loss, chosen by the seed: a fraction below 1, or a
    count."""
    masks: PathText | None = None
    """Where the loss counts. "alpha": where a picture is not transparent. Or a folder, `masks/` in `images` or any
    other, with a grey picture of the same name and size for each: white counts, black and transparent do not. An
    inpainting base learns to fill what is white; without masks, holes are drawn by chance."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """How often a picture counts in one epoch. Folders named like `10_dog` multiply it by their own
    number."""

    resolution: Annotated[int, Field(ge=8)] | None = None
    """Side of the square that is trained, in pixels; with buckets, its area. None takes the base's own."""
    center_crop: bool = True
    """Cut the middle out of a picture that is not square. Off cuts at a random place at each visit."""
    crop_variants: Annotated[int, Field(ge=0)] = 4
    """How many random crops of a picture are prepared, when `center_crop` is off. 0 cuts anew at each visit:
    then latents can't be kept, and the image encoder works in every step."""
    random_flip: bool = False
    """Mirror pictures left to right at half of the visits. Wrong for text, logos, and captions that say
    "left"."""
    buckets: bool = False
    """Train each picture in the shape nearest to its own, of about the same area, instead of in a square."""
    bucket_step: Annotated[int, Field(ge=1)] | None = None
    """Sides of buckets are multiples of this many pixels. None takes the smallest that the base allows."""
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"] = (
        "lanczos"
    )
    """How pixels are computed when a picture is resized."""
    allow_upscale: bool = True
    """Enlarge pictures that are smaller than the resolution. Off refuses them by name."""

    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("{caption}",)
    """Sentences around the caption, `{caption}` in each. One is chosen at each visit."""
    shuffle_tags: bool = False
    """Put the tags of a caption, `red, fox, snow`, into a random order."""
    keep_tags: Annotated[int, Field(ge=0)] = 0
    """How many tags at the beginning stay where they are when tags are shuffled."""
    tag_separator: Annotated[str, Field(min_length=1)] = ","
    """What stands between two tags."""
    tag_variants: Annotated[int, Field(ge=0)] = 8
    """How many tag orders of a caption are prepared, when tags are shuffled. 0 shuffles anew at each visit:
    then the text encoder works in every step."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The chance that a visit shows the picture without words, so that guidance has something to push away
    from."""

    cache: PathText | None = None
    """Folder where latents and text embeddings are kept between runs, found again by content. None keeps them
    in memory for this run."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Threads that read pictures while latents are computed. Changes no result."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> DataSettings:
        if not self.images.strip():
            raise ValueError("images is empty. Give a folder, or the id of a dataset on the Hub.")
        for template in self.templates:
            if "{caption}" not in template:
                raise ValueError(
                    f"template {template!r} does not contain {{caption}}. "
                    "For one prompt for all, use caption."
                )
        if self.held_out >= 1 and self.held_out != int(self.held_out):
            raise ValueError(f"held_out = {self.held_out} is neither a fraction below 1 nor a whole number.")
        if self.keep_tags and not self.shuffle_tags:
            raise ValueError(f"keep_tags = {self.keep_tags} has no effect without shuffle_tags = true.")
        if self.bucket_step is not None and not self.buckets:
            raise ValueError(f"bucket_step = {self.bucket_step} has no effect without buckets = true.")
        return self


NOT_SHOWN = frozenset(
    {
        "images",
        "caption",
        "image_column",
        "caption_column",
        "dataset_config",
        "split",
        "max_samples",
        "held_out",
        "masks",
    }
    | {"repeats", "resolution", "bucket_step", "allow_upscale", "cache", "workers"}
)
"""Settings that a dataset's fingerprint need not repeat: their effect is in the pictures, captions, repeats
and target sizes that it holds, or they have none on what is shown."""

#!/usr/bin/env python
"""The command people already have for pivotal tuning (`lora_pti`), with the same flags, on scumble.

    scripts/lora_pti.py --pretrained_model_name_or_path=picturebook --instance_data_dir=cat/ --output_dir=out \\
        --placeholder_tokens="<s1>|<s2>" --initializer_tokens="cat|toy" --use_template="object" \\
        --max_train_steps_ti=1000 --max_train_steps_tuning=1000 --continue_inversion

Switches are given as there: `--train_text_encoder`, `--train_text_encoder=False` or `--notrain_text_encoder`.

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings. The output folder holds
`final_lora.safetensors` (or what `--out_name` says) with the LoRA and the words, `learned_embeds*.safetensors` with the
words alone for diffusers, and `checkpoint-N/`.

What behaves otherwise, on purpose:
  * The file has diffusers' names, so that `pipe.load_lora_weights` reads it. `scumble convert` writes the other.
  * Steps are optimizer steps: `--max_train_steps_ti` is divided by `--gradient_accumulation_steps`, which counts
    forward passes there; the tuning accumulates as well.
  * Colours are not jittered. Noise levels are drawn from the whole range in both phases.
  * The sentences of the templates are our own. Without `--use_template`, captions are read from metadata.jsonl or text
    files and must contain the words; file names are no captions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # already there when this file is run, not when it is imported

from flags import Becomes, Command, Flag, Refused, Values, World, nothing, only

LAYERS = {
    "CrossAttention": "attention",
    "Attention": "attention",
    "GEGLU": "*.ff.net.0.proj",
    "ResnetBlock2D": "*.resnets.*",
}
"""Classes of the UNet whose layers are adapted there -> our targets."""


def truth(text: str) -> bool:
    """A switch's value as a word."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def none_or_text(text: str) -> str | None:
    """A text, where None and the empty one say nothing."""
    return None if text in ("", "None") else text


def several(text: str) -> tuple[str, ...]:
    """`{"A","B"}`, `A,B` or `A|B` as names."""
    names = text.strip("{}[]() ").replace("|", ",").split(",")
    return tuple(name.strip(" '\"") for name in names if name.strip(" '\""))


def words(value: str, flags: argparse.Namespace, world: World) -> Values:
    if not value:
        raise Refused('--placeholder_tokens is needed: the new words, e.g. "<s1>|<s2>".')
    return {"pivotal.placeholders": tuple(value.split("|"))}


def initial(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    starts = value.split("|") if value else []
    noise = [start for start in starts if start.startswith("<rand")]
    zero = [start for start in starts if start.startswith("<zero")]
    if zero or (noise and len(noise) < len(starts)):
        raise Refused(
            f"--initializer_tokens={value}: start all words from known ones, or all from noise (<rand-0.017>, or leave "
            "the flag out)."
        )
    return {} if noise or not starts else {"pivotal.initial": tuple(starts)}


def template(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    kinds = {None: "captions", "object": "object", "style": "style", "person": "object"}
    if value not in kinds:
        raise Refused(f"--use_template={value} is none of object, style, person.")
    return {"pivotal.learns": kinds[value]}


def inversion(value: bool, flags: argparse.Namespace, world: World) -> Values:
    """The steps of both phases."""
    if not value and not flags.continue_inversion:
        raise Refused(
            "--perform_inversion=False without --continue_inversion would never train the words. Give one of them."
        )
    first = -(-flags.max_train_steps_ti // flags.gradient_accumulation_steps) if value else 0
    return {"pivotal.inversion_steps": first, "train.steps": first + flags.max_train_steps_tuning}


def scaled(value: float, flags: argparse.Namespace) -> float:
    """A learning rate as it trains: `--scale_lr` multiplies it."""
    return value * (flags.gradient_accumulation_steps * flags.train_batch_size if flags.scale_lr else 1)


def rate(setting: str, *, needs: str = "") -> Becomes:
    """A learning rate, scaled where `--scale_lr` asks for it; none where its switch is off."""

    def becomes(value: float | None, flags: argparse.Namespace, world: World) -> Values:
        if value is None or (needs and not getattr(flags, needs)):
            return {}
        return {setting: scaled(value, flags)}

    return becomes


def tuning_rate(flags: argparse.Namespace) -> float:
    """While the LoRA is tuned, words go on at the inversion's rate unless they have one of their own."""
    own = flags.continue_inversion_lr
    return float(flags.learning_rate_ti if own is None else own)


def token_rate(value: float | None, flags: argparse.Namespace, world: World) -> Values:
    return rate("pivotal.token_learning_rate", needs="continue_inversion")(tuning_rate(flags), flags, world)


def warmup(setting: str, schedule: str) -> Becomes:
    return lambda value, flags, world: {setting: 0 if getattr(flags, schedule) == "constant" else value}


def targets(value: tuple[str, ...], flags: argparse.Namespace, world: World) -> Values:
    names = (*value, "ResnetBlock2D") if flags.use_extended_lora else value
    strange = [name for name in names if name not in LAYERS]
    if strange:
        raise Refused(f"--lora_unet_target_modules: {strange[0]} is none of {', '.join(LAYERS)}.")
    return {"adapter.targets": tuple(dict.fromkeys(LAYERS[name] for name in names))}


def text_targets(value: tuple[str, ...], flags: argparse.Namespace, world: World) -> Values:
    if value != ("CLIPAttention",):
        raise Refused(f"--lora_clip_target_modules={','.join(value)}: only CLIPAttention is adapted.")
    return {}


def scale(value: float, flags: argparse.Namespace, world: World) -> Values:
    """alpha / rank is the same in UNet and text encoder, whatever the rank of each."""
    if value == 1:
        return {}
    found: dict[str, object] = {"adapter.alpha": value * flags.lora_rank_unet}
    if flags.train_text_encoder:
        found["adapter.alpha_pattern"] = {"text_encoder*.*": value * flags.lora_rank_text_encoder}
    return found


def decay(value: bool, flags: argparse.Namespace, world: World) -> Values:
    """There each step takes the norm the part min(1, 100 x rate) of the way to the table's, by the rate that trains."""
    trains = flags.learning_rate_ti if flags.perform_inversion else tuning_rate(flags)
    return {"pivotal.norm_pull": min(1.0, 100 * scaled(trains, flags)) if value else 0.0}


def eight_bits(value: bool, flags: argparse.Namespace, world: World) -> Values:
    if not value:
        return {}
    both = ("train.optimizer.name", "pivotal.inversion_optimizer.name")
    return dict.fromkeys(both if flags.perform_inversion else both[:1], "adamw8bit")


def tracker(value: bool, flags: argparse.Namespace, world: World) -> Values:
    return {"trackers": ("wandb",)} if value else {}


def refused(name: str, help: str, why: str, default: Any = None, type: Any = none_or_text) -> Flag:
    """A row for what there is not: accepted with the value that asks for nothing."""
    return Flag(name, help, only(default, why, name), type, default)


def switch(name: str, help: str, becomes: str | Becomes, default: bool, **others: Any) -> Flag:
    """A row that is on or off."""
    return Flag(name, help, becomes, truth, default, **others)


FLAGS: tuple[Flag, ...] = (
    Flag("instance_data_dir", "Folder of pictures.", "data.images", required=True),
    Flag(
        "pretrained_model_name_or_path",
        'Base model: a Hub id, a folder, a .safetensors checkpoint, or "picturebook".',
        "base",
        required=True,
    ),
    Flag("output_dir", "Folder of the run.", "output", required=True),
    switch("train_text_encoder", "Adapt the text encoder too.", "pivotal.train_text_encoder", True),
    refused(
        "pretrained_vae_name_or_path", "Refused: the base's own VAE is used.", "the base has its own VAE."
    ),
    Flag("revision", "Branch, tag or commit of a Hub base.", "revision", none_or_text),
    switch("perform_inversion", "Train the words alone first.", inversion, True),
    Flag("use_template", "object, style or person; unset takes the captions.", template, none_or_text),
    switch(
        "train_inpainting",
        "Accepted. An inpainting base is known by itself.",
        nothing,
        False,
        note=lambda value, flags: (
            "--train_inpainting: whether a base fills holes is seen from the base itself." if value else ""
        ),
    ),
    Flag("placeholder_tokens", 'The new words, e.g. "<s1>|<s2>".', words, default=""),
    refused(
        "placeholder_token_at_data",
        "Refused: captions must contain the new words themselves.",
        "captions are taken as they are. Write the new words into them, or give --use_template.",
    ),
    Flag("initializer_tokens", "A known word for each new one to start from.", initial, none_or_text),
    refused(
        "load_pretrained_inversion_embeddings_path",
        "Refused: words are learned in the same run.",
        "words are learned in the same run. Give --initializer_tokens instead.",
    ),
    Flag("seed", "Seed of all randomness.", "train.seed", int, 42),
    Flag("resolution", "Side of the square that is trained, in pixels.", "data.resolution", int, 512),
    switch(
        "color_jitter",
        "Accepted. Colours are left as they are.",
        nothing,
        True,
        note=lambda value, flags: "--color_jitter: colours are left as they are." if value else "",
    ),
    Flag("train_batch_size", "Pictures in one forward pass.", "train.batch", int, 1),
    Flag("sample_batch_size", "Accepted; it has no effect there either.", nothing, int, 1),
    Flag("max_train_steps_tuning", "Optimizer steps of the LoRA.", nothing, int, 1000),
    Flag("max_train_steps_ti", "Forward passes of the words alone.", nothing, int, 1000),
    Flag("save_steps", "Steps between checkpoints.", "train.checkpoint_every", int, 100),
    Flag("gradient_accumulation_steps", "Forward passes per optimizer step.", "train.accumulate", int, 4),
    switch(
        "gradient_checkpointing",
        "Recompute activations in the backward pass: less memory, more time.",
        "train.gradient_checkpointing",
        False,
    ),
    Flag("lora_rank_unet", "Rank of the LoRA in the UNet.", "adapter.rank", int, 4),
    Flag(
        "lora_rank_text_encoder",
        "Rank of the LoRA in the text encoder.",
        lambda v, f, w: {"pivotal.text_encoder_rank": v} if f.train_text_encoder else {},
        int,
        4,
    ),
    Flag(
        "lora_unet_target_modules",
        "Classes of the UNet to adapt.",
        targets,
        several,
        ("CrossAttention", "Attention", "GEGLU"),
    ),
    Flag(
        "lora_clip_target_modules",
        "Classes of the text encoder to adapt.",
        text_targets,
        several,
        ("CLIPAttention",),
    ),
    Flag("lora_dropout_p", "Chance that an input of the LoRA is dropped.", "adapter.dropout", float, 0.0),
    Flag("lora_scale", "What the LoRA's product is multiplied by: alpha / rank.", scale, float, 1.0),
    switch("use_extended_lora", "Adapt the convolutions of ResnetBlock2D too.", nothing, False),
    switch("clip_ti_decay", "Hold the words' norms near the table's.", decay, True),
    Flag("learning_rate_unet", "Rate of the LoRA.", rate("train.optimizer.learning_rate"), float, 1e-4),
    Flag(
        "learning_rate_text",
        "Rate of the LoRA in the text encoder.",
        rate("pivotal.text_encoder_learning_rate", needs="train_text_encoder"),
        float,
        1e-5,
    ),
    Flag(
        "learning_rate_ti",
        "Rate of the words.",
        rate("pivotal.inversion_optimizer.learning_rate", needs="perform_inversion"),
        float,
        5e-4,
    ),
    switch("continue_inversion", "Train the words on beside the LoRA.", "pivotal.joint", False),
    Flag("continue_inversion_lr", "Their rate then. Unset: as before.", token_rate, float),
    switch(
        "use_face_segmentation_condition",
        "Refused: faces are not looked for.",
        only(
            False,
            "faces are not looked for. Put a mask beside each picture, see data.masks.",
            "use_face_segmentation_condition",
        ),
        False,
    ),
    switch("cached_latents", "Accepted. Latents are kept anyway.", nothing, True),
    switch(
        "use_mask_captioned_data",
        "Refused: masks are found by themselves.",
        only(False, "masks are found by data.masks, in a layout of their own.", "use_mask_captioned_data"),
        False,
    ),
    refused(
        "mask_temperature",
        "Refused beside 1: a mask weighs as it is.",
        "a mask weighs as it is.",
        1.0,
        float,
    ),
    switch("scale_lr", "Multiply the rates by accumulation and batch size.", nothing, False),
    Flag(
        "lr_scheduler",
        "Schedule of the words' rate.",
        lambda v, f, w: {"pivotal.inversion_schedule.name": v} if f.perform_inversion else {},
        default="linear",
    ),
    Flag(
        "lr_warmup_steps",
        "Its warm-up.",
        lambda v, f, w: (
            warmup("pivotal.inversion_schedule.warmup_steps", "lr_scheduler")(v, f, w)
            if f.perform_inversion
            else {}
        ),
        int,
        0,
    ),
    Flag("lr_scheduler_lora", "Schedule of the LoRA's rate.", "train.schedule.name", default="linear"),
    Flag(
        "lr_warmup_steps_lora",
        "Its warm-up.",
        warmup("train.schedule.warmup_steps", "lr_scheduler_lora"),
        int,
        0,
    ),
    Flag(
        "weight_decay_ti",
        "Weight decay of the words.",
        lambda v, f, w: {"pivotal.inversion_optimizer.weight_decay": v} if f.perform_inversion else {},
        float,
        0.0,
    ),
    Flag("weight_decay_lora", "Weight decay of the LoRA.", "train.optimizer.weight_decay", float, 0.001),
    switch("use_8bit_adam", "AdamW with 8-bit state.", eight_bits, False),
    Flag("device", "cpu, cuda, cuda:1, mps. Unset: the best there is.", "device", none_or_text),
    refused(
        "extra_args",
        "Refused: there is no place for them.",
        "there is no place for them in a run's settings.",
    ),
    switch("log_wandb", "Log to Weights & Biases.", tracker, False),
    Flag("wandb_log_prompt_cnt", "Accepted. Previews are the settings' own.", nothing, int, 10),
    Flag("wandb_project_name", "Its project.", nothing, none_or_text),
    Flag("wandb_entity", "Its entity.", nothing, none_or_text),
    Flag("proxy_token", "Accepted; it has no effect on training there either.", nothing, default="person"),
    switch("enable_xformers_memory_efficient_attention", "Accepted. torch's own is used.", nothing, False),
    Flag("out_name", "Name of the final file.", nothing, default="final_lora"),
)
COMMAND = Command(
    "Teach Stable Diffusion new words, and tune a LoRA around them: pivotal tuning.",
    FLAGS,
    method="pivotal",
    result=lambda flags: f"{flags.out_name.removesuffix('.safetensors')}.safetensors",
)


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Arguments with every switch spelled `--name=True` or `--name=False`, and hyphens as underscores."""
    switches = {flag.name for flag in FLAGS if flag.type is truth}
    found: list[str] = []
    for number, argument in enumerate(arguments):
        if not argument.startswith("--"):
            found.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        following = arguments[number + 1] if number + 1 < len(arguments) else "--"
        if name.removeprefix("no") in switches and name not in switches:
            found.append(f"--{name.removeprefix('no')}=False")
        elif name in switches and not equals and following.startswith("--"):
            found.append(f"--{name}=True")
        else:
            found.append(f"--{name}{equals}{value}")
    return found


parser, translate = COMMAND.parser, COMMAND.translate


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    given = spelled_out(sys.argv[1:] if arguments is None else arguments)
    if "-h" not in given and "--help" not in given:
        flags = COMMAND.parser().parse_args(given)
        for name, variable in (("wandb_project_name", "WANDB_PROJECT"), ("wandb_entity", "WANDB_ENTITY")):
            if getattr(flags, name) is not None:
                os.environ[variable] = getattr(flags, name)
    return COMMAND.run(given, alone=arguments is None)


__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "spelled_out", "translate"]

if __name__ == "__main__":
    sys.exit(main())

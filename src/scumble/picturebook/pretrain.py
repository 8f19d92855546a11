"""The recipe that trained the shipped base: pictures, vocabulary, autoencoder, denoiser, each from nothing.

    scumble picturebook pretrain WORK     # every stage, resumable; about two hours on two free CPU cores
    scumble picturebook pretrain WORK --stage vae

Stages, each reading what the one before it left in WORK:

    draw      scenes that are not held out -> pictures.npz (uint8) and scenes
    words     a byte-level BPE vocabulary over the caption grammar, in the files of CLIPTokenizer
    vae       AutoencoderKL, 4 latent channels at a quarter of the side; then its latents are rescaled exactly, by
              folding an affine map into quant_conv and post_quant_conv, so that SD 1's own factor 0.18215 is right
    unet      UNet2DConditionModel and CLIPTextModel together, epsilon prediction on SD 1's noise schedule
    decoder   the VAE's decoder alone, made sharper behind the frozen encoder (the denoiser never notices)
    export    fp16 safetensors in the layout of StableDiffusionPipeline
    oracle    the network that reads pictures (it needs no other stage)

This is full pretraining, not the fine-tuning that scumble is for, so it has loops of its own, kept as plain as
they can be. Randomness comes from `Streams`, so a resumed stage goes on exactly as if it had not stopped.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scumble.errors import ConfigError
from scumble.models.text import byte_symbols
from scumble.picturebook import captions, scenes
from scumble.picturebook.draw import doodle, draw
from scumble.picturebook.train_oracle import train_oracle
from scumble.rng import Streams

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

STAGES = ("draw", "words", "vae", "unet", "decoder", "export", "oracle")
SCALING_FACTOR = 0.18215  # Stable Diffusion 1's
#: SD 1 has 10 channels and more in a group. With its 32 groups a layer of 32 channels would normalise each channel by
#: itself, and lose how strong it was: colours smear, and droplets appear where the network smuggles them through.
NORM_GROUPS = 8

#: Words beside the caption grammar's own that people write when they fine-tune; they only save tokens.
COMMON_WORDS = """
    a an the of in on at with and photo picture image painting drawing illustration style dog person man woman child
    girl boy toy vase cartoon creature robot plush backpack shoe cup bowl chair lamp watch cake bear horse lion tiger
    monkey mouse duck owl dragon monster doll figure hat flower garden forest mountain river street city kitchen table
    wooden stone glass metal wearing sitting standing running sleeping front back side view close up portrait sks
    blueprint woodcut mosaic neon watercolor pixel sketch ink bright dark old new big small very beautiful
""".split()  # noqa: SIM905 - a list of a hundred strings would be hard to read


@dataclass(frozen=True)
class Recipe:
    """The numbers of the shipped base. Sides in pixels, steps in optimizer steps."""

    seed: int = 0
    resolution: int = 64
    pictures: int = 24_000
    doodles: int = 4_000
    merges: int = 900
    vae_steps: int = 15_000
    vae_batch: int = 8
    vae_rate: float = 1e-3
    kl_weight: float = 1e-4
    unet_steps: int = 12_000
    place_steps: int = 3_300
    """The last of `unet_steps`, in which half of every batch is almost all noise: what goes where is decided there."""
    unet_batch: int = 32
    unet_rate: float = 8e-4
    unet_decay: float = 0.28
    """Share of the steps over which the rate falls to zero at the end; constant before."""
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    ema: float = 0.999
    decoder_steps: int = 2_200
    decoder_rate: float = 6e-4
    text_width: int = 160
    text_layers: int = 3


def recipe(work: Path) -> Recipe:
    """The recipe stored in `work`, or the shipped one."""
    file = work / "recipe.json"
    return Recipe(**json.loads(file.read_text())) if file.exists() else Recipe()


def pretrain(work: Path, *, stage: str | None = None, log: Callable[[str], None] = print) -> None:
    """Run one stage, or all of them in order; what is finished is not done again.

    Raises:
        ConfigError: no stage is called so, or a stage before it has not run.
    """
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"There is no stage {stage!r}. Stages: {', '.join(STAGES)}.")
    work.mkdir(parents=True, exist_ok=True)
    settings = recipe(work)
    (work / "recipe.json").write_text(json.dumps(asdict(settings), indent=1))
    run: dict[str, Callable[[Path, Recipe, Callable[[str], None]], None]] = {
        "draw": draw_pictures,
        "words": train_vocabulary,
        "vae": train_vae,
        "unet": train_unet,
        "decoder": train_decoder,
        "export": export,
        "oracle": lambda work, _, log: train_oracle(work / "oracle.safetensors", log=log),
    }
    for name in STAGES if stage is None else (stage,):
        done = work / f"{name}.done"
        if done.exists() and stage is None:
            continue
        before = () if name == "oracle" else STAGES[: STAGES.index(name)]
        missing = [b for b in before if b != "decoder" and not (work / f"{b}.done").exists()]
        if missing:
            raise ConfigError(f"Stage {name!r} needs {missing[0]!r} first: run the recipe without --stage.")
        log(f"stage {name}")
        run[name](work, settings, log)
        done.touch()


# draw ---------------------------------------------------------------------------------------------------------


def training_scene(number: int, seed: int) -> scenes.Scene:
    """The `number`-th scene of the training set."""
    return scenes.random_scene(Streams(seed).python("scene", number))


def _picture(number: int, *, seed: int, size: int) -> np.ndarray:
    return np.asarray(draw(training_scene(number, seed), size))


def _doodle(number: int, *, seed: int, size: int) -> np.ndarray:
    return np.asarray(doodle(Streams(seed).python("doodle", number), size))


def draw_pictures(work: Path, settings: Recipe, log: Callable[[str], None]) -> None:
    """Draw the training pictures, and abstract ones so that the autoencoder also learns detail no scene has."""
    arguments = {"seed": settings.seed, "size": settings.resolution}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        pictures = list(pool.map(partial(_picture, **arguments), range(settings.pictures), chunksize=64))
        doodles = list(pool.map(partial(_doodle, **arguments), range(settings.doodles), chunksize=64))
    np.savez(work / "pictures.npz", pictures=np.stack(pictures), doodles=np.stack(doodles))
    log(f"drew {len(pictures)} pictures and {len(doodles)} doodles")


# words --------------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """256 printable characters, one for each byte (GPT-2's table): any string becomes known symbols."""
    return list(byte_symbols().values())


def learn_merges(words: collections.Counter[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): the `count` most frequent merges, ties in alphabetical order."""
    splits = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, parts in splits.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        splits = {word: _merged(parts, best) for word, parts in splits.items()}
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def train_vocabulary(work: Path, settings: Recipe, log: Callable[[str], None]) -> None:
    """Write the tokenizer: 256 bytes, 256 bytes that end a word, the merges, two special tokens."""
    from transformers import CLIPTokenizer

    streams = Streams(settings.seed)
    words: collections.Counter[str] = collections.Counter(COMMON_WORDS)
    for number in range(4_000):
        scene = training_scene(number, settings.seed)
        words.update(captions.caption(scene, streams.python("words", number)).replace(",", " ").split())
    alphabet = byte_alphabet()
    merges = learn_merges(words, settings.merges)
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), *(a + b for a, b in merges)]
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    folder = work / "base" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({s: n for n, s in enumerate(symbols)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    longest = max(
        len(tokenizer(captions.caption(training_scene(n, 1), random.Random(n))).input_ids) for n in range(500)
    )
    log(f"{len(symbols)} symbols; the longest of 500 captions takes {longest} of 77 tokens")


def load_tokenizer(work: Path) -> CLIPTokenizer:
    """The vocabulary that `train_vocabulary` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work / "base" / "tokenizer")


# models -------------------------------------------------------------------------------------------------------


def new_vae(settings: Recipe) -> AutoencoderKL:
    """1.7 M parameters; a quarter of the side."""
    from diffusers import AutoencoderKL

    channels = (32, 64, 96)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=NORM_GROUPS,
        latent_channels=4,
        sample_size=settings.resolution,
        scaling_factor=SCALING_FACTOR,
    )


def new_unet(settings: Recipe) -> UNet2DConditionModel:
    """8.8 M parameters: three levels of SD 1's blocks, attention on the two upper ones."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=settings.resolution // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        norm_num_groups=NORM_GROUPS,
        cross_attention_dim=settings.text_width,
        attention_head_dim=4,
    )


def new_text_encoder(settings: Recipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """About 1.2 M parameters; causal, 77 positions, as in SD 1."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=settings.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )


# vae ----------------------------------------------------------------------------------------------------------


def pixels(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error of the pixels, of their differences to neighbours, and of 4x4 means.

    The differences keep outlines sharp; the means make colours right early, which thin outlines alone do not reward.
    """
    error = drawn.float() - wanted
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    means = nn.functional.avg_pool2d(error, 4)
    return error.abs().mean() + across + down + 2 * means.abs().mean() + 4 * means.square().mean()


def guide(latents: Tensor, wanted: Tensor, step: int, until: int = 800) -> Tensor:
    """Early on, hold three latent channels near the 4x4 means of red, green and blue; fades out.

    Left alone, the four channels first fight over one direction of colour, and stay there for thousands of steps.
    """
    means = nn.functional.avg_pool2d(wanted, wanted.shape[-1] // latents.shape[-1])
    return 3 * max(0.0, 1 - step / until) * (latents[:, :3].float() - means).square().mean()


def device_and_autocast() -> tuple[torch.device, Any]:
    """The GPU when there is one, and bf16 autocast for it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.autocast(device.type, torch.bfloat16)


class PlainAttention:
    """Attention as plain products, softmax in the compute dtype.

    On CPUs torch's fused attention has a slow backward for few keys and small heads; here this is twice as fast.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(B, positions, C) -> (B, positions, C); keys from the text where it is given."""
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, seen), (attn.to_v, seen))
        )
        with torch.autocast(
            q.device.type, enabled=False
        ):  # which would make softmax fp32, and twice the bytes
            mixed = (q * attn.scale @ k.transpose(-1, -2)).softmax(-1) @ v
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


def plain_attention(model: nn.Module) -> None:
    """Use `PlainAttention` in a diffusers UNet, where there is no GPU."""
    if not torch.cuda.is_available():
        model.set_attn_processor(PlainAttention())  # type: ignore[operator]


def rate_at(step: int, steps: int, decay: float, warmup: int = 100) -> float:
    """Warm-up, constant, then a linear fall to zero over the last `decay` of the steps."""
    return min((step + 1) / warmup, 1.0, max(0.0, (steps - step) / max(1.0, decay * steps)))


def train_vae(work: Path, settings: Recipe, log: Callable[[str], None]) -> None:
    """Train the autoencoder, then rescale its latents to SD 1's factor."""
    torch.manual_seed(settings.seed)
    model = new_vae(settings)
    _train_autoencoder(
        work, settings, model, "vae", settings.vae_steps, settings.vae_rate, model.parameters(), log
    )
    rescale_latents(model, work, settings, log)
    model.save_pretrained(work / "base" / "vae")


def train_decoder(work: Path, settings: Recipe, log: Callable[[str], None]) -> None:
    """Go on with the decoder alone: latents stay what the denoiser knows."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(work / "base" / "vae")
    model.requires_grad_(False)
    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    _train_autoencoder(
        work, settings, model, "decoder", settings.decoder_steps, settings.decoder_rate, trained, log
    )
    model.save_pretrained(work / "base" / "vae_sharp")


def _varied(pictures: np.ndarray, doodles: np.ndarray, rng: random.Random) -> np.ndarray:
    """One picture for the autoencoder, which has no caption to keep true: mirrored, and often in other colours.

    So it learns to carry any colour and texture, also those of styles that the denoiser never sees.
    """
    abstract = rng.random() < 0.4
    source = doodles if abstract else pictures
    picture = source[rng.randrange(len(source))]
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    if rng.random() < (1.0 if abstract else 0.1):
        picture = picture[:: rng.choice((1, -1)), :, rng.sample(range(3), 3)]
        picture = 255 - picture if rng.random() < 0.3 else picture
    return picture


def _train_autoencoder(
    work: Path,
    settings: Recipe,
    model: AutoencoderKL,
    stage: str,
    steps: int,
    rate: float,
    parameters: Iterable[nn.Parameter],
    log: Callable[[str], None],
) -> None:
    device, autocast = device_and_autocast()
    model.to(device)
    data = np.load(work / "pictures.npz")
    pictures, doodles = data["pictures"], data["doodles"]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    streams, progress = Streams(settings.seed), Progress(stage, steps, log)
    first = load_stage(work, stage, model=model, optimizer=optimizer)
    for step in range(first, steps):
        rng = streams.python(stage, step)
        chosen = np.stack([_varied(pictures, doodles, rng) for _ in range(settings.vae_batch)])
        wanted = pixels(chosen, device)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps, 0.4)
        with autocast:
            encoded = model.encode(wanted).latent_dist
            noise = torch.randn(encoded.mean.shape, generator=streams.generator(stage + "-noise", step)).to(
                device
            )
            drawn = model.decode(encoded.mean + encoded.std * noise).sample
        loss = (
            picture_loss(drawn, wanted) + settings.kl_weight * encoded.kl().mean() / encoded.mean[0].numel()
        )
        if stage == "vae":
            loss = loss + guide(encoded.mean, wanted, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step(step, loss)
        if (step + 1) % 250 == 0:
            save_stage(work, stage, step + 1, model=model, optimizer=optimizer)
    save_stage(work, stage, steps, model=model, optimizer=optimizer)
    model.to("cpu")


@torch.no_grad()
def rescale_latents(model: AutoencoderKL, work: Path, settings: Recipe, log: Callable[[str], None]) -> None:
    """Fold (z - mean) / (std * factor) per channel into quant_conv, and its inverse into post_quant_conv.

    Afterwards latents * scaling_factor have zero mean and unit variance in each channel, and the decoder draws
    exactly what it drew before.
    """
    pictures = np.load(work / "pictures.npz")["pictures"][:2048]
    device = torch.device("cpu")
    means = torch.cat(
        [model.encode(pixels(p, device)).latent_dist.mean for p in np.array_split(pictures, 32)]
    )
    mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3)) * SCALING_FACTOR
    quant, post = model.quant_conv, model.post_quant_conv
    assert quant is not None and post is not None and quant.bias is not None and post.bias is not None
    # z' = (z - mean) / std: mean rows are scaled, log-variance rows are shifted
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.bias[4:] -= 2 * std.log()
    # post(z) = post(std z' + mean)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    log(f"latents rescaled: mean {mean.tolist()}, std {std.tolist()}")


# unet ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_pictures(work: Path, settings: Recipe) -> Tensor:
    """Every training picture as scaled latents, (N, 4, h, w); kept in WORK, made anew when the autoencoder is newer."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    kept = work / "latents.safetensors"
    if kept.exists() and kept.stat().st_mtime > (work / "vae.done").stat().st_mtime:
        return load_file(kept)["latents"]

    device, autocast = device_and_autocast()
    model = AutoencoderKL.from_pretrained(work / "base" / "vae").to(device)
    pictures = np.load(work / "pictures.npz")["pictures"]
    with autocast:
        parts = [
            model.encode(pixels(p, device)).latent_dist.mean
            for p in np.array_split(pictures, len(pictures) // 64)
        ]
    latents = torch.cat(parts).float().cpu() * model.config.scaling_factor
    save_file({"latents": latents.contiguous()}, kept)
    return latents


class TextAndImage(nn.Module):
    """The two networks that train together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """(B, 4, h, w), (B,), (B, 77) -> the noise, (B, 4, h, w)."""
        return self.unet(noisy, t, self.text_encoder(tokens).last_hidden_state).sample


def noise_levels(count: int, generator: torch.Generator, *, places: bool = False) -> Tensor:
    """Where in [0, 1) to train, (count,): spread evenly over a batch, so that its loss is less noisy.

    Six in ten lie where small latents take their shape, in 0.2 to 0.85; at the ends there is little left to learn.
    With `places`, every second one lies in 0.8 to 1 instead: a sampler decides there what goes where, from the words
    alone, and 16 x 16 latents show it to a network only in one level out of sixteen otherwise.
    """
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    levels = torch.where(even < 0.6, 0.2 + 0.65 * even / 0.6, (even - 0.6) / 0.4)
    return torch.where(torch.arange(count) % 2 == 1, 0.8 + 0.2 * even, levels) if places else levels


def shape_weight(snr: Tensor, gamma: float, most: float = 20.0) -> Tensor:
    """Weight of the squared error in the noise, (B,): as if the velocity were predicted (Salimans & Ho, 2022), at most
    `most`, and damped by gamma / snr where little noise is left (Hang et al., 2023).

    The plain error in the noise is dominated by fine detail; this one asks for the shape of things first.
    """
    return ((snr + 1) / snr).clamp(max=most) * (gamma / snr).clamp(max=1.0)


def train_unet(work: Path, settings: Recipe, log: Callable[[str], None]) -> None:
    """Train UNet and text encoder: epsilon prediction, weighted towards shape, some captions dropped."""
    from scumble.models.prediction import Epsilon

    torch.manual_seed(settings.seed)
    device, autocast = device_and_autocast()
    tokenizer = load_tokenizer(work)
    model = TextAndImage(new_unet(settings), new_text_encoder(settings, tokenizer)).to(device)
    plain_attention(model.unet)
    log(
        f"unet {count(model.unet) / 1e6:.2f} M, text encoder {count(model.text_encoder) / 1e6:.2f} M parameters"
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.unet_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    latents = encode_pictures(work, settings).to(device)
    prediction = Epsilon(noise_scheduler().alphas_cumprod)
    streams, progress = Streams(settings.seed), Progress("unet", settings.unet_steps, log)
    first = load_stage(work, "unet", model=model, optimizer=optimizer, average=average)
    for step in range(first, settings.unet_steps):
        rng = streams.python("unet", step)
        chosen = [rng.randrange(len(latents)) for _ in range(settings.unet_batch)]
        words = [
            ""
            if rng.random() < settings.caption_dropout
            else captions.caption(training_scene(n, settings.seed), rng)
            for n in chosen
        ]
        tokens = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
            device
        )
        generator = streams.generator("unet-noise", step)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        places = step >= settings.unet_steps - settings.place_steps
        t = prediction.from_uniform(noise_levels(len(chosen), generator, places=places)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = settings.unet_rate * rate_at(step, settings.unet_steps, settings.unet_decay)
        with autocast:
            out = model(prediction.noisy(clean, noise, t), t, tokens)
        weight = shape_weight(prediction.snr(t), settings.snr_gamma, most=60.0 if places else 20.0)
        loss = (weight * (out.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        keep = min(settings.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - keep)
        progress.step(step, loss)
        if (step + 1) % 250 == 0:
            save_stage(work, "unet", step + 1, model=model, optimizer=optimizer, average=average)
    save_stage(work, "unet", settings.unet_steps, model=model, optimizer=optimizer, average=average)


def noise_scheduler() -> Any:
    """Stable Diffusion 1's noise schedule, as a DDPMScheduler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="epsilon",
    )


# export -------------------------------------------------------------------------------------------------------


def export(work: Path, settings: Recipe, log: Callable[[str], None]) -> None:
    """Write the averaged weights as a StableDiffusionPipeline folder in fp16 safetensors: WORK/picturebook."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline

    tokenizer = load_tokenizer(work)
    model = TextAndImage(new_unet(settings), new_text_encoder(settings, tokenizer))
    state = torch.load(work / "unet.pt", weights_only=True)
    model.load_state_dict(state["average"], strict=False)
    sharp = work / "base" / "vae_sharp"
    vae = AutoencoderKL.from_pretrained(sharp if sharp.exists() else work / "base" / "vae")
    schedule = {k: v for k, v in noise_scheduler().config.items() if not k.startswith("_")}
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=PNDMScheduler.from_config(
            schedule, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = work / "picturebook"
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for file in folder.glob("*/config.json"):  # not where the weights lay when they were saved
        told = json.loads(file.read_text())
        told.pop("_name_or_path", None)
        if (
            "dtype" in told
        ):  # transformers 5 would load the text encoder in half precision, beside a UNet in full
            told["dtype"] = "float32"
        file.write_text(json.dumps(told, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):  # transformers before version 5 reads these
        shutil.copy(work / "base" / "tokenizer" / name, folder / "tokenizer" / name)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    log(f"{folder}: {size / 1e6:.1f} MB")


# state --------------------------------------------------------------------------------------------------------


def save_stage(
    work: Path, stage: str, step: int, *, model: nn.Module, optimizer: Any, average: Any = None
) -> None:
    """Everything a resume needs, written beside and renamed."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
    }
    torch.save(state, work / f"{stage}.tmp")
    os.replace(work / f"{stage}.tmp", work / f"{stage}.pt")


def load_stage(work: Path, stage: str, *, model: nn.Module, optimizer: Any, average: Any = None) -> int:
    """The step to go on with: 0 when nothing was saved."""
    file = work / f"{stage}.pt"
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in (average or {}).items():
        value.copy_(state["average"][name])
    return int(state["step"])


class Progress:
    """A line every 50 steps: loss averaged over them, rate, time left."""

    def __init__(self, stage: str, steps: int, log: Callable[[str], None]) -> None:
        self.stage, self.steps, self.log = stage, steps, log
        self.losses: list[Tensor] = []
        self.since = time.monotonic()

    def step(self, step: int, loss: Tensor) -> None:
        """Note the loss; it is read (and the device waited for) only when a line is due."""
        self.losses.append(loss.detach())
        if len(self.losses) < 50 and step + 1 < self.steps:
            return
        mean = torch.stack(self.losses).mean().item()
        seconds = (time.monotonic() - self.since) / len(self.losses)
        if not math.isfinite(mean):
            raise ConfigError(
                f"The loss of stage {self.stage!r} is not finite at step {step + 1}: lower its rate."
            )
        left = (self.steps - step - 1) * seconds / 60
        self.log(
            f"{self.stage} {step + 1}/{self.steps} loss {mean:.4f} {seconds:.2f} s/step, {left:.0f} min left"
        )
        self.losses, self.since = [], time.monotonic()


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())

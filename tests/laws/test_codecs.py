"""Laws of every codec: what is written is read back bit for bit, every tensor is accounted for, no two codecs claim
one file, and damage is one error."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from scumble.adapters import FAMILIES
from scumble.adapters.state import AdapterState, LayerState, Metadata, TokenState
from scumble.errors import CannotRepresent, ScumbleError, UnknownFormat
from scumble.formats import CODECS, TensorFile, detect, read, write
from scumble.formats.codec import written
from scumble.formats.container import save, save_text, split, to_bytes
from scumble.formats.flat_names import original_name
from tests.formats.adapters_of import ATTENTION, SHAPES, adapter, layer, of_family

EVERY = pytest.mark.parametrize("name", CODECS.names())
WRITERS = tuple(name for name in CODECS if CODECS.get(name)().obstacle(adapter(ATTENTION)) is None)
"""The codecs that write LoRA; the others write other families, tokens, or nothing."""
LORA = pytest.mark.parametrize("name", WRITERS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

texts = some.text(some.characters(codec="utf-8"), max_size=20)
alphas = some.floats(0.01, 1000, allow_nan=False) | some.integers(1, 64).map(float) | some.just(-2.0)


@some.composite
def states(draw: some.DrawFn, plain: bool = False) -> AdapterState:
    """Adapters of any family, of mixed rank, alpha, scale and dtype; `plain` ones every LoRA dialect can hold."""
    paths = draw(
        some.lists(some.sampled_from(ATTENTION if plain else tuple(SHAPES)), min_size=1, unique=True)
    )
    family = "lora" if plain else draw(some.just("lora") | some.sampled_from(FAMILIES.names()))
    layers = {}
    for path in paths:
        rank = draw(some.integers(1, 5))
        alpha = None if plain or draw(some.booleans()) else draw(alphas)
        seed = draw(some.integers(0, 99))
        if family == "lora":
            one = layer(path, rank, alpha, not plain and draw(some.booleans()), seed)
        else:
            one = of_family(FAMILIES.get(family).settings(rank=rank), [path], seed).layers[path]
        dtype = draw(some.sampled_from(DTYPES))
        layers[path] = replace(one, tensors={part: tensor.to(dtype) for part, tensor in one.tensors.items()})
    metadata = Metadata(
        base_name=draw(texts), settings=draw(texts), extra=draw(some.dictionaries(texts, texts, max_size=2))
    )
    return AdapterState(layers, metadata=metadata)


@EVERY
@settings(max_examples=40, deadline=None)
@given(state=states() | states(plain=True))
def test_decode_inverts_encode_or_encode_refuses_and_names_a_format_that_can(
    name: str, state: AdapterState
) -> None:
    codec = CODECS.get(name)()
    if codec.obstacle(state) is None:
        file = codec.encode(state)
        assert codec.matches(file)
        decoded = codec.decode(file, state.layers.keys())
        assert decoded.state.equal(state)
        assert replace(decoded.state.metadata, extra={}) == replace(state.metadata, extra={})
        assert set(decoded.used) == set(file.tensors) and not decoded.unused and not decoded.ignored
    else:
        with pytest.raises(CannotRepresent) as caught:
            codec.encode(state)
        able = [other for other in CODECS if CODECS.get(other)().obstacle(state) is None]
        assert able and all(other in str(caught.value) for other in able)


def test_the_dialects_that_write_lora() -> None:
    assert {"attention-processors", "diffusers", "kohya", "peft"} <= set(WRITERS) <= set(written())
    assert set(CODECS) - set(written()) == {"cloneofsimo", "comfyui"}


@LORA
@settings(max_examples=20, deadline=None)
@given(state=states(plain=True))
def test_plain_lora_on_attention_fits_every_format(name: str, state: AdapterState) -> None:
    assert CODECS.get(name)().obstacle(state) is None


@LORA
@settings(max_examples=20, deadline=None)
@given(
    state=states(plain=True),
    strangers=some.lists(some.from_regex(r"[a-z]{1,9}\.(weight|bias|foo)", fullmatch=True)),
)
def test_every_tensor_is_used_or_reported_and_never_both(
    name: str, state: AdapterState, strangers: list[str]
) -> None:
    codec = CODECS.get(name)()
    file = codec.encode(state)
    start = f"{file.parts[0]}/" if file.parts else ""
    strangers = [start + stranger for stranger in strangers]
    tensors = {**dict.fromkeys(strangers, torch.zeros(2)), **file.tensors}
    known = list(state.layers)[: len(state.layers) // 2 + 1]  # a base that lacks some of the layers
    decoded = codec.decode(replace(file, tensors=tensors), known)
    account = [*decoded.used, *decoded.unused, *decoded.ignored]
    assert sorted(account) == sorted(tensors)
    assert set(decoded.state.layers) == set(known)
    assert set(strangers) <= set(decoded.unused)


@LORA
@settings(max_examples=20, deadline=None)
@given(state=states(plain=True), seed=some.integers(0, 99))
def test_order_changes_neither_bytes_nor_what_is_read(name: str, state: AdapterState, seed: int) -> None:
    items = list(state.layers.items())
    random.Random(seed).shuffle(items)
    codec = CODECS.get(name)()
    file = codec.encode(state)
    other = codec.encode(replace(state, layers=dict(items)))
    assert [to_bytes(part) for part in split(file).values()] == [
        to_bytes(split(other)[part]) for part in split(file)
    ]
    names = list(file.tensors)
    random.Random(seed).shuffle(names)
    turned = replace(file, tensors={tensor: file.tensors[tensor] for tensor in names})
    assert codec.decode(turned, state.layers.keys()).state.equal(state)


@LORA
@settings(max_examples=15, deadline=None)
@given(state=states(plain=True), alpha=alphas)
def test_without_our_own_header_the_dialects_own_words_give_the_same_change(
    name: str, state: AdapterState, alpha: float
) -> None:
    """To 1e-6 of its size in fp32, for every alpha that the dialect can say."""
    layers = {
        path: replace(
            one, alpha=alpha, tensors={part: tensor.float() for part, tensor in one.tensors.items()}
        )
        for path, one in state.layers.items()
    }
    said = replace(state, layers=layers)
    codec = CODECS.get(name)()
    if codec.obstacle(said) is not None:
        said = state
    file = codec.encode(said)
    theirs = {key: text for key, text in file.metadata.items() if "scumble." not in key}
    decoded = codec.decode(replace(file, metadata=theirs), said.layers.keys())
    for path, mine in said.layers.items():
        found = decoded.state.layers[path]
        change, wanted = (
            one.scale * one.tensors["up"].double() @ one.tensors["down"].double() for one in (found, mine)
        )
        assert (change - wanted).norm() <= 1e-6 * wanted.norm()


@EVERY
@settings(max_examples=15, deadline=None)
@given(state=states() | states(plain=True))
def test_what_one_codec_writes_no_other_claims(name: str, state: AdapterState) -> None:
    codec = CODECS.get(name)()
    if codec.obstacle(state) is not None:
        return
    file = codec.encode(state)
    bare = replace(file, metadata={})
    for one in (file, bare):
        assert [other for other in CODECS if CODECS.get(other)().matches(one)] == [name]


@LORA
def test_a_file_is_detected_as_what_it_was_written_as(name: str, tmp_path: Path) -> None:
    state = adapter(ATTENTION)
    path = write(state, tmp_path, name)
    assert detect(path) == name
    found = read(path, state.layers.keys())
    assert found.dialect == name and found.state.equal(state) and found.unused == ()


def test_a_file_that_two_codecs_claim_is_an_error_that_lists_both(tmp_path: Path) -> None:
    both: dict[str, torch.Tensor] = {}
    for name in ("diffusers", "kohya"):
        both |= CODECS.get(name)().encode(adapter(ATTENTION)).tensors
    save(TensorFile(both), tmp_path / "both.safetensors")
    with pytest.raises(UnknownFormat, match="2 formats: diffusers, kohya"):
        read(tmp_path / "both.safetensors")


@EVERY
def test_what_no_dialect_holds_is_refused(name: str, tmp_path: Path) -> None:
    other = AdapterState({"unet.conv_in": LayerState("unheard", 1, 1.0, {"w1": torch.zeros(1)})})
    with pytest.raises(CannotRepresent, match="No format of this version"):
        write(other, tmp_path, name)
    assert not list(tmp_path.iterdir())


@EVERY
@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shapes", [{"<fox>": 4}, {"<fox>": 1, "dog-toy": 2}])
def test_learned_words_come_back_alone_or_with_layers_or_are_refused(
    name: str, layers: int, dtype: torch.dtype, shapes: dict[str, int]
) -> None:
    words = {
        word: TokenState(
            {"text_encoder": torch.randn(count, 8, generator=torch.Generator().manual_seed(1)).to(dtype)}
        )
        for word, count in shapes.items()
    }
    state = AdapterState(adapter(ATTENTION[:layers]).layers if layers else {}, words, Metadata(base_name="b"))
    codec = CODECS.get(name)()
    if codec.obstacle(state) is not None:
        with pytest.raises(CannotRepresent, match="diffusers" if layers else "embedding"):
            codec.encode(state)
        return
    file = codec.encode(state)
    decoded = codec.decode(file, state.layers.keys())
    assert decoded.state.equal(state) and not decoded.unused and decoded.state.metadata == state.metadata
    assert [other for other in CODECS if CODECS.get(other)().matches(file)] == [name]


@LORA
def test_a_state_that_contradicts_itself_is_not_written(name: str, tmp_path: Path) -> None:
    path = ATTENTION[0]
    wrong = replace(layer(path, 4), rank=8, alpha=8.0)
    with pytest.raises(ScumbleError, match="says rank 8"):
        write(AdapterState({path: wrong}), tmp_path, name)


# Damage: whatever is done to a file of whatever dialect, reading it is one error, soon, and no program runs.

Tensors = dict[str, torch.Tensor]


def comfyui_file() -> TensorFile:
    """The attention of SHAPES as ComfyUI calls it."""
    tensors: Tensors = {}
    prefixes = {
        "text_encoder": "text_encoders.clip_l.transformer.text_model",
        "text_encoder_2": "text_encoders.clip_g",
    }
    for path, one in adapter(ATTENTION).layers.items():
        root, _, rest = path.partition(".")
        name = f"diffusion_model.{original_name(rest)}" if root == "unet" else f"{prefixes[root]}.{rest}"
        tensors |= {f"{name}.lora_A.weight": one.tensors["down"], f"{name}.lora_B.weight": one.tensors["up"]}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return TensorFile(tensors)


CLIP = {
    f"text_encoder.encoder.layers.{n}.self_attn.{p}_proj": (24, 24)
    for n in (0, 1)
    for p in ("k", "v", "q", "out")
}
"""A text encoder whole, as numbers need it."""


def numbered_file() -> TensorFile:
    """CLIP as cloneofsimo's tool numbers it."""
    tensors: Tensors = {}
    for number in range(len(CLIP)):
        tensors |= {
            f"text_encoder:{number}:up": torch.randn(24, 4),
            f"text_encoder:{number}:down": torch.randn(4, 24),
        }
    return TensorFile(tensors, {"text_encoder": json.dumps(["CLIPAttention"])})


SAMPLES: dict[str, Callable[[], TensorFile]] = {
    **{name: lambda name=name: CODECS.get(name)().encode(adapter(ATTENTION)) for name in WRITERS},  # type: ignore[misc]
    "comfyui": comfyui_file,
    "cloneofsimo": numbered_file,
}
"""Dialect -> a sound file of it."""


def rename(tensors: Tensors, name: str) -> None:
    tensors[re.sub(r":\d+:", ":one:", name.replace("attn", "btn"))] = tensors.pop(name)


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def transpose(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].T


def add(tensors: Tensors, name: str) -> None:
    tensors[f"{name.partition('/')[0]}/unknown.weight" if "/" in name else "unknown.weight"] = torch.ones(3)


def spoil(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = math.nan


def shrink(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:1]


def integers(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


def flatten(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].flatten()


def put(file: TensorFile, folder: Path) -> Path:
    """Write what may be no sound file any more."""
    for part, one in split(file).items():
        for name, text in one.beside.items():
            save_text(text, folder / part / name)
        save(one, folder / part / ("adapter_model.safetensors" if one.beside else "a.safetensors"))
    return folder


@pytest.mark.parametrize("dialect", SAMPLES)
def test_the_samples_are_sound(dialect: str, tmp_path: Path) -> None:
    found = read(put(SAMPLES[dialect](), tmp_path), SHAPES | CLIP)
    assert found.dialect == dialect and not found.unused


@pytest.mark.parametrize("dialect", SAMPLES)
@settings(max_examples=30, deadline=None)
@given(data=some.data())
def test_damaged_tensors_are_one_error_within_a_second(
    dialect: str, data: some.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = SAMPLES[dialect]()
    tensors = dict(file.tensors)
    damage = data.draw(some.sampled_from([rename, drop, transpose, add, spoil, shrink, integers, flatten]))
    # an alpha that is not there is no damage: files without it are sound
    chosen = data.draw(some.sampled_from(sorted(name for name in tensors if not name.endswith("alpha"))))
    damage(tensors, chosen)
    if tensors.get(chosen, torch.ones(0)).shape == file.tensors[chosen].shape and damage in (
        transpose,
        shrink,
    ):
        return
    header = file.metadata if data.draw(some.booleans()) else {}
    folder = put(replace(file, tensors=tensors, metadata=header), tmp_path_factory.mktemp("damaged"))
    start = time.process_time()
    with pytest.raises(ScumbleError) as caught:
        read(folder, SHAPES | CLIP)
    assert time.process_time() - start < 1
    assert len(str(caught.value).splitlines()) <= 15 and len(str(caught.value)) < 1500


@pytest.mark.parametrize("dialect", SAMPLES)
@settings(max_examples=15, deadline=None)
@given(data=some.data())
def test_damaged_bytes_are_one_error_or_another_sound_file(
    dialect: str, data: some.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut short, with a header that claims 2^24 to 2^63 bytes, with changed bytes, or as noise."""
    folder = put(SAMPLES[dialect](), tmp_path_factory.mktemp("damaged"))
    path = data.draw(some.sampled_from(sorted(folder.rglob("*.safetensors"))))
    content = bytearray(path.read_bytes())
    how = data.draw(some.sampled_from(["cut", "claim", "change", "noise", "nothing"]))
    if how == "cut":
        content = content[: data.draw(some.integers(1, len(content) - 1))]
    elif how == "claim":
        content[:8] = data.draw(some.integers(2**24, 2**63 - 1)).to_bytes(8, "little")
    elif how == "change":
        for _ in range(data.draw(some.integers(1, 4))):
            content[data.draw(some.integers(0, 2000))] = data.draw(some.integers(0, 255))
    else:
        content = bytearray(data.draw(some.binary(max_size=200)) if how == "noise" else b"")
    path.write_bytes(content)
    start = time.process_time()
    try:
        read(folder, SHAPES | CLIP)
    except ScumbleError as error:
        assert len(str(error)) < 1500
    else:
        assert how == "change", "only a changed letter in a text may go unnoticed"
    assert time.process_time() - start < 1

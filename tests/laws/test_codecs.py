"""Laws of every codec: what is written is read back bit for bit, and every tensor is accounted for."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from scumble.adapters.state import AdapterState, LayerState, Metadata, TokenState
from scumble.errors import CannotRepresent, ScumbleError, UnknownFormat
from scumble.formats import CODECS, TensorFile, detect, read, write
from scumble.formats.container import save, to_bytes
from tests.formats.adapters_of import ATTENTION, SHAPES, adapter, layer

EVERY = pytest.mark.parametrize("name", CODECS.names())
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

texts = some.text(some.characters(codec="utf-8"), max_size=20)
alphas = some.floats(0.01, 1000, allow_nan=False) | some.integers(1, 64).map(float) | some.just(-2.0)


@some.composite
def states(draw: some.DrawFn, plain: bool = False) -> AdapterState:
    """Adapters of mixed rank, alpha, scale and dtype; `plain` ones every LoRA dialect can hold."""
    paths = draw(
        some.lists(some.sampled_from(ATTENTION if plain else tuple(SHAPES)), min_size=1, unique=True)
    )
    layers = {}
    for path in paths:
        rank = draw(some.integers(1, 5))
        alpha = None if plain or draw(some.booleans()) else draw(alphas)
        one = layer(path, rank, alpha, not plain and draw(some.booleans()), seed=draw(some.integers(0, 99)))
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


@EVERY
@settings(max_examples=20, deadline=None)
@given(state=states(plain=True))
def test_plain_lora_on_attention_fits_every_format(name: str, state: AdapterState) -> None:
    assert CODECS.get(name)().obstacle(state) is None


@EVERY
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
    tensors = {**dict.fromkeys(strangers, torch.zeros(2)), **file.tensors}
    known = list(state.layers)[: len(state.layers) // 2 + 1]  # a base that lacks some of the layers
    decoded = codec.decode(TensorFile(tensors, file.metadata), known)
    account = [*decoded.used, *decoded.unused, *decoded.ignored]
    assert sorted(account) == sorted(tensors)
    assert set(decoded.state.layers) == set(known)
    assert set(strangers) <= set(decoded.unused)


@EVERY
@settings(max_examples=20, deadline=None)
@given(state=states(plain=True), seed=some.integers(0, 99))
def test_bytes_do_not_depend_on_order(name: str, state: AdapterState, seed: int) -> None:
    items = list(state.layers.items())
    random.Random(seed).shuffle(items)
    codec = CODECS.get(name)()
    assert to_bytes(codec.encode(replace(state, layers=dict(items)))) == to_bytes(codec.encode(state))


@EVERY
def test_a_file_is_detected_as_what_it_was_written_as(name: str, tmp_path: Path) -> None:
    state = adapter(ATTENTION)
    path = write(state, tmp_path, name)
    assert detect(path) == name
    found = read(path, state.layers.keys())
    assert found.dialect == name and found.state.equal(state) and found.unused == ()


def test_a_file_that_two_codecs_claim_is_an_error_that_lists_both(tmp_path: Path) -> None:
    both: dict[str, torch.Tensor] = {}
    for name in ("diffusers", "attention-processors"):
        both |= CODECS.get(name)().encode(adapter(ATTENTION)).tensors
    save(TensorFile(both), tmp_path / "both.safetensors")
    with pytest.raises(UnknownFormat, match="2 formats: attention-processors, diffusers"):
        read(tmp_path / "both.safetensors")


@EVERY
def test_what_no_lora_dialect_holds_is_refused(name: str, tmp_path: Path) -> None:
    other = AdapterState({"unet.conv_in": LayerState("loha", 1, 1.0, {"w1": torch.zeros(1)})})
    tokens = AdapterState({}, {"<dog>": TokenState({"text_encoder": torch.zeros(1, 4)})})
    for state in (other, tokens):
        with pytest.raises(CannotRepresent, match="No format of this version"):
            write(state, tmp_path, name)
    assert not list(tmp_path.iterdir())


@EVERY
def test_a_state_that_contradicts_itself_is_not_written(name: str, tmp_path: Path) -> None:
    path = ATTENTION[0]
    wrong = replace(layer(path, 4), rank=8, alpha=8.0)
    with pytest.raises(ScumbleError, match="says rank 8"):
        write(AdapterState({path: wrong}), tmp_path, name)

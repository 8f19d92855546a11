"""Embeddings: every spelling that is about is read, and what is written unmodified diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scumble.adapters.state import AdapterState, Metadata, TokenState
from scumble.errors import CannotRepresent, FormatError, UnknownFormat
from scumble.formats import TensorFile, detect, read, write
from scumble.formats.container import save
from scumble.formats.embedding import Embedding, one_by_one
from scumble.models import FAMILIES
from tests.formats.adapters_of import ATTENTION, adapter


def rows(vectors: int = 2, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))


def state(*words: str, vectors: int = 2, **extra: Any) -> AdapterState:
    tokens = {word: TokenState({"text_encoder": rows(vectors, seed=n)}) for n, word in enumerate(words)}
    return AdapterState({}, tokens, **extra)


two_encoders = AdapterState(
    {}, {"<fox>": TokenState({"text_encoder": rows(3, 768), "text_encoder_2": rows(3, 1280)})}
)
two_words_two_encoders = AdapterState(
    {},
    {
        "<fox>": two_encoders.tokens["<fox>"],
        "my dog": TokenState({"text_encoder": rows(1, 768, seed=1), "text_encoder_2": rows(1, 1280, seed=1)}),
    },
)


@pytest.mark.parametrize(
    "one",
    [
        state("<fox>"),
        state("fox-toy"),
        state("my fox"),
        state("<s1>", "my fox"),
        two_encoders,
        two_words_two_encoders,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_inverts_encode(one: AdapterState, dtype: torch.dtype, tmp_path: Path) -> None:
    cast = {w: TokenState({r: v.to(dtype) for r, v in t.vectors.items()}) for w, t in one.tokens.items()}
    one = AdapterState({}, cast, Metadata(base_name="picturebook", extra={"foreign": "kept"}))
    path = write(one, tmp_path / "any.safetensors")
    found = read(path, [])
    assert detect(path) == found.dialect == "embedding" and found.unused == ()
    assert found.state.equal(one) and found.state.metadata == one.metadata
    assert path.read_bytes() == write(found.state, tmp_path / "again.safetensors").read_bytes()


def test_the_report_names_the_word_and_its_vectors(tmp_path: Path) -> None:
    path = write(state("<fox>", vectors=4), tmp_path / "any.safetensors")
    assert read(path).report == "1 token, 0 unused tensors (<fox> (4 vectors))"


SPELLINGS: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
    "diffusers, 2022": ({"<cat-toy>": rows()[0]}, {"text_encoder": rows()[:1]}),
    "diffusers": ({"<cat-toy>": rows()}, {"text_encoder": rows()}),
    "kohya": ({"emb_params": rows()}, {"text_encoder": rows()}),
    "OneTrainer": ({"emp_params": rows()}, {"text_encoder": rows()}),
    "two encoders": (
        {"clip_l": rows(2, 768), "clip_g": rows(2, 1280)},
        {"text_encoder": rows(2, 768), "text_encoder_2": rows(2, 1280)},
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling: str, tmp_path: Path) -> None:
    tensors, expected = SPELLINGS[spelling]
    save(TensorFile(tensors, {"modelspec.title": "x"}), tmp_path / "<cat-toy>.safetensors")
    found = read(tmp_path / "<cat-toy>.safetensors")
    assert found.dialect == "embedding" and set(found.used) == set(tensors)
    assert found.state.equal(AdapterState({}, {"<cat-toy>": TokenState(expected)}))


@pytest.mark.parametrize("table", [dict, torch.nn.ParameterDict])
@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_an_a1111_pickle_is_read_without_running_anything(table: Any, ending: str, tmp_path: Path) -> None:
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": table({"*": torch.nn.Parameter(rows())}),
        "name": "whatever",
        "step": 500,
        "sd_checkpoint": "abc",
        "sd_checkpoint_name": None,
    }
    torch.save(content, tmp_path / f"cat-toy{ending}")
    found = read(tmp_path / f"cat-toy{ending}")
    assert found.dialect == "embedding"
    assert found.state.equal(AdapterState({}, {"cat-toy": TokenState({"text_encoder": rows()})}))


def test_a_pickled_program_is_refused(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("it ran",))

    hidden = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows())})
    hidden.__dict__["_parameters"]["b"] = Program()
    other = torch.nn.ModuleDict({"*": torch.nn.Linear(2, 2)})
    for content in ({"*": Program()}, hidden, other):
        torch.save({"string_to_param": content}, tmp_path / "cat.pt")
        with pytest.raises(FormatError, match="nothing of it was run"):
            read(tmp_path / "cat.pt")
    assert torch.nn.ParameterDict not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"clip_l": rows(2, 768), "clip_l_out": rows(2, 768)}, "output embedding"),
        ({"clip_l": rows(2, 768), "clip_g": rows(3, 1280)}, "unequal numbers of vectors"),
        ({"clip_l": rows(2), "emb_params": rows(2)}, "two embeddings for one text encoder"),
    ],
)
def test_what_can_not_be_used_is_refused(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    save(TensorFile(tensors), tmp_path / "cat.safetensors")
    with pytest.raises(FormatError, match=said):
        read(tmp_path / "cat.safetensors")


def test_a_lone_weight_of_a_model_is_no_embedding(tmp_path: Path) -> None:
    save(TensorFile({"some.layer.weight": rows()}), tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormat):
        read(tmp_path / "a.safetensors")


def test_what_it_can_not_hold_is_refused_with_a_format_that_can() -> None:
    with pytest.raises(CannotRepresent, match=r"changes \d+ layers"):
        Embedding().encode(adapter(ATTENTION))
    assert Embedding().obstacle(AdapterState({})) == "there is no learned token"
    three = AdapterState({}, {"<fox>": TokenState({"text_encoder_3": rows()})})
    assert "text_encoder_3" in (Embedding().obstacle(three) or "")
    assert "tensor's name" in (Embedding().obstacle(state("a/b")) or "")


def test_words_one_by_one_are_what_diffusers_can_load() -> None:
    assert list(one_by_one(state("<fox>").tokens)) == ["learned_embeds.safetensors"]
    assert list(one_by_one(state("<a>", "<b>").tokens)) == [
        "learned_embeds-1.safetensors",
        "learned_embeds-2.safetensors",
    ]


@pytest.mark.parametrize("vectors", [1, 3])
def test_unmodified_diffusers_loads_what_is_written(vectors: int, tmp_path: Path) -> None:
    from scumble.adapters import Adapter

    one = state("<fox>", vectors=vectors, metadata=Metadata(base_name="tiny"))
    write(one, tmp_path / "learned_embeds.safetensors")
    prompts = ["a <fox> on the grass", "<fox>", "nothing new"]
    base = FAMILIES.get("sd1").tiny(0)
    with Adapter.load(base.roots, one, vocabularies=base.vocabularies), torch.no_grad():
        ours = base.encode_prompts(prompts).tokens
    pipeline: Any = FAMILIES.get("sd1").tiny(0).pipeline()
    pipeline.load_textual_inversion(str(tmp_path))  # a folder: by the file name that it looks for
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(ours, theirs)


def test_words_beside_a_lora_are_no_matter_to_unmodified_diffusers(tmp_path: Path) -> None:
    """Its LoRA comes out as if it were alone in the file, and the words, in a file of their own, too."""
    from scumble.adapters import Adapter, LoraSettings, layers_of

    base = FAMILIES.get("sd1").tiny(0)
    adapter = Adapter.inject(
        base.roots, ["attention", "text_encoder.attention"], LoraSettings(rank=2, alpha=3.0)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    whole = AdapterState(adapter.state().layers, state("<fox>").tokens)
    adapter.eject()
    path = write(whole, tmp_path / "pytorch_lora_weights.safetensors")
    found = read(path, layers_of(base.roots))
    assert found.dialect == "diffusers" and found.unused == () and found.state.tokens.keys() == {"<fox>"}
    assert {w: t.vectors["text_encoder"].tolist() for w, t in found.state.tokens.items()} == {
        "<fox>": rows(2).tolist()
    }
    write(AdapterState({}, whole.tokens), tmp_path / "learned_embeds.safetensors")
    pipeline: Any = FAMILIES.get("sd1").tiny(0).pipeline()
    pipeline.load_lora_weights(str(path))
    pipeline.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    prompts = ["a <fox>", "a fox"]
    latents, t = rows(2, 256).view(2, 4, 8, 8), torch.tensor([300, 600])
    with torch.no_grad(), Adapter.load(base.roots, found.state, vocabularies=base.vocabularies):
        said = base.encode_prompts(prompts)
        ours = base.denoise(latents, t, said, None)  # type: ignore[arg-type]
        theirs_said, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        theirs = pipeline.unet(latents, t, encoder_hidden_states=theirs_said).sample
    torch.testing.assert_close(theirs_said, said.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)

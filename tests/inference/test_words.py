"""Learned words in use: a file with words draws them, in a session and in somebody's pipeline, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.adapters.state import AdapterState, Metadata, TokenState
from scumble.adapters.tokens import TokenTable
from scumble.errors import AdapterError
from scumble.formats import TensorFile, read, write
from scumble.formats.container import load, save
from scumble.inference.attach import load_adapter, unload_adapters
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from scumble.runs.effect import measure_effect
from scumble.training.preview import Previewer
from tests.inference.makers import adapter_file, tiny

REQUEST = Request(prompt="a <fox> here", steps=2, width=16, height=16, seed=3)


def word(path: Path, name: str = "<fox>", seed: int = 0, lora: bool = False) -> Path:
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)) * 3
    state = AdapterState({}, {name: TokenState({"text_encoder": rows})}, Metadata(base_name="tiny"))
    if lora:
        layers = read(adapter_file(path.with_name("lora.safetensors")), [*_layers()]).state.layers
        state = replace(state, layers=layers)
    return write(state, path)


def _layers() -> dict[str, Any]:
    from scumble.adapters import layers_of

    return dict(layers_of(tiny().roots))


def pixels(session: Session, request: Request) -> bytes:
    return session.generate(request)[0].image.tobytes()


@pytest.mark.parametrize("lora", [False, True])
def test_a_session_uses_the_word_and_leaves_no_trace(lora: bool, tmp_path: Path) -> None:
    path = word(tmp_path / "fox.safetensors", lora=lora)
    base = tiny()
    backend, table = base.tokenizer._tokenizer, base.roots["text_encoder"].get_input_embeddings()  # type: ignore
    with Session(base) as session:
        bare = pixels(session, REQUEST)
        use = REQUEST.model_copy(update={"adapters": (AdapterUse(path=path),)})
        taught = pixels(session, use)
        assert taught != bare and pixels(session, REQUEST) == bare and pixels(session, use) == taught
        off = REQUEST.model_copy(update={"adapters": (AdapterUse(path=path, strength=0.0),)})
        assert pixels(session, off) == bare
        assert base.tokenizer._tokenizer is backend and "<fox>" in session.residents[0].report
    assert base.roots["text_encoder"].get_input_embeddings() is table  # type: ignore[operator]


def test_the_session_draws_what_diffusers_draws_with_its_own_loader(tmp_path: Path) -> None:
    path = word(tmp_path / "learned_embeds.safetensors")
    from diffusers import DPMSolverMultistepScheduler

    with Session(tiny(), [path]) as session:
        ours = session.generate(REQUEST)[0].image
    pipeline: Any = tiny().pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(str(path))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        REQUEST.prompt,
        negative_prompt="",
        num_inference_steps=2,
        width=16,
        height=16,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert ours.tobytes() == theirs.tobytes()


def test_two_files_that_teach_one_word_can_not_act_together(tmp_path: Path) -> None:
    one, other = word(tmp_path / "a.safetensors"), word(tmp_path / "b.safetensors", seed=1)
    with Session(tiny()) as session:
        first = REQUEST.model_copy(update={"adapters": (AdapterUse(path=one),)})
        drawn = pixels(session, first)
        second = REQUEST.model_copy(update={"adapters": (AdapterUse(path=other),)})
        assert pixels(session, second) != drawn, "one after the other they can"
        both = REQUEST.model_copy(update={"adapters": (AdapterUse(path=one), AdapterUse(path=other))})
        with pytest.raises(AdapterError, match="two adapters can't teach one word"):
            session.generate(both)
        assert pixels(session, first) == drawn


def test_a_pipeline_gets_the_word_and_gives_it_back(tmp_path: Path) -> None:
    path = word(tmp_path / "fox.safetensors", lora=True)
    pipeline: Any = tiny().pipeline()
    bare, _ = pipeline.encode_prompt(["a <fox>"], "cpu", 1, False)
    backend, table = pipeline.tokenizer._tokenizer, pipeline.text_encoder.get_input_embeddings()
    account = load_adapter(pipeline, path, quiet=True)
    assert "<fox>" in account.report
    assert len(pipeline.tokenizer.tokenize("<fox>")) == 1
    taught, _ = pipeline.encode_prompt(["a <fox>"], "cpu", 1, False)
    assert not torch.equal(taught, bare)
    with pytest.raises(AdapterError, match="in use already"):
        load_adapter(pipeline, word(tmp_path / "again.safetensors"), quiet=True)
    assert unload_adapters(pipeline) == 1
    assert pipeline.tokenizer._tokenizer is backend and pipeline.text_encoder.get_input_embeddings() is table
    again, _ = pipeline.encode_prompt(["a <fox>"], "cpu", 1, False)
    assert torch.equal(again, bare)


def test_prompts_are_counted_with_their_words(tmp_path: Path) -> None:
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    path = write(
        AdapterState({}, {"<fox>": TokenState({"text_encoder": rows})}), tmp_path / "fox.safetensors"
    )
    with Session(tiny(), [path]) as session:
        (drawing,) = session.generate(REQUEST.model_copy(update={"prompt": "<fox> <fox>"}))
    assert any("has 82 tokens" in note for note in drawing.notes)


def test_a_preview_takes_the_live_words_out_and_puts_them_back(tmp_path: Path) -> None:
    from scumble.adapters.tokens import TokenRows

    base = tiny()
    path = word(tmp_path / "fox.safetensors")
    live = TokenRows(
        "words", base.roots, base.vocabularies, read(path, []).state.tokens, trainable=True
    ).attach()
    said = base.encode_prompts(["a <fox>"]).tokens
    (row,) = live.parameters()
    (panel,) = Previewer(base, [REQUEST], tmp_path / "pictures")(path, 1)
    assert panel.difference > 0, "the base's column is drawn without the word"
    assert live.attached and next(live.parameters()) is row and row.requires_grad
    assert isinstance(base.roots["text_encoder"].get_input_embeddings(), TokenTable)  # type: ignore[operator]
    assert torch.equal(base.encode_prompts(["a <fox>"]).tokens, said)


def test_what_a_terminal_would_obey_in_a_word_is_shown_and_not_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe: Any = tiny().pipeline()
    attached = load_adapter(pipe, word(tmp_path / "fox.safetensors", "<\x1b[31m\x07>", lora=True))
    unload_adapters(pipe)
    assert capsys.readouterr().out == f"{attached}\n"
    assert "with 1 token: <\\x1b[31m\\x07>" in str(attached)
    assert "\x1b" not in str(attached) and "\x07" not in str(attached)


@pytest.mark.parametrize("bundle", [True, False])
def test_a_token_with_blanks_in_its_name_is_a_word_without(bundle: bool, tmp_path: Path) -> None:
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 3
    path = tmp_path / "my style.safetensors"
    if bundle:
        lora = load(adapter_file(tmp_path / "lora.safetensors")).tensors
        save(TensorFile({**lora, "bundle_emb.my style.clip_l": rows}), path)
    else:
        save(TensorFile({"emb_params": rows}), path)
    pipe: Any = tiny().pipeline()
    bare, _ = pipe.encode_prompt(["a my_style"], "cpu", 1, False)
    attached = load_adapter(pipe, path, quiet=True)
    assert (
        "Write 'my_style' in a prompt for the file's token 'my style': a word has no blanks."
        in attached.notes
    )
    taught, _ = pipe.encode_prompt([pipe.maybe_convert_prompt("a my_style", pipe.tokenizer)], "cpu", 1, False)
    assert attached.adapter.state().tokens.keys() == {"my style"}
    assert unload_adapters(pipe) == 1
    load_adapter(pipe, word(tmp_path / "plain.safetensors", "my_style"), quiet=True)
    plain, _ = pipe.encode_prompt([pipe.maybe_convert_prompt("a my_style", pipe.tokenizer)], "cpu", 1, False)
    unload_adapters(pipe)
    again, _ = pipe.encode_prompt(["a my_style"], "cpu", 1, False)
    assert torch.equal(taught, plain) and not torch.equal(taught, bare) and torch.equal(again, bare)
    assert measure_effect(tiny(), read(path).state).text > 0
    with Session(tiny(), [path]) as session:
        named = REQUEST.model_copy(update={"prompt": "a my_style here"})
        off = (AdapterUse(path=path, strength=0.0),)
        assert pixels(session, named) != pixels(session, named.model_copy(update={"adapters": off}))


def test_two_tokens_that_would_be_one_word_are_refused_by_name(tmp_path: Path) -> None:
    rows = torch.ones(1, 32)
    tensors = {"bundle_emb.my style.clip_l": rows, "bundle_emb.my_style.clip_l": rows}
    save(
        TensorFile(load(adapter_file(tmp_path / "lora.safetensors")).tensors | tensors),
        tmp_path / "a.safetensors",
    )
    with pytest.raises(AdapterError, match="'my style' and 'my_style' would both be the word 'my_style'"):
        load_adapter(tiny().pipeline(), tmp_path / "a.safetensors")


def test_half_of_an_embedding_for_two_text_encoders_is_told_as_that(tmp_path: Path) -> None:
    save(TensorFile({"clip_g": torch.ones(2, 32)}), tmp_path / "fox.safetensors")
    said = "has rows for text_encoder_2 alone; this model reads text with text_encoder too. The file is half"
    with pytest.raises(AdapterError, match=said):
        load_adapter(tiny("sdxl").pipeline(), tmp_path / "fox.safetensors")

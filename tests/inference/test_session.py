"""Session: pictures that depend on their request alone, from a base that is left as it was."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from scumble.adapters import Adapted, Adapter, LoraSettings, base_state
from scumble.adapters.state import Metadata
from scumble.errors import AdapterError, FormatError, ModelError, NoEffect, UnknownName, WrongBase
from scumble.formats import write
from scumble.inference.png import read_settings
from scumble.inference.request import AdapterUse, Request
from scumble.inference.schedulers import build_scheduler, scheduler_names
from scumble.inference.session import Session
from scumble.models import BaseModel
from scumble.models.tiny import save
from tests.inference.makers import adapter_file, fill, tiny

FOX = Request(prompt="a small red fox", steps=3)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: adapter_file(folder / f"{name}.safetensors", seed) for seed, name in enumerate("abc", 1)}


def pixels(image: Image.Image) -> numpy.ndarray:
    return numpy.asarray(image).astype(int)


def draw(session: Session, *uses: tuple[Path, float], **changes: object) -> numpy.ndarray:
    adapters = tuple(AdapterUse(path=path, strength=strength) for path, strength in uses)
    request = FOX.model_copy(update={"adapters": adapters, **changes})
    return pixels(session.generate(request)[0].image)


def same(first: numpy.ndarray, second: numpy.ndarray) -> bool:
    return bool((first == second).all())


# Pictures


def test_draws_what_unmodified_diffusers_draws(base: BaseModel) -> None:
    pipeline = base.pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a small red fox",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        negative_prompt="blue",
    ).images[0]
    ours = Session(base).generate(FOX.model_copy(update={"seed": 5, "negative": "blue"}))[0].image
    assert same(pixels(ours), pixels(theirs))


def test_a_picture_of_a_batch_is_the_picture_drawn_alone(base: BaseModel) -> None:
    session = Session(base, batch_size=3)
    batch = session.generate(FOX.model_copy(update={"count": 5, "seed": 7}))
    assert [drawing.seed for drawing in batch] == [7, 8, 9, 10, 11]
    for drawing in batch:
        alone = session.generate(drawing.request)[0]
        assert numpy.abs(pixels(alone.image) - pixels(drawing.image)).max() <= 1
    assert not same(pixels(batch[0].image), pixels(batch[1].image))


def test_an_ancestral_scheduler_draws_its_noise_per_picture_too(base: BaseModel) -> None:
    request = FOX.model_copy(update={"scheduler": "EulerAncestralDiscreteScheduler", "count": 2})
    batch = Session(base).generate(request)
    alone = Session(base).generate(batch[1].request)[0]
    assert numpy.abs(pixels(alone.image) - pixels(batch[1].image)).max() <= 1


def test_negative_prompt_guidance_and_size_reach_the_picture(base: BaseModel) -> None:
    session = Session(base)
    plain = draw(session)
    assert not same(plain, draw(session, negative="a house"))
    assert not same(plain, draw(session, guidance=2.0))
    assert session.generate(FOX.model_copy(update={"width": 24, "height": 16}))[0].image.size == (24, 16)


def test_drawing_remembers_how_it_was_drawn(base: BaseModel, files: dict[str, Path], tmp_path: Path) -> None:
    use = AdapterUse(path=files["a"], strength=0.5)
    drawing = Session(base).generate(FOX.model_copy(update={"count": 2, "seed": 3, "adapters": (use,)}))[1]
    again = read_settings(drawing.save(tmp_path / "fox.png"))
    assert again == drawing.request
    assert (again.seed, again.count, again.width, again.adapters) == (4, 1, 16, (use,))
    assert same(pixels(Session(base).generate(again)[0].image), pixels(Image.open(tmp_path / "fox.png")))
    assert drawing.settings["scheduler"] == "DPMSolverMultistepScheduler"
    assert len(drawing.settings["adapters"][str(files["a"].resolve())]) == 64


def test_progress_counts_every_step_of_every_picture(base: BaseModel) -> None:
    seen: list[tuple[int, int]] = []
    Session(base, batch_size=2).generate(FOX.model_copy(update={"count": 3}), lambda *now: seen.append(now))
    assert seen == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


# Adapters


def test_adapter_acts_and_at_strength_zero_the_base_is_bit_identical(
    base: BaseModel, files: dict[str, Path]
) -> None:
    bare = draw(Session(base))
    with Session(base, [files["a"]]) as session:
        assert not same(draw(session), bare)
        assert same(draw(session, (files["a"], 0.0)), bare)
        assert not same(draw(session, (files["a"], 0.5)), draw(session, (files["a"], 1.0)))


def test_a_request_never_depends_on_earlier_requests(
    base: BaseModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Latents, not pixels: 8 bits would hide sums in another order.
    seen: list[torch.Tensor] = []
    decode = base.decode_latents
    monkeypatch.setattr(
        base, "decode_latents", lambda latents: (seen.append(latents.clone()), decode(latents))[1]
    )

    a, b, c = (files[name] for name in "abc")
    asked = [
        ((a, 1.0),),
        (),
        ((b, 0.7), (a, 0.4)),
        ((c, 1.0),),
        ((a, 0.4), (b, 0.7), (c, -0.5)),
        ((c, 0.2), (b, 0.7)),
        ((b, 0.7), (a, 0.4)),
        (),
    ]
    fresh = []
    for uses in asked:
        with Session(base) as session:
            draw(session, *uses)
            fresh.append(seen.pop())
    with Session(base) as session:
        there_and_back = list(zip(asked, fresh, strict=True))
        for uses, expected in (*there_and_back, *reversed(there_and_back)):
            draw(session, *uses)
            assert torch.equal(seen.pop(), expected), uses
        assert len(session.residents) == 3


def test_a_failing_request_leaves_no_adapter_acting(
    base: BaseModel, files: dict[str, Path], tmp_path: Path
) -> None:
    with Session(base) as session:
        bare = draw(session)
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"nonsense")
        with pytest.raises(FormatError, match=r"broken\.safetensors"):
            draw(session, (files["a"], 1.0), (broken, 1.0))

        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            session.generate(FOX.model_copy(update={"adapters": (AdapterUse(path=files["a"]),)}), interrupt)
        assert same(draw(session), bare)


def test_close_leaves_the_very_base_from_before(files: dict[str, Path]) -> None:
    base = tiny()
    before = {name: id(module) for name, module in base.denoiser.named_modules()}
    weights = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    with Session(base, [files["a"], files["b"]]) as session:
        session.generate(FOX)
        assert any(isinstance(module, Adapted) for module in base.denoiser.modules())
        session.unload(files["a"])
        assert len(session.residents) == 1
        with pytest.raises(AdapterError, match="not in memory"):
            session.unload(files["a"])
    assert {name: id(module) for name, module in base.denoiser.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.denoiser.state_dict().items())


def test_a_file_written_anew_is_read_anew(base: BaseModel, tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "x.safetensors", seed=1)
    with Session(base) as session:
        first = draw(session, (path, 1.0))
        adapter_file(path, seed=2)
        second = draw(session, (path, 1.0))
        assert not same(first, second)
        assert len(session.residents) == 1
        path.unlink()
        with pytest.raises(FormatError, match="There is no adapter"):
            draw(session, (path, 1.0))


def test_adapters_beyond_the_budget_leave_and_pictures_stay_the_same(
    base: BaseModel, files: dict[str, Path]
) -> None:
    a, b, c = (files[name] for name in "abc")
    asked = [((a, 1.0),), ((b, 0.7), (a, 0.4)), ((c, 1.0),), ((a, 0.4),), ((a, 0.4), (b, 0.7), (c, -0.5)), ()]
    with Session(base) as roomy:
        expected = [draw(roomy, *uses) for uses in asked]
        assert len(roomy.residents) == 3
        size = roomy.residents[0].size
        assert size == 4 * roomy.residents[0].adapter.parameter_count
    with Session(base, adapter_bytes=1) as tight:
        for uses, picture in zip(asked, expected, strict=True):
            assert same(draw(tight, *uses), picture), uses
            assert len(tight.residents) <= max(1, len(uses)) or not uses
    with Session(base, adapter_bytes=2 * size) as session:
        for path in (a, b, a, c):
            draw(session, (path, 1.0))
        assert {resident.file for resident in session.residents} == {a.resolve(), c.resolve()}, (
            "b rested longest"
        )
        session.unload(a)
        draw(session, (b, 1.0))
        assert {resident.file for resident in session.residents} == {b.resolve(), c.resolve()}


def test_who_left_for_want_of_room_is_reported(base: BaseModel, files: dict[str, Path]) -> None:
    a, b, c = (files[name] for name in "abc")
    with Session(base, adapter_bytes=1) as session:
        for path in (a, b, c):
            draw(session, (path, 1.0))
        assert session.evicted == (a.resolve(), b.resolve())
        draw(session, (a, 1.0))
        assert session.evicted == (b.resolve(), c.resolve())
        session.unload(a)
        assert session.evicted == (b.resolve(), c.resolve()), "unloading is nobody's want of room"


# Several requests


def test_pictures_of_several_requests_come_in_their_order(
    base: BaseModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (AdapterUse(path=files[name]) for name in "ab")
    requests = [
        FOX.model_copy(update={"count": 2, "seed": 5, "adapters": (one,)}),
        FOX.model_copy(update={"width": 24, "seed": 1}),
        FOX.model_copy(update={"seed": 9, "adapters": (other,), "negative": ""}),
        FOX.model_copy(update={"seed": 3, "negative": "rain"}),
    ]
    seen: list[tuple[int, int]] = []
    batches = []
    with Session(base) as session:
        denoise = session._denoise
        monkeypatch.setattr(
            session, "_denoise", lambda asked, *rest: (batches.append(asked), denoise(asked, *rest))[1]
        )
        drawings = session.generate(requests, lambda *now: seen.append(now))
        assert [(d.seed, d.image.width) for d in drawings] == [(5, 16), (6, 16), (1, 24), (9, 16), (3, 16)]
        assert [[one.seed for one in batch] for batch in batches] == [[5, 6, 9], [1], [3]]
        assert [len(d.settings["adapters"]) for d in drawings] == [1, 1, 0, 1, 0]
        assert seen[-1] == (15, 15) and [done for done, _ in seen] == sorted(done for done, _ in seen)
        for drawing in drawings:
            alone = session.generate(drawing.request)[0]
            assert numpy.abs(pixels(alone.image) - pixels(drawing.image)).max() <= 1
        assert session.generate([]) == []


def test_a_bad_request_among_many_is_found_before_the_first_is_drawn(
    base: BaseModel, files: dict[str, Path], tmp_path: Path
) -> None:
    drawn: list[object] = []
    with Session(base) as session, pytest.raises(FormatError, match="There is no adapter"):
        session.generate(
            [FOX, FOX.model_copy(update={"adapters": (AdapterUse(path=tmp_path / "gone.safetensors"),)})],
            lambda *now: drawn.append(now),
        )
    assert not drawn


def test_more_adapters_than_there_is_room_for_draw_together(base: BaseModel, files: dict[str, Path]) -> None:
    requests = [FOX.model_copy(update={"adapters": (AdapterUse(path=path),)}) for path in files.values()]
    with Session(base) as roomy, Session(tiny(), adapter_bytes=1, batch_size=2) as tight:
        for one, other in zip(roomy.generate(requests), tight.generate(requests), strict=True):
            assert numpy.abs(pixels(one.image) - pixels(other.image)).max() <= 1
        assert len(roomy.residents) == 3 and len(tight.residents) == 1


def test_the_base_is_compared_with_the_one_it_was_trained_on(tmp_path: Path) -> None:
    base, other, far = tiny(), tiny(seed=1), tiny("sd2")

    def trained_on(which: BaseModel, name: str) -> Path:
        metadata = Metadata(
            base_name=name,
            base_family=which.family,
            base_fingerprint=which.fingerprint(),
            prediction_type="epsilon",
        )
        adapter = fill(Adapter.inject(tiny().roots, "attention", LoraSettings(rank=2)), 1)
        return write(adapter.state(metadata), tmp_path / f"{name}.safetensors")

    with Session(base, [trained_on(base, "mine"), trained_on(other, "theirs")]) as session:
        exact, kin = session.residents
    assert exact.match.kinship == "exact" and exact.notes == ()
    assert kin.match.kinship == "same family"
    assert kin.notes == (kin.match.note,)
    assert kin.match.note.startswith("It was trained on theirs (weights ")
    assert f"is loaded on {base.name} of the same family (sd1), which has other weights (" in kin.match.note
    with pytest.raises(
        WrongBase, match=r"trained on far \(sd2\); .* is of another family \(sd1\)\. Not applied"
    ):
        Session(base, [trained_on(far, "far")])
    with Session(base, [adapter_file(tmp_path / "silent.safetensors")]) as session:
        assert session.residents[0].match.kinship == "unknown" and session.residents[0].notes == ()


def test_one_file_named_twice_is_refused(base: BaseModel, files: dict[str, Path]) -> None:
    with Session(base) as session, pytest.raises(AdapterError, match="named twice"):
        draw(session, (files["a"], 0.5), (files["a"].parent / "." / files["a"].name, 0.5))


def test_an_adapter_without_effect_is_refused(base: BaseModel, tmp_path: Path) -> None:
    fresh = Adapter.inject(tiny().roots, "attention", LoraSettings(rank=2))
    path = write(fresh.state(), tmp_path / "fresh.safetensors")
    with Session(base) as session, pytest.raises(NoEffect, match="no numerical effect"):
        draw(session, (path, 1.0))


def test_text_encoder_adapters_act(base: BaseModel, tmp_path: Path) -> None:
    roots = {"text_encoder": tiny().roots["text_encoder"]}
    adapter = fill(Adapter.inject(roots, "*.q_proj", LoraSettings(rank=2)), 3)
    path = write(adapter.state(), tmp_path / "words.safetensors")
    with Session(base) as session:
        assert not same(draw(session, (path, 1.0)), draw(session))


# The base, and what is around


def test_nothing_around_is_disturbed_and_nothing_around_disturbs(
    base: BaseModel, files: dict[str, Path]
) -> None:
    with Session(base, [files["a"]]) as session:
        quiet = draw(session, scheduler="EulerAncestralDiscreteScheduler")
        layer = next(iter(base.denoiser.children()))
        base.denoiser.train()
        layer.eval()
        modes = [module.training for module in base.denoiser.modules()]
        torch.manual_seed(12)
        state = torch.get_rng_state()
        with torch.autocast("cpu", torch.bfloat16):
            noisy = draw(session, scheduler="EulerAncestralDiscreteScheduler")
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in base.denoiser.modules()] == modes
        base.denoiser.eval()
    assert same(noisy, quiet)
    assert torch.is_grad_enabled()


def test_bf16_base_draws(files: dict[str, Path], tmp_path: Path) -> None:
    folder = save("sd1", tmp_path / "tiny")
    with Session(folder, [files["a"]], dtype=torch.bfloat16, device="cpu") as session:
        assert not same(draw(session), draw(session, (files["a"], 0.0)))
        assert session.base.dtype == torch.bfloat16


def test_base_is_found_from_the_adapter(tmp_path: Path) -> None:
    folder = save("sd1", tmp_path / "the base")
    path = adapter_file(tmp_path / "x.safetensors", base_name=str(folder))
    with Session(adapters=[path], device="cpu") as session:
        assert session.base.name == str(folder)
        assert session.residents[0].report.startswith("applied 32/32 unet layers, 0 unused tensors")
        assert same(draw(session), draw(Session(folder, device="cpu"), (path, 1.0)))


def test_base_that_is_gone_is_told_with_what_to_do(tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "x.safetensors", base_name=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"was made for .*gone.*--base"):
        Session(adapters=[path], device="cpu")
    with pytest.raises(ModelError, match="nothing to draw with"):
        Session()


def test_dtype_of_a_loaded_base_is_refused(base: BaseModel) -> None:
    with pytest.raises(ModelError, match="loaded already"):
        Session(base, dtype=torch.float32)


@pytest.mark.parametrize(("side", "near"), [(20, "16 or 24"), (31, "24 or 32"), (5, "8"), (0, "8")])
def test_size_error_names_the_nearest_sizes(base: BaseModel, side: int, near: str) -> None:
    request = FOX.model_copy(update={"width": side or None, "height": side or -3})
    with pytest.raises(ModelError, match=rf"multiples of 8 pixels\. Nearest: {near}\."):
        Session(base).generate(request)


# Schedulers


def test_unknown_scheduler_gets_a_suggestion(base: BaseModel) -> None:
    with pytest.raises(UnknownName, match='Did you mean "EulerDiscreteScheduler"'):
        draw(Session(base), scheduler="EulerDiscretScheduler")
    with pytest.raises(UnknownName, match="no scheduler 'UNet2DConditionModel'"):
        draw(Session(base), scheduler="UNet2DConditionModel")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("FlowMatchEulerDiscreteScheduler", "no beta_start"),
        ("EDMEulerScheduler", "no beta_start"),
        ("CogVideoXDPMScheduler", "missing 2 required"),
    ],
)
def test_scheduler_of_another_kind_is_refused_by_name(base: BaseModel, name: str, why: str) -> None:
    with pytest.raises(
        ModelError, match=rf"{name} can't draw with this base \(.*{why}.*Made for it: .*DDIMScheduler"
    ):
        draw(Session(base), scheduler=name)


def test_other_schedulers_draw(base: BaseModel) -> None:
    session = Session(base)
    pictures = {
        name: draw(session, scheduler=name)
        for name in ("DDIMScheduler", "LCMScheduler", "HeunDiscreteScheduler")
    }
    assert all(picture.std() > 1 for picture in pictures.values())
    assert "EulerDiscreteScheduler" in scheduler_names()


def test_default_scheduler_is_dpm_solver_plus_plus_on_the_bases_own_schedule(base: BaseModel) -> None:
    own = base.pipeline().scheduler
    built = build_scheduler("DPMSolverMultistepScheduler", own)
    assert built.config.algorithm_type == "dpmsolver++"
    assert built.config.beta_end == own.config.beta_end
    assert built.config.prediction_type == own.config.prediction_type


def test_v_prediction_base_draws_as_diffusers_does() -> None:
    base = tiny("sd2")
    pipeline = base.pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline("x", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert same(pixels(Session(base).generate(Request(prompt="x", steps=2))[0].image), pixels(theirs))


# Notes


def test_a_prompt_that_is_cut_short_is_noted(base: BaseModel) -> None:
    counts, limit = base.token_counts(["z " * 100])
    notes = Session(base).generate(FOX.model_copy(update={"prompt": "z " * 100}))[0].notes
    assert f"has {counts[0]} tokens" in notes[0]
    assert f"last {counts[0] - limit} are not read" in notes[0]


def test_a_negative_prompt_without_guidance_is_noted(base: BaseModel) -> None:
    notes = Session(base).generate(FOX.model_copy(update={"negative": "rain", "guidance": 1.0}))[0].notes
    assert any("no effect at guidance 1" in note for note in notes)
    assert Session(base).generate(FOX)[0].notes == ()


def test_a_black_picture_is_noted_with_its_cause() -> None:
    spoiled = tiny()
    with torch.no_grad():
        spoiled.denoiser.conv_out.bias.fill_(float("nan"))
    drawing = Session(spoiled).generate(FOX)[0]
    assert drawing.image.getextrema() == ((0, 0),) * 3
    assert drawing.image.size == (16, 16)
    assert "the denoiser gave NaN in float32" in drawing.notes[0]

    blind = tiny()
    with torch.no_grad():
        blind.pipeline().vae.decoder.conv_out.bias.fill_(float("nan"))
    drawings = Session(blind).generate(FOX.model_copy(update={"count": 2}))
    assert all("the VAE gave NaN" in drawing.notes[0] for drawing in drawings)

    grey = tiny()
    with torch.no_grad():
        for parameter in grey.pipeline().vae.decoder.conv_out.parameters():
            parameter.zero_()
    (note,) = Session(grey).generate(FOX)[0].notes
    assert "shows nothing" in note
    assert "128 of 255" in note


def test_base_state_is_free_of_adapters_after_an_error_at_construction(
    files: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny()
    (tmp_path / "bad.safetensors").write_bytes(b"")
    with pytest.raises(FormatError):
        Session(base, [files["a"], tmp_path / "bad.safetensors"])
    assert base_state(base.denoiser).keys() == base.denoiser.state_dict().keys()

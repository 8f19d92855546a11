"""The command people have for pivotal tuning: every flag is there, and means what it says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.methods.words_world import words_plan
from tests.scripts.commands import load, run_config, values

script = load("lora_pti")

THEIRS = re.findall(
    r"\w+",
    """
    instance_data_dir pretrained_model_name_or_path output_dir train_text_encoder pretrained_vae_name_or_path
    revision perform_inversion use_template train_inpainting placeholder_tokens placeholder_token_at_data
    initializer_tokens load_pretrained_inversion_embeddings_path seed resolution color_jitter train_batch_size
    sample_batch_size max_train_steps_tuning max_train_steps_ti save_steps gradient_accumulation_steps
    gradient_checkpointing lora_rank_unet lora_rank_text_encoder lora_unet_target_modules
    lora_clip_target_modules lora_dropout_p lora_scale use_extended_lora clip_ti_decay learning_rate_unet
    learning_rate_text learning_rate_ti continue_inversion continue_inversion_lr
    use_face_segmentation_condition cached_latents use_mask_captioned_data mask_temperature scale_lr
    lr_scheduler lr_warmup_steps lr_scheduler_lora lr_warmup_steps_lora weight_decay_ti weight_decay_lora
    use_8bit_adam device extra_args log_wandb wandb_log_prompt_cnt wandb_project_name wandb_entity proxy_token
    enable_xformers_memory_efficient_attention out_name
    """,
)

NEEDED = [
    "--pretrained_model_name_or_path=picturebook",
    "--instance_data_dir=cat",
    "--output_dir=out",
    "--placeholder_tokens=<s1>|<s2>",
]


def settings(*more: str) -> dict[str, Any]:
    return values(script, script.spelled_out([*NEEDED, *more]))


def config(*more: str) -> Any:
    return run_config(script, script.spelled_out([*NEEDED, *more]))


def test_every_flag_is_there_once() -> None:
    assert sorted(flag.name for flag in script.FLAGS) == sorted(THEIRS)


def test_the_defaults_are_theirs_and_a_run() -> None:
    run = config("--use_template=object")
    options = run.options
    assert (run.method, options.placeholders, options.initial, options.learns) == (
        *("pivotal", ("<s1>", "<s2>"), (), "object"),
    )
    assert (options.inversion_steps, run.train.steps, run.train.accumulate) == (250, 1250, 4)
    assert (options.train_text_encoder, options.text_encoder_rank, options.text_encoder_learning_rate) == (
        *(True, 4, 1e-5),
    )
    assert (options.inversion_optimizer.learning_rate, options.inversion_optimizer.weight_decay) == (
        5e-4,
        0.0,
    )
    assert (options.inversion_schedule.name, run.train.schedule.name) == ("linear", "linear")
    assert (run.train.optimizer.learning_rate, run.train.optimizer.weight_decay) == (1e-4, 0.001)
    assert options.norm_pull == pytest.approx(0.05) and not options.joint
    assert run.adapter.targets == ("attention", "*.ff.net.0.proj") and run.adapter.rank == 4
    assert (run.train.seed, run.train.checkpoint_every) == (42, 100)


def test_switches_are_spelled_as_there() -> None:
    assert settings("--train_text_encoder=False")["pivotal.train_text_encoder"] is False
    assert settings("--notrain_text_encoder")["pivotal.train_text_encoder"] is False
    assert settings("--continue-inversion", "--seed=1")["pivotal.joint"] is True
    assert settings("--continue_inversion", "True")["pivotal.joint"] is True
    assert "pivotal.text_encoder_rank" not in settings("--notrain_text_encoder")


def test_flags_become_settings() -> None:
    run = config(
        *("--use_template=style", "--continue_inversion", "--continue_inversion_lr=1e-4", "--scale_lr"),
        *("--gradient_accumulation_steps=2", "--train_batch_size=3", "--initializer_tokens=cat|toy"),
        *("--use_extended_lora", "--lora_scale=0.5", "--noclip_ti_decay", "--max_train_steps_ti=5"),
        *("--max_train_steps_tuning=7", "--lr_scheduler=constant", "--lr_warmup_steps=9"),
    )
    options = run.options
    assert options.joint and options.token_learning_rate == pytest.approx(6e-4)
    assert (options.inversion_steps, run.train.steps) == (3, 10)
    assert options.initial == ("cat", "toy") and options.norm_pull == 0
    assert run.adapter.alpha == 2 and "*.resnets.*" in run.adapter.targets
    assert options.inversion_schedule.warmup_steps == 0


def test_norms_are_pulled_by_the_rate_that_trains() -> None:
    few = ("--scale_lr", "--gradient_accumulation_steps=2", "--train_batch_size=3", "--learning_rate_ti=1e-4")
    assert settings(*few)["pivotal.norm_pull"] == pytest.approx(0.06)
    joint = ("--noperform_inversion", "--continue_inversion", "--continue_inversion_lr=2e-4")
    assert settings(*few, *joint)["pivotal.norm_pull"] == pytest.approx(0.12)
    assert settings("--learning_rate_ti=0.1")["pivotal.norm_pull"] == 1


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_scale_is_the_same_at_every_rank(family: str) -> None:
    flags = ("--lora_rank_unet=8", "--lora_rank_text_encoder=2", "--lora_scale=0.5", "--max_train_steps_ti=4")
    run = config(*flags)
    plan, _ = words_plan(
        "pivotal",
        run.train,
        family=family,
        adapter=run.adapter,
        word="<s1> <s2>",
        **run.options.model_dump(exclude_unset=True),
    )
    layers = plan.export().layers.items()
    assert {(path.startswith("text_encoder"), layer.rank, layer.scale) for path, layer in layers} == {
        *((False, 8, 0.5), (True, 2, 0.5)),
    }
    assert config(*flags, "--notrain_text_encoder").adapter.alpha_pattern == {}


def test_words_from_the_start_need_no_inversion() -> None:
    run = config("--noperform_inversion", "--continue_inversion", "--max_train_steps_tuning=7")
    assert (run.options.inversion_steps, run.train.steps, run.options.joint) == (0, 7, True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--placeholder_token_at_data=TOK|<s1>"], "Write the new words into them"),
        (["--load_pretrained_inversion_embeddings_path=x"], "--initializer_tokens instead"),
        (["--noperform_inversion"], "never train the words"),
        (["--use_template=cat"], "none of object, style, person"),
        (["--initializer_tokens=cat|<rand-0.017>"], "all from noise"),
        (["--lora_unet_target_modules=Linear"], "Linear is none of"),
        (["--use_face_segmentation_condition"], "faces are not looked for"),
        (["--mask_temperature=2"], "weighs as it is"),
    ],
)
def test_what_can_not_be_honoured_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(script.Refused, match=said):
        settings(*flags)


def test_an_inpainting_base_is_known_by_itself() -> None:
    assert settings("--train_inpainting") == settings()
    flags = script.parser().parse_args(script.spelled_out([*NEEDED, "--train_inpainting"]))
    assert any("seen from the base itself" in note for note in script.COMMAND.notes(flags))


def test_the_result_is_called_as_there() -> None:
    flags = script.parser().parse_args([*NEEDED, "--out_name=mine"])
    assert script.COMMAND.result(flags) == "mine.safetensors"

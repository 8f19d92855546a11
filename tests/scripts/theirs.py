"""Theirs: the flags of diffusers' scripts with their defaults, as of its release 0.40.0; `...` for a required one.

What only one script takes stands in that script's test.
"""

from __future__ import annotations

from typing import Any

EVERY: dict[str, Any] = {
    "pretrained_model_name_or_path": ...,
    "revision": None,
    "variant": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "seed": None,
    "center_crop": False,
    "max_train_steps": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "use_8bit_adam": False,
    "allow_tf32": False,
    "dataloader_num_workers": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-08,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "mixed_precision": None,
    "report_to": "tensorboard",
    "local_rank": -1,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "rank": 4,
}
"""What all of them take."""

CAPTIONED: dict[str, Any] = {
    **EVERY,
    "dataset_name": None,
    "dataset_config_name": None,
    "train_data_dir": None,
    "image_column": "image",
    "caption_column": "text",
    "validation_epochs": 1,
    "max_train_samples": None,
    "output_dir": "sd-model-finetuned-lora",
    "cache_dir": None,
    "random_flip": False,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "learning_rate": 0.0001,
    "snr_gamma": None,
    "adam_weight_decay": 0.01,
    "prediction_type": None,
    "enable_xformers_memory_efficient_attention": False,
    "noise_offset": 0,
    "image_interpolation_mode": "lanczos",
}
"""Text-to-image."""

SUBJECT: dict[str, Any] = {
    **EVERY,
    "class_data_dir": None,
    "instance_prompt": ...,
    "class_prompt": None,
    "validation_epochs": 50,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "prior_generation_precision": None,
    "lora_dropout": 0.0,
}
"""DreamBooth."""

SUBJECT_LATER: dict[str, Any] = {
    **SUBJECT,
    "dataset_name": None,
    "dataset_config_name": None,
    "instance_data_dir": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "random_flip": False,
    "learning_rate": 0.0001,
    "text_encoder_lr": 5e-06,
    "optimizer": "AdamW",
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 0.0001,
    "adam_weight_decay_text_encoder": 0.001,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
}
"""DreamBooth on the bases that came after SD 2."""

SUBJECT_FLOW: dict[str, Any] = {
    **SUBJECT_LATER,
    "resolution": 512,
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "lora_layers": None,
    "cache_latents": False,
    "upcast_before_saving": False,
}
"""DreamBooth on those of them that are trained by flow matching."""

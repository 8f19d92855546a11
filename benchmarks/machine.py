"""Which machine a figure comes from, for the JSON beside it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, object]:
    """Processor, cores, memory, and the versions that matter."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "processor": names[0] if names else platform.processor(),
        "bf16": [f for f in ("amx_bf16", "avx512_bf16") if f in flags],
        "cores": os.cpu_count(),
        "accelerator": device,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")},
    }

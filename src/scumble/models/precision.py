"""Precision: which dtypes a device can compute in, refused before a model is loaded rather than in the first
step."""

from __future__ import annotations

import torch

from scumble.errors import ModelError, PrecisionError, UnknownName

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What people call the dtypes of a file."""

PRECISIONS: dict[str, torch.dtype] = {"no": torch.float32, "fp16": DTYPES["fp16"], "bf16": DTYPES["bf16"]}
"""What people and Accelerate call a precision -> the dtype."""


def dtype_called(name: str) -> torch.dtype:
    """The dtype of a file that is called "fp32", "fp16" or "bf16".

    Raises:
        UnknownName: there is none called so.
    """
    if name not in DTYPES:
        raise UnknownName("dtype", name, DTYPES)
    return DTYPES[name]


def dtype_named(precision: str) -> torch.dtype:
    """The dtype of "no", "fp16" or "bf16".

    Raises:
        UnknownName: no precision is called so.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    return PRECISIONS[precision]


def find_device(device: torch.device | str | None = None) -> torch.device:
    """The device to compute on: the one asked for, or None for the first GPU that torch sees, else the CPU.

    Raises:
        ModelError: torch can't use that device here (none is there, or this torch was built for other GPUs).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"There is no device {device!r}. Use cpu, cuda, cuda:1, ... or mps.") from error
    if found.type == "cuda":
        _check_cuda(found)
    elif found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("Device mps was asked for, and this torch sees no Apple GPU. Use --device cpu.")
    return found


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ModelError(
            f"Device {device} was asked for, and this torch ({torch.__version__}, {built}) sees no GPU. "
            "Use --device cpu, or install a torch built for your GPU: https://pytorch.org/get-started/locally"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ModelError(
            f"Device {device} was asked for, and there are {torch.cuda.device_count()} GPUs, counted from "
            f"cuda:0."
        )
    major, minor = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    # code for sm_80 runs on sm_86, and compute_90 (PTX) is compiled on any later GPU
    fits = any(
        _arch(name)[0] == major and _arch(name)[1] <= minor for name in built_for if name.startswith("sm_")
    )
    fits = fits or any(_arch(name) <= (major, minor) for name in built_for if name.startswith("compute_"))
    if built_for and not fits and torch.version.hip is None:
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} is of architecture sm_{major}{minor}, and this torch "
            f"({torch.__version__}) was built for {', '.join(built_for)}. Install a torch built for your "
            f"GPU: https://pytorch.org/get-started/locally"
        )


def _arch(name: str) -> tuple[int, int]:
    """`"sm_90a"` -> (9, 0)."""
    digits = "".join(c for c in name.partition("_")[2] if c.isdigit())
    return int(digits[:-1] or 0), int(digits[-1:] or 0)


def fast_bf16_on_cpu() -> tuple[str, ...]:
    """The instructions that make bf16 fast on this CPU, best first: "amx_bf16", "avx512_bf16"; empty for
    none."""
    found = []
    if torch.cpu._is_amx_tile_supported():
        found.append("amx_bf16")
    if torch.cpu._is_avx512_bf16_supported():
        found.append("avx512_bf16")
    return tuple(found)


def check_precision(dtype: torch.dtype, device: torch.device | str) -> None:
    """Nothing, if `device` can compute in `dtype`.

    Weights may be *stored* in fp16 anywhere; this is about computing with them.

    Raises:
        PrecisionError: it can't; the text names the precision to use instead.
    """
    device = torch.device(device)
    if dtype not in PRECISIONS.values():
        raise PrecisionError(f"There is no training or drawing in {dtype}. Use bf16, fp16 or no (fp32).")
    if device.type == "cpu" and dtype == torch.float16:
        fast = fast_bf16_on_cpu()
        advice = (
            f"on this CPU use bf16 (fast here: {', '.join(fast)} found) or no"
            if fast
            else "on this CPU use no (fp32); bf16 works too, without being faster here"
        )
        raise PrecisionError(f"fp16 needs a GPU; {advice}.")
    if device.type == "cuda" and dtype == torch.bfloat16:
        major, minor = torch.cuda.get_device_capability(device)
        # torch counts emulation as support; older than Ampere it is emulated, slower than fp32
        if torch.version.hip is None and major < 8:
            raise PrecisionError(
                "bf16 needs a GPU of architecture sm_80 (Ampere) or later; "
                f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}. Use fp16 or no (fp32)."
            )

"""check_precision and find_device: refused before anything is loaded, with what to use instead."""

from __future__ import annotations

import pytest
import torch

from scumble.errors import ModelError, PrecisionError, UnknownName
from scumble.models import precision
from scumble.models.precision import check_precision, dtype_named, find_device


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)


@pytest.mark.parametrize(
    ("fast", "said"), [(("amx_bf16",), "use bf16 (fast here: amx_bf16 found) or no"), ((), "use no (fp32)")]
)
def test_fp16_on_a_cpu_names_what_to_use(
    fast: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fast_bf16_on_cpu", lambda: fast)
    with pytest.raises(PrecisionError) as caught:
        check_precision(torch.float16, "cpu")
    assert "fp16 needs a GPU" in str(caught.value) and said in str(caught.value)
    check_precision(torch.bfloat16, "cpu")
    check_precision(torch.float32, "cpu")


@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 0), (9, 0)])
def test_bf16_needs_ampere(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, capability, [])
    check_precision(torch.float16, "cuda")
    if capability >= (8, 0):
        check_precision(torch.bfloat16, "cuda")
    else:
        with pytest.raises(PrecisionError, match=r"Some GPU is sm_.*Use fp16"):
            check_precision(torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    ("capability", "built", "fits"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 0), ["sm_80", "compute_80"], False),
    ],
)
def test_a_torch_built_for_other_gpus_is_refused(
    capability: tuple[int, int], built: list[str], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, capability, built)
    if fits:
        assert find_device("cuda").type == "cuda" == find_device(None).type
    else:
        with pytest.raises(ModelError, match="was built for sm_"):
            find_device("cuda")


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (8, 0), [])
    with pytest.raises(ModelError, match="there are 1 GPUs"):
        find_device("cuda:3")
    with pytest.raises(ModelError, match="no device 'gpu'"):
        find_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == torch.device("cpu")
    with pytest.raises(ModelError, match="sees no GPU"):
        find_device("cuda")


def test_precisions_by_name() -> None:
    assert [dtype_named(name) for name in ("no", "fp16", "bf16")] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]
    with pytest.raises(UnknownName, match='Did you mean "bf16"'):
        dtype_named("bf61")

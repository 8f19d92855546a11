"""The law of a batch of many adapters: each sample is what it is alone with its own adapters.

1. On a layer, for every family, beside another family and another rank, guidance's repeated batch included: equal
   to one by one to 1e-5 in fp32. A sample without an adapter has the base's bits.
2. In pictures: requests with different adapters, drawn together, are the ones drawn alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import FAMILIES, Adapted, Adapter, Delta, Layer, LoraSettings
from scumble.formats import write
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from scumble.models import BaseModel
from tests.inference.makers import fill, tiny

LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 10), (5, 7, 12)),
    "linear rows": (nn.Linear(12, 10, bias=False), (5, 12)),
    "conv": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (5, 6, 9, 9)),
}
STRENGTHS = {
    "one": [1.0, 0.0, 0.0, 0.5, 0.5],
    "two": [0.0, 0.0, -0.7, 1.0, 0.3],
    "three": [0.0, 0.0, 0.0, 0.0, 2.0],
}
"""Adapter -> its strength for each of five samples; the second has none."""


def trained(family: str, base: Layer, rank: int, seed: int) -> Delta:
    """A delta with values as if trained."""
    settings = FAMILIES.get(family).settings()
    generator = torch.Generator().manual_seed(seed)
    delta = FAMILIES.get(family).fresh(base, settings, rank=rank, alpha=float(rank), generator=generator)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return delta.requires_grad_(False).eval()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("repeats", [1, 2])
@torch.no_grad()
def test_each_sample_is_what_it_is_alone(family: str, kind: str, repeats: int) -> None:
    torch.manual_seed(0)
    base, shape = LAYERS[kind]
    base.requires_grad_(False)
    layer = Adapted(base)
    for seed, (name, other, rank) in enumerate(
        (("one", "lora", 2), ("two", family, 3), ("three", "dora", 1))
    ):
        layer.add(name, trained(other, base, rank, seed))
    x = torch.randn(shape).repeat(repeats, *(1 for _ in shape[1:])) + torch.randn(1)
    for name, strengths in STRENGTHS.items():
        layer.set_strength(name, torch.tensor(strengths))
    together = layer(x)
    y = base(x)
    for sample in range(len(x)):
        for name, strengths in STRENGTHS.items():
            layer.set_strength(name, strengths[sample % 5])
        torch.testing.assert_close(
            together[sample : sample + 1], layer(x[sample : sample + 1]), rtol=1e-5, atol=1e-5
        )
        changed = not torch.equal(together[sample], y[sample])
        assert changed == (sample % 5 != 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_stacked_loras_are_the_sum_one_by_one(dtype: torch.dtype, own: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 10).to(dtype).requires_grad_(False)
    layer, x = Adapted(base), torch.randn(4, 7, 12).to(dtype)
    deltas = {name: trained("lora", base, 2, seed) for seed, name in enumerate(("one", "two", "three"))}
    for name, delta in deltas.items():
        layer.add(name, delta)

    def expected() -> Tensor:
        y = base.double()(x.double())
        for key, dial in layer.dials.items():
            each = dial.value if isinstance(dial.value, Tensor) else torch.full((4,), dial.value)
            delta = deltas[key]
            change = x.double() @ delta.weight_delta(base.weight).double().t()
            y = y + each.repeat(4 // len(each)).double()[:, None, None] * change
        base.to(dtype)
        return y

    def check() -> None:
        limit = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(layer(x).double(), expected(), rtol=limit, atol=limit)

    if own:  # as many ranks in every sample: none is padded
        layer.set_strength("one", torch.tensor([1.0, 0.0]))
        layer.set_strength("two", torch.tensor([0.0, -0.5, 0.0, 2.0]))
    check()
    stack = layer._stack
    assert stack is not None and stack.down.dim() == (3 if own else 2)
    layer.set_strength("three", 0.25)
    check()
    assert layer._stack is not None and layer._stack.down is stack.down, "another strength copies no weight"
    deltas["one"].get_parameter("up").mul_(-2)
    check()
    assert layer._stack is not None and layer._stack.down is not stack.down, "new values are seen"
    for name in ("one", "two"):
        layer.set_strength(name, 0.0)
    layer.set_strength("three", 1.0)
    check()
    assert layer._stack is None, "nothing is kept of what does not act"


@contextmanager
def latents_of(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What is drawn, before 8 bits hide differences."""
    seen: list[Tensor] = []
    decode = base.decode_latents
    with monkeypatch.context() as patch:
        patch.setattr(
            base, "decode_latents", lambda latents: (seen.extend(latents.clone()), decode(latents))[1]
        )
        yield seen


def adapters(folder: Path, base: BaseModel) -> dict[str, Path]:
    """Files of mixed ranks, families and targets: one changes convolutions, one the text encoder as well."""
    made: dict[str, tuple[list[str], dict[str, Any]]] = {
        "a": (["attention"], {"rank": 2}),
        "b": (["all-linear", "conv"], {"rank": 5}),
        "c": (["attention", "text_encoder.*"], {"rank": 1}),
    }
    found = {}
    for seed, (name, (targets, options)) in enumerate(made.items()):
        with Adapter.inject(base.roots, targets, LoraSettings(**options), name=name) as adapter:
            found[name] = write(fill(adapter, seed, 0.1).state(), folder / f"{name}.safetensors")
    ia3 = FAMILIES.get("ia3").settings()
    with Adapter.inject(base.roots, "attention", ia3, name="d") as adapter:
        found["d"] = write(fill(adapter, 9, 0.3).state(), folder / "d.safetensors")
    return found


def test_requests_drawn_together_are_the_ones_drawn_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny()
    files = adapters(tmp_path, base)

    def asked(seed: int, prompt: str, **uses: float) -> Request:
        named = tuple(AdapterUse(path=files[name], strength=strength) for name, strength in uses.items())
        return Request(prompt=prompt, steps=2, seed=seed, guidance=2.0, adapters=named)

    requests = [
        asked(1, "a fox", a=1.0),
        asked(2, "a hen", b=0.7, c=-0.4),
        asked(3, "a barn"),
        asked(4, "a fox", d=1.0, a=0.5),
        asked(5, "a hen", c=1.0),
    ]
    with Session(base, batch_size=len(requests)) as session:
        with latents_of(base, monkeypatch) as together:
            drawings = session.generate(requests)
        assert [drawing.request.prompt for drawing in drawings] == [one.prompt for one in requests]
        with latents_of(base, monkeypatch) as alone:
            for request in requests:
                session.generate(request)
        with latents_of(base, monkeypatch) as bare:
            for request in requests:
                session.generate(request.model_copy(update={"adapters": ()}))
    assert len(together) == len(alone) == len(requests)
    for row, (one, other, plain) in enumerate(zip(together, alone, bare, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
        assert (row == 2) == bool((other - plain).abs().max() < 1e-3)

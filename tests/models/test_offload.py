"""Offload: the same bits as without it, at most two blocks on the device, in the right order. A recorder stands for the
device: its copies are other memory than the host's, and it knows which of them are alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapter
from scumble.adapters.algebra import merge
from scumble.adapters.families import FAMILIES as KINDS
from scumble.errors import ModelError, UnknownName
from scumble.models import FAMILIES
from scumble.models.family import BaseModel, Frame
from scumble.models.offload import Arrival, Offload, park, refuse_offload
from scumble.models.quantized import Quantized, quantize
from scumble.rng import Streams

HOST = torch.device("cpu")


class Recorder:
    """Copies to other memory of the host, which is filled with noise until somebody waits for it."""

    def __init__(self) -> None:
        self.hosts: list[Tensor] = []
        self.log: list[tuple[str, int]] = []
        """What was sent: the blocks' numbers are those in which they were kept."""
        self.most = 0
        self._copies: list[weakref.ref[Tensor]] = []

    def keep(self, flat: Tensor) -> Tensor:
        self.hosts.append(flat)
        return flat

    def send(self, host: Tensor) -> Arrival:
        self.log.append(("sent", next(number for number, one in enumerate(self.hosts) if one is host)))
        there = torch.full_like(host, 0x7F)  # as numbers: huge, or NaN
        self._copies = [copy for copy in self._copies if copy() is not None]
        self._copies.append(weakref.ref(there.untyped_storage()))  # type: ignore[arg-type]
        self.most = max(self.most, self.alive)

        def arrive() -> None:
            there.copy_(host)

        return there, arrive

    @property
    def alive(self) -> int:
        """Copies that anybody still holds: the model, the graph, ..."""
        return sum(copy() is not None for copy in self._copies)


def offloaded(family: str) -> tuple[BaseModel, Offload, Recorder]:
    base, recorder = FAMILIES.get(family).tiny(0), Recorder()
    return base, park(base, HOST, recorder), recorder


def inject(base: BaseModel, kind: str = "lora", targets: str = "attention") -> Adapter:
    settings = KINDS.get(kind).settings()
    if hasattr(settings, "rank"):
        settings = settings.model_copy(update={"rank": 2})
    adapter = Adapter.inject(base.roots, targets, settings, streams=Streams(1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapter


def inputs(base: BaseModel) -> tuple[Tensor, Tensor, object, Frame]:
    side = base.resolution // base.latent_factor
    latents = Streams(0).normal("latents", range(2), (base.latent_channels, side, side))
    t = base.prediction.from_uniform(torch.tensor([0.3, 0.8]))
    with torch.no_grad():
        text = base.encode_prompts(["a red fox", "a hen"])
    return latents, t, text, Frame.plain(2, base.resolution, base.resolution)


def gradients(base: BaseModel, adapter: Adapter, steps: int = 1) -> tuple[Tensor, list[Tensor]]:
    asked = inputs(base)
    for _ in range(steps):
        for parameter in adapter.parameters():
            parameter.grad = None
        answer = base.denoise(*asked)  # type: ignore[arg-type]
        answer.square().mean().backward()
    return answer.detach(), [
        parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((name, False) for name in FAMILIES.names()), ("sd1", True), ("flux", True)],
)
def test_outputs_and_gradients_have_the_bits_of_a_base_that_is_whole_on_the_device(
    family: str, checkpointing: bool
) -> None:
    plain = FAMILIES.get(family).tiny(0)
    base, moving, recorder = offloaded(family)
    adapters = [inject(one) for one in (plain, base)]
    for one in (plain, base):
        one.train_memory(checkpointing=checkpointing)
    (answer, grads), (said, found) = (
        gradients(*pair, steps=2) for pair in zip((plain, base), adapters, strict=True)
    )
    assert torch.equal(said, answer) and len(found) == len(grads) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, grads, strict=True))
    assert any(gradient.any() for gradient in grads)
    gc.collect()
    assert recorder.most == 2, "no graph holds on to a block"
    assert len(recorder.hosts) == len(base.movable) > 2 and moving.present


@pytest.mark.parametrize("kind", KINDS.names())
def test_every_family_of_adapters_trains_on_blocks_that_come_and_go(kind: str) -> None:
    plain = FAMILIES.get("sd1").tiny(0)
    base, _, recorder = offloaded("sd1")
    targets = "attention" if kind in ("ia3",) else "attention+conv"
    pairs = [(one, inject(one, kind, targets)) for one in (plain, base)]
    (answer, grads), (said, found) = (gradients(*pair) for pair in pairs)
    assert torch.equal(said, answer)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, grads, strict=True))
    states = [adapter.state() for _, adapter in pairs]
    assert states[0].equal(states[1])
    gc.collect()
    assert recorder.alive <= 2


@pytest.mark.parametrize("code", ["int8", "nf4"])
def test_a_quantised_base_comes_and_goes_in_its_codes(code: str) -> None:
    pair = [FAMILIES.get("sd1").tiny(0) for _ in range(2)]
    for one in pair:
        quantize(one.denoiser, code, torch.float32)
    plain, base = pair
    recorder = Recorder()
    moving = park(base, HOST, recorder)
    held = [part for part in base.denoiser.modules() if isinstance(part, Quantized)]
    assert any(id(part.codes) in moving.kept for part in held)
    (answer, grads), (said, found) = (gradients(one, inject(one), steps=2) for one in (plain, base))
    assert torch.equal(said, answer)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, grads, strict=True))
    gc.collect()
    assert recorder.most == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_sent_ahead_in_the_order_of_the_model_and_backwards_in_the_other(
    checkpointing: bool,
) -> None:
    base, _, recorder = offloaded("sd1")
    adapter = inject(base)
    base.train_memory(checkpointing=checkpointing)
    log = recorder.log
    for number, block in enumerate(base.movable):
        block.register_forward_pre_hook(lambda *_, number=number: log.append(("called", number)))
    gradients(base, adapter, steps=3)
    log.clear()
    gradients(base, adapter)
    order = [number for what, number in log if what == "called"][: len(base.movable)]
    assert sorted(order) == list(range(len(order))) != order, "the model's list has another order"
    forward = [("called", order[0])]  # it is there from the end of the step before, and so is the next
    for now, following in zip(order[1:], [*order[2:], None], strict=True):
        forward += [("sent", following)] if following is not None else []
        forward += [("called", now)]
    turn = len(forward)
    assert log[:turn] == forward
    assert [number for what, number in log[turn:] if what == "sent"] == order[::-1][2:]
    assert any(what == "called" for what, _ in log[turn:]) == checkpointing


def test_what_moves_the_whole_model_leaves_the_blocks_and_takes_the_adapters() -> None:
    base, moving, _ = offloaded("sd1")
    adapter = inject(base)
    gradients(base, adapter)
    moving.leave()
    assert moving.present == ()
    before = {name: tensor.data_ptr() for name, tensor in base.denoiser.named_parameters()}
    base.denoiser.to(torch.float64)
    widened = {name for name, tensor in base.denoiser.named_parameters() if tensor.dtype == torch.float64}
    same = {name for name, tensor in base.denoiser.named_parameters() if tensor.data_ptr() == before[name]}
    kept = {name for name, tensor in base.denoiser.named_parameters() if id(tensor) in moving.kept}
    assert kept == same and kept | widened == before.keys() and not kept & widened
    assert any(".deltas." in name for name in widened) and any(name.startswith("conv_in") for name in widened)


def test_away_from_the_device_every_weight_has_its_values_and_its_object() -> None:
    plain = FAMILIES.get("sd1").tiny(0)
    base = FAMILIES.get("sd1").tiny(0)
    tensors = dict(base.denoiser.named_parameters())
    base.denoiser.conv_norm_out.to(memory_format=torch.contiguous_format)  # type: ignore[union-attr, operator]
    first = base.movable[0]
    for part in first.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)
    strides = {name: tensor.stride() for name, tensor in tensors.items()}
    moving = park(base, HOST, Recorder())
    for number, (name, tensor) in enumerate(base.denoiser.named_parameters()):
        assert tensor is tensors[name] and tensor.stride() == strides[name], f"{number} {name}"
        assert torch.equal(tensor, plain.denoiser.get_parameter(name))
    assert base.fingerprint() == plain.fingerprint()
    assert moving.host_bytes >= sum(t.numel() * 4 for t in tensors.values() if id(t) in moving.kept) > 0
    assert 0 < moving.device_bytes < moving.host_bytes


def test_injecting_merging_and_ejecting_leave_the_base_as_it_was() -> None:
    plain = FAMILIES.get("sd1").tiny(0)
    base, _, _ = offloaded("sd1")
    with torch.no_grad():
        bare = base.denoise(*inputs(base))  # type: ignore[arg-type]
        adapter = inject(base)
        assert not torch.equal(base.denoise(*inputs(base)), bare)  # type: ignore[arg-type]
        adapter.eject()
        assert torch.equal(base.denoise(*inputs(base)), bare)  # type: ignore[arg-type]
        assert torch.equal(plain.denoise(*inputs(plain)), bare)  # type: ignore[arg-type]
        with merge([inject(plain)], plain.roots), merge([inject(base)], base.roots):
            assert torch.equal(base.denoise(*inputs(base)), plain.denoise(*inputs(plain)))  # type: ignore[arg-type]
        assert torch.equal(base.denoise(*inputs(base)), plain.denoise(*inputs(plain)))  # type: ignore[arg-type]


def test_an_adapter_is_put_where_its_layer_computes() -> None:
    base = FAMILIES.get("sd1").tiny(0)
    there = torch.device("meta")  # any other device than the one where the weights wait
    Offload(base.denoiser, base.movable, there, Recorder())
    delta = KINDS.get("lora").fresh(
        base.movable[0].get_submodule("attn1.to_q"),
        KINDS.get("lora").settings(),
        rank=2,
        alpha=2.0,
        generator=torch.Generator(),
    )
    assert {parameter.device for parameter in delta.parameters()} == {there}


def test_a_tensor_of_two_blocks_stays_and_a_discarded_base_keeps_nothing() -> None:
    base = FAMILIES.get("sd1").tiny(0)
    one, other = [block for block in base.movable if type(block).__name__ == "ResnetBlock2D"][:2]
    one.norm1 = other.norm1
    recorder = Recorder()
    moving = park(base, HOST, recorder)
    assert id(other.norm1.weight) not in moving.kept and id(other.conv1.weight) in moving.kept
    held = weakref.ref(recorder.hosts[0].untyped_storage())
    base.discard()
    recorder.hosts.clear()
    gc.collect()
    assert held() is None and moving.host_bytes == 0


def test_where_it_would_do_nothing_it_is_refused() -> None:
    refuse_offload("none", HOST, 4)
    with pytest.raises(UnknownName, match='Did you mean "blocks"'):
        refuse_offload("block", HOST)
    with pytest.raises(ModelError, match="the computation is on cpu"):
        refuse_offload("blocks", HOST)
    refuse_offload("blocks", torch.device("cuda"))
    with pytest.raises(ModelError, match="this run has 2"):
        refuse_offload("blocks", torch.device("cuda"), 2)
    base = FAMILIES.get("sd1").tiny(0)
    base.__class__ = type("Unsaid", (type(base),), {"recomputed": (), "repeated": (), "moved": ()})
    with pytest.raises(ModelError, match="does not say which parts"):
        park(base, HOST, Recorder())

"""A batch whose pictures have an adapter each: scumble's one forward beside the other ways to get it.

Copies of one UNet share their weights and take turns in one process, without gradients. The batch has --batch rows.

    base           the bare UNet
    shared         scumble, all rows with one and the same adapter
    mixed          scumble, each row with its own adapter
    mixed ranks    scumble, ranks from 4 to 64
    some           scumble, every other row without one
    peft mixed     peft's `adapter_names`, which diffusers' UNet does not pass on: put in by hooks
    one by one     diffusers: `set_adapters` and a forward for each row

    python benchmarks/many_adapters.py                          # seconds, a toy UNet
    python benchmarks/many_adapters.py --shape thin --clock cpu
    python benchmarks/many_adapters.py --full --size 32
    python benchmarks/many_adapters.py --products               # the ways to multiply, layer by layer

Limit: each row's adapter costs what it would cost alone, so that `mixed / shared` is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from overhead import with_peft
from turns import DTYPES, build, fill, in_turns, inputs, options_of, ratios, save, twin

from scumble.adapters import Adapter, LoraSettings

RANKS = (4, 4, 8, 8, 16, 16, 32, 64)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, help="side of the latents; default the shape's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--products", action="store_true", help="single layers, by each way to multiply")
    options = options_of(parser)
    with torch.no_grad():
        (products if options.products else forwards)(options)


def forwards(options: argparse.Namespace) -> None:
    """Whole UNets."""
    unet = build(options.shape, DTYPES[options.dtype], torch.device("cpu")).eval()
    batch, ranks = options.batch, (options.rank,) * options.batch
    x, t, text = inputs(unet, batch, options.size or unet.config.sample_size)
    models: dict[str, Any] = {"base": unet, "shared": twin(unet).eval()}
    adapters_in(models["shared"], ranks[:1])
    for name, its, every in (
        ("mixed", ranks, 1),
        ("mixed ranks", tuple(RANKS[row % len(RANKS)] for row in range(batch)), 1),
        ("some", ranks, 2),
    ):
        models[name] = twin(unet).eval()
        for row, adapter in enumerate(adapters_in(models[name], its)):
            strengths = torch.zeros(batch)
            strengths[row] = 1.0 if row % every == 0 else 0.0
            adapter.strength = strengths if strengths.any() else 0.0
    steps: dict[str, Callable[[], object]] = {
        name: lambda model=model: model(x, t, text) for name, model in models.items()
    }
    names = [f"adapter{row}" for row in range(batch)]
    theirs = with_peft(twin(unet).eval(), ranks)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, named: (given, named | {"adapter_names": names}), with_kwargs=True
        )
        for module in theirs.modules()
        if hasattr(module, "base_layer")
    ]
    theirs(x, t, text)  # the hooks fit this peft, or it says so here
    for hook in hooks:
        hook.remove()
    hooked = with_peft(twin(unet).eval(), ranks)
    for module in hooked.modules():
        if hasattr(module, "base_layer"):
            module.register_forward_pre_hook(
                lambda _, given, named: (given, named | {"adapter_names": names}), with_kwargs=True
            )
    steps["peft mixed"] = lambda: hooked(x, t, text)

    def one_by_one() -> None:
        for row, name in enumerate(names):
            theirs.set_adapters([name])
            theirs(x[row : row + 1], t, text[row : row + 1])

    steps["one by one"] = one_by_one
    seconds = in_turns(steps, options.repeats, options.clock)
    over = {"shared": "base"} | {name: "shared" for name in steps if name not in ("base", "shared")}
    found = ratios(seconds, over)
    save("many_adapters", options, "mixed / shared = 1", ratios=found, seconds=seconds)


def adapters_in(unet: torch.nn.Module, ranks: tuple[int, ...]) -> list[Adapter]:
    """Adapters with values, in the UNet."""
    made = []
    for number, rank in enumerate(ranks):
        settings = LoraSettings(rank=rank)
        made.append(Adapter.inject({"unet": unet}, "attention", settings, name=str(number)))
        fill(made[-1])
    return made


def products(options: argparse.Namespace) -> None:
    """One linear layer after the other, at the shapes of SD 1.5's attention, with a LoRA for each row.

    rows     two products for each row, the second into the output: what scumble does
    bmm      ranks padded to the largest, two batched products
    stack    all ranks side by side, a mask on what does not belong to a row, two products
    """
    dtype, batch = DTYPES[options.dtype], options.batch
    found = {}
    for tokens, width in ((1024, 320), (256, 640), (64, 1280), (77, 768)):
        for ranks in ((options.rank,) * batch, tuple(RANKS[row % len(RANKS)] for row in range(batch))):
            steps = ways(batch, tokens, width, ranks, dtype)
            print(f"\n{batch} x {tokens} x {width}, ranks {ranks}")
            seconds = in_turns(steps, max(options.repeats, 10), options.clock)
            best = {name: [min(values)] for name, values in seconds.items()}
            found[f"{tokens}x{width}, ranks {ranks}"] = ratios(
                best, {name: "base" for name in steps if name != "base"}
            )
    save("many_adapters_products", options, "one adapter for all rows: `one`", ratios=found)


def ways(
    batch: int, tokens: int, width: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to multiply, which give the same."""
    x, weight = torch.randn(batch, tokens, width).to(dtype), (0.02 * torch.randn(width, width)).to(dtype)
    bias = torch.randn(width).to(dtype)
    downs = [(0.05 * torch.randn(rank, width)).to(dtype) for rank in ranks]
    ups = [(0.05 * torch.randn(width, rank)).to(dtype) for rank in ranks]
    most = max(ranks)
    down = torch.stack([F.pad(d, (0, 0, 0, most - len(d))) for d in downs]).transpose(1, 2)
    up = torch.stack([F.pad(u, (0, most - u.shape[1])) for u in ups]).transpose(1, 2).contiguous()
    all_down, all_up = torch.cat(downs), torch.cat([u.t() for u in ups]).contiguous()
    owner = torch.repeat_interleave(torch.arange(batch), torch.tensor(ranks))
    mask = (owner == torch.arange(batch)[:, None]).to(dtype)[:, None]

    def base() -> torch.Tensor:
        return F.linear(x, weight, bias)

    def one() -> torch.Tensor:
        rows = x.view(-1, width)
        return F.linear(rows, weight, bias).addmm_(rows @ downs[0].t(), ups[0].t())

    def rows() -> torch.Tensor:
        y = base()
        for row in range(batch):
            y[row].addmm_(x[row] @ downs[row].t(), ups[row].t())
        return y

    def bmm() -> torch.Tensor:
        return base().baddbmm_(torch.bmm(x, down), up)

    def stack() -> torch.Tensor:
        y = base()
        h = (x.view(-1, width) @ all_down.t()).view(batch, tokens, -1).mul_(mask)
        y.view(-1, width).addmm_(h.view(batch * tokens, -1), all_up)
        return y

    for other in (bmm, stack):
        torch.testing.assert_close(other().float(), rows().float(), rtol=0.05, atol=0.05)
    return {"base": base, "one": one, "rows": rows, "bmm": bmm, "stack": stack}


if __name__ == "__main__":
    main()

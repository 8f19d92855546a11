"""Compiled: the base's repeated blocks through torch.compile, one by one.

A block is compiled once for all that are alike, so that a first step costs seconds where a whole model costs minutes.
Sizes are left open: another bucket, another number of pictures, another strength and another rank run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from scumble.adapters.compiling import adaptable
from scumble.training.engine import Engine, Unsuited, Work

if TYPE_CHECKING:
    from scumble.data.record import Batch

VERSIONS = 64
"""Kinds of one class of block (widths, with and without gradients) that are compiled before torch gives up."""

BACKEND = "inductor"
"""torch.compile's backend."""


class CompiledEngine(Engine):
    """As eager, with compiled blocks. The first steps, and the first of another kind, take seconds longer."""

    name: ClassVar[str] = "compile"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        if not work.blocks:
            raise Unsuited("this base names no repeated blocks")
        why = hindrance(next(iter(work.parameters)).device)
        if why:
            raise Unsuited(why)
        self._blocks = CompiledBlocks(work.blocks)

    def backward(self, batch: Batch, samples: int, *, last: bool) -> Tensor:
        """See `Engine`."""
        try:
            with self._blocks.running():
                return super().backward(batch, samples, last=last)
        except errors() as error:
            if self.work.accelerator.num_processes > 1:  # the others may be waiting for this process
                raise
            raise Unsuited(f"torch.compile failed: {said(error)}") from error

    def close(self) -> None:
        """See `Engine`."""
        self._blocks.close()


class CompiledBlocks:
    """Blocks that run compiled inside `running`, and as they are elsewhere."""

    def __init__(self, blocks: Sequence[nn.Module], backend: str | Callable[..., Any] | None = None) -> None:
        """`backend`: of torch.compile; None is `BACKEND`."""
        self._compiled = {
            block: torch.compile(block.forward, backend=backend or BACKEND, dynamic=True) for block in blocks
        }
        self._left = ExitStack()
        try:
            self._left.enter_context(adaptable(blocks))
        except BaseException:
            self._left.close()
            raise

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the blocks run compiled, backward too; what is not compiled yet is compiled when it is met."""
        with open_sizes():
            for block, compiled in self._compiled.items():
                block.forward = compiled  # type: ignore[method-assign]
            try:
                yield
            finally:
                for block in self._compiled:
                    del block.forward

    def close(self) -> None:
        """Take what was left on weights and adapters off again."""
        self._left.close()


@contextmanager
def open_sizes() -> Iterator[None]:
    """Inside, torch.compile leaves a parameter's size open unless it is marked (see `adapters.compiling`), takes sizes
    that happen to be equal for different, draws dropout's numbers as eager code does, and says so where it would
    silently stop compiling."""
    import torch._dynamo
    import torch._inductor.config
    from torch.fx.experimental import _config as shapes

    wanted: tuple[tuple[ModuleType, dict[str, Any]], ...] = (
        (
            torch._dynamo.config,
            {
                "force_parameter_static_shapes": False,
                "recompile_limit": VERSIONS,
                "cache_size_limit": VERSIONS,  # its name before torch 2.7
                "fail_on_recompile_limit_hit": True,
            },
        ),
        (shapes, {"use_duck_shape": False}),
        (torch._inductor.config, {"fallback_random": True}),
    )
    with ExitStack() as changed:
        for module, values in wanted:
            config: Any = module
            known = {name: value for name, value in values.items() if hasattr(config, name)}
            if "recompile_limit" in known:
                known.pop("cache_size_limit", None)
            changed.enter_context(config.patch(**known))
        yield


def hindrance(device: torch.device) -> str | None:
    """Why torch.compile can't work here, as the end of a sentence; None where nothing is known to be in its way."""
    import torch._dynamo

    if not torch._dynamo.is_dynamo_supported():
        return "this version of torch can't compile on this version of Python"
    if BACKEND != "inductor":
        return None
    if device.type == "cpu":
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler
        except ImportError:  # an older torch: the first step will tell
            return None
        try:
            get_cpp_compiler()
        except Exception as error:
            return f"there is no C++ compiler ({said(error)}). Install one, such as g++"
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "there is no working Triton for this GPU. Install the package triton"
    return None


def errors() -> tuple[type[BaseException], ...]:
    """What torch raises where it can't compile, in the versions that it has had."""
    import torch._dynamo.exc as dynamo
    import torch._inductor.exc as inductor

    names: tuple[str, ...] = ("FailOnRecompileLimitHit", "TorchDynamoException", "OperatorIssue")
    names += ("SubgraphLoweringException", "InvalidCxxCompiler", "CppCompileError", "CppWrapperCodegenError")
    found = (getattr(module, name, None) for module in (dynamo, inductor) for name in names)
    return tuple(dict.fromkeys(kind for kind in found if kind is not None))


def said(error: BaseException) -> str:
    """The first lines of an error that may be pages long, as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Output:" in lines:  # of a compiler, after the whole command
        lines = lines[:1] + lines[lines.index("Output:") + 1 :]
    text = " ".join(lines[:3]) or "no reason given"
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"

"""TrainSettings: how long to train, how much at once, how precisely, and what to keep on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from scumble.settings import Settings
from scumble.training.objective import ObjectiveSettings
from scumble.training.optimizers import OptimizerSettings
from scumble.training.schedules import ScheduleSettings


class TrainSettings(Settings):
    """How the run goes."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=4, ge=1)
    """Pictures in one forward pass of one process."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; each step sees batch x accumulate x processes pictures."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Arithmetic of forward and backward: no (fp32), fp16 (GPU only) or bf16. What trains is stored in fp32
    always."""
    engine: Literal["eager", "compile", "graph"] = "eager"
    """How a step is computed: eager (one operation after the other), compile (torch.compile on the base's repeated
    blocks; needs a C++ compiler, on a GPU Triton; the first steps take longer) or graph (whole steps recorded as CUDA
    graphs, on a GPU). What can't be done here is done eagerly, and said."""
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none"
    """What the frozen weights in the denoiser's blocks are held in: none (as they are, in the precision), int8 or fp8
    (about 1 byte each, int8 is the more exact) or nf4 (half a byte). Each is made anew when it is multiplied: less
    memory, a longer step. What trains is fp32 as ever."""
    gradient_checkpointing: bool | Literal["auto"] | tuple[str, ...] = False
    """Recompute activations in the backward pass: true is about half the memory for about 1.4 times the time. Patterns
    of blocks, e.g. ["unet.up_blocks.*"], recompute these alone; auto takes the cheapest set that fits
    memory_budget."""
    memory_budget: float | None = Field(default=None, gt=0)
    """GiB that a run may take: one that is predicted to need more is refused before it begins, with the settings that
    would fit (see docs/memory.md). Unset: on a GPU what is free there, on a CPU no limit."""
    offload: Literal["none", "blocks"] = "none"
    """blocks: the denoiser's frozen blocks wait in host memory, and each is sent to the GPU one block ahead of its
    turn. Two of them are there at a time; a step is longer where they arrive later than they are needed. With
    engine = "eager", in one process."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm; none leaves them as they are."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """All randomness of the run comes from it."""
    deterministic: bool = False
    """Ask the GPU for bit-equal results at each run; slower. On the CPU they are bit-equal anyway."""
    tf32: bool = False
    """Let fp32 products on the GPU round their factors to 19 bits: faster, a little less exact."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a running mean of the weights, which is then what is saved; 0.999 is usual. None: off."""
    checkpoint_every: int = Field(default=500, ge=0)
    """Steps between checkpoints that a run can go on from; 0: only when interrupted."""
    checkpoint_limit: int | None = Field(default=None, ge=1)
    """Keep at most this many, the newest; none keeps all."""
    preview_every: int = Field(default=0, ge=0)
    """Steps between pictures drawn from the saved adapter; 0: none on the way."""
    held_out_every: int = Field(default=0, ge=0)
    """Steps between measurements of the loss on held-out pictures; 0: none on the way."""
    nonfinite_limit: int = Field(default=10, ge=1)
    """Stop after this many steps in a row whose loss or gradient was not finite."""
    process_timeout: float = Field(default=30, ge=5)
    """Seconds without a sign of life from a process on another machine after which the run ends; on the same machine
    it is known at once. How long a process works makes no difference."""
    log_every: int = Field(default=1, ge=1)
    """Steps between reports. On a fast GPU, 10 or more spares it from waiting for the host at each step."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How weights are moved."""
    schedule: ScheduleSettings = ScheduleSettings()
    """How the learning rate changes over the run."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """What is minimised."""

    @model_validator(mode="after")
    def _blocks_that_move_are_not_recorded(self) -> TrainSettings:
        if self.offload != "none" and self.engine != "eager":
            raise ValueError(
                f'engine = "{self.engine}" keeps to the places where weights were when it began, and offload = '
                f'"{self.offload}" moves them. Choose one of both: the engine for time, offload for memory.'
            )
        return self

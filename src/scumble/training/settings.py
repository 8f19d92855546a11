"""TrainSettings: how long to train, how much at once, how precisely, and what to keep on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about half the memory for about 1.4 times the time."""
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
    log_every: int = Field(default=1, ge=1)
    """Steps between reports. On a fast GPU, 10 or more spares it from waiting for the host at each step."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How weights are moved."""
    schedule: ScheduleSettings = ScheduleSettings()
    """How the learning rate changes over the run."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """What is minimised."""

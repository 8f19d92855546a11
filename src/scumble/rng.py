"""Streams: random numbers by (seed, purpose, position), so that nothing has to be saved to resume.

A draw depends on its name and on nothing else: not on how many draws came before it, not on the number of workers
or processes, not on whether a validation ran in between. The idea is that of counter-based generators (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), built here on SHA-256 to seed ordinary generators.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Streams:
    """All randomness of a run.

    Law: two calls with equal arguments give equal numbers, in any process and in any order.
    """

    seed: int

    def number(self, purpose: str, *position: int) -> int:
        """A 63-bit integer for (seed, purpose, position)."""
        text = f"{self.seed}/{purpose}/" + "/".join(map(str, position))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def generator(self, purpose: str, *position: int) -> torch.Generator:
        """A fresh CPU torch generator for (seed, purpose, position)."""
        import torch

        return torch.Generator().manual_seed(self.number(purpose, *position))

    def python(self, purpose: str, *position: int) -> random.Random:
        """A fresh `random.Random` for (seed, purpose, position)."""
        return random.Random(self.number(purpose, *position))

    def normal(self, purpose: str, positions: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, (len(positions), *shape) fp32 on the CPU, each row from its own position.

        Rows are drawn one by one so that a sample's noise does not depend on the batch it happens to be in.
        """
        import torch

        return torch.stack(
            [torch.randn(tuple(shape), generator=self.generator(purpose, p)) for p in positions]
        )

    def uniform(self, purpose: str, positions: Sequence[int]) -> torch.Tensor:
        """Uniform numbers in [0, 1), (len(positions),) fp32 on the CPU, each from its own position."""
        import torch

        return torch.tensor([self.python(purpose, p).random() for p in positions], dtype=torch.float32)

"""Numerics: what DistributedDataParallel is told of frozen buffers, in the words that this torch knows."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from scumble.training.numerics import make_accelerator


def test_frozen_buffers_are_not_broadcast_and_nothing_warns(tmp_path: Path) -> None:
    options = make_accelerator("no", torch.device("cpu")).ddp_handler.to_kwargs()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), **options)
        quiet = getattr(wrapped, "forward_sync_buffers", None)
        assert (wrapped.broadcast_buffers if quiet is None else quiet) is False
    finally:
        torch.distributed.destroy_process_group()

"""Rows of a step's logits in groups that are sampled alike, and their parameters on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from engine.device import to_device
from engine.messages import SamplingParams
from engine.sample_row import SampleRow


class RowGroup:
    """Rows of a batch that are sampled alike."""

    def __init__(self, index: list[int], members: list[SampleRow], device: torch.device) -> None:
        self.index = to_device(index, device)
        """int64 [R]"""
        self.members = members
        self._columns: dict[str, Tensor] = {}

    def column(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter of each row. -> [R, 1]."""
        if name not in self._columns:
            values = [getattr(row.sampling, name) for row in self.members]
            self._columns[name] = to_device(values, self.index.device, dtype)[:, None]
        return self._columns[name]

    @cached_property
    def log_min_p(self) -> Tensor:
        """[R, 1], -inf where there is no min-p."""
        return self.column("min_p").log()

    @cached_property
    def seeds(self) -> Tensor:
        """int64 [R]"""
        return to_device([row.seed for row in self.members], self.index.device)

    def steps(self) -> Tensor:
        """Tokens of each answer so far. -> int64 [R]."""
        return to_device([row.num_output_tokens for row in self.members], self.index.device)


class RowGroups:
    """Rows that are sampled together. While the same sequences decode it is kept, and nothing is looked up again."""

    def __init__(self, members: list[SampleRow], device: torch.device) -> None:
        self.members = members
        self._device = device
        self._groups: dict[Callable[[SamplingParams], bool], RowGroup | None] = {}

    def rows(self, wanted: Callable[[SamplingParams], bool]) -> RowGroup | None:
        """Rows whose sampling parameters satisfy `wanted`, if any."""
        if wanted not in self._groups:
            index = [place for place, row in enumerate(self.members) if wanted(row.sampling)]
            members = [self.members[place] for place in index]
            self._groups[wanted] = RowGroup(index, members, self._device) if index else None
        return self._groups[wanted]

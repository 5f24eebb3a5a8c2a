"""Which rows of a step's samples stand: those whose drafts are the very tokens that were sampled.

The token of a row is a function of its logits, the request's seed and its place in the answer, for greedy rows and
sampled ones alike (see noise). A draft is accepted when it equals the token sampled in the row before it, so the
rows up to the first draft that does not are exactly what one step for each would have sampled: no distribution has
to be corrected, and a seed gives the same answer with and without drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.device import to_device
from engine.sample_row import SampleRow


def verify(token_ids: Tensor, rows: list[SampleRow]) -> Tensor:
    """Whether each row's token belongs to the answer; a sequence's first always does. int64 [R] -> bool [R]."""
    lengths = [len(row.draft_token_ids) for row in rows]
    if not any(lengths):
        return torch.ones_like(token_ids, dtype=torch.bool)
    device = token_ids.device
    drafts = to_device([row.draft_token_ids[-1] if row.draft_token_ids else -1 for row in rows], device)
    num_drafts = to_device(lengths, device)
    num_wrong = ((token_ids.roll(1) != drafts) & (num_drafts > 0)).cumsum(0)
    first = torch.arange(len(rows), device=device) - num_drafts
    return num_wrong == num_wrong[first]

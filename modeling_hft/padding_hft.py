"""Rows of different lengths as one tensor."""

from collections.abc import Sequence

import torch


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device, filler: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T_i] -> one tensor [B, T] in which all of them end together, and the mask [B, T] of what is theirs."""
    length = max(len(row) for row in rows)
    filled = [[filler] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(filled, device=device), torch.tensor(mask, device=device)

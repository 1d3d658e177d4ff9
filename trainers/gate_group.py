"""The gates' group in an optimizer."""

import torch
from torch import nn


def group_gates(optimizer: torch.optim.Optimizer, gates: nn.Module, learning_rate: float) -> None:
    """Gives the gates that train a last group of their own, without weight decay; no group if none does."""
    own = {id(gate): gate for gate in gates.parameters() if gate.requires_grad}
    if not own:
        return
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    optimizer.add_param_group({"params": list(own.values()), "lr": learning_rate, "weight_decay": 0.0})

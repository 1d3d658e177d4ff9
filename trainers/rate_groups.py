"""The optimizer's groups: gates have a learning rate of their own, and so has a task where it is said."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from hft.modeling_hft import HFTForCausalLM

from .hft_config import HFTTrainingConfig


def group_by_rate(
    optimizer: torch.optim.Optimizer, model: HFTForCausalLM, tasks: Sequence[str], args: HFTTrainingConfig
) -> None:
    """Splits the groups of an optimizer that has not stepped yet, so that each has one learning rate.

    Nodes and pages come first, the highest rate before lower ones; then the gates that learn, without weight decay.

    Args:
        optimizer: its groups change.
        model: whose parameters it trains.
        tasks: those that learn.
        args: their learning rates, see `HFTTrainingConfig`.
    """
    rate: dict[int, float] = {}
    gates: dict[float, list[nn.Parameter]] = {}
    for task in tasks:
        its_rate, gate_rate = args.rates(task)
        for name, parameter in model.learning_parameters(task).items():
            if name.startswith("hft_gates."):
                gates.setdefault(gate_rate, []).append(parameter)
            else:  # a page is written by several
                rate[id(parameter)] = args.learning_rate if name.startswith("hft_memory.") else its_rate

    def its_rate_of(parameter: nn.Parameter) -> float:
        return rate[id(parameter)]

    groups = []
    for group in optimizer.param_groups:
        others = [parameter for parameter in group["params"] if id(parameter) in rate]
        by_rate = itertools.groupby(sorted(others, key=its_rate_of, reverse=True), its_rate_of)
        groups += [{**group, "params": list(parameters), "lr": one} for one, parameters in by_rate]
    optimizer.param_groups[:] = groups
    optimizer.defaults["lr"] = args.learning_rate  # by which some schedules count, where the class has one of its own
    for one, parameters in gates.items():
        optimizer.add_param_group({"params": parameters, "lr": one, "weight_decay": 0.0})


def rate_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    """The learning rate that a parameter has now; soonest found for gates, whose groups are last and small."""
    groups = reversed(optimizer.param_groups)
    return next(group["lr"] for group in groups if any(its is parameter for its in group["params"]))

"""Whether what a stage trains with can be made: its optimizer, its schedule, its kernels."""

import copy
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments


def check_optimizer(args: TrainingArguments) -> None:
    """Makes the optimizer and its schedule once, for one number, as each stage makes them: before anything is loaded.

    Raises:
        ValueError: a package that is not installed, or arguments with which transformers cannot make them.
    """
    if args.use_liger_kernel:
        raise ValueError("`use_liger_kernel` goes by a model's type, and knows none called 'hft'; leave it out.")
    if any(name in args.optim.value for name in ("galore", "apollo")):
        raise ValueError(
            f"`optim` is '{args.optim.value}', which projects the gradients of whole weights, and HFT's nodes are of low "
            "rank already: it would be plain AdamW; choose another, such as 'adamw_torch' or 'paged_adamw_8bit'."
        )
    trial: Any = object.__new__(Trainer)  # just what the two methods below read
    trial.args, trial.model = copy.copy(args), nn.Sequential(nn.Linear(1, 1, bias=False))
    trial.optimizer = trial.lr_scheduler = trial.optimizer_cls_and_kwargs = None
    if args.optim_target_modules is not None:  # names that are found in the real model only
        trial.args.optim_target_modules = "all-linear"
    for make, what, options in (
        (trial.create_optimizer, "optim", "optim_args"),
        (lambda: trial.create_scheduler(1), "lr_scheduler_type", "lr_scheduler_kwargs"),
    ):
        try:
            make()
        except AttributeError:
            return  # a version of transformers that reads more of a trainer: then the first stage will tell
        except Exception as error:  # each optimizer complains in its own way
            raise ValueError(
                f"`{what}` is '{getattr(args, what).value}' and `{options}` {getattr(args, options)!r}, with which training "
                f"could not begin ({error}); correct them, or leave them out."
            ) from error

"""Means for the log, over tokens: TRL's are over batches, where one short row would count as much as eight long ones; and of
stages together.
"""

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any


class TokenMeans:
    """Totals and counts of tokens since the last log, by mode (`"train"`, `"eval"`) and name."""

    def __init__(self):
        self._sums: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        self.computed, self.passed = 0, 0  # micro-batches since the last log: that learnt, and of tasks that have left

    def begin_stage(self) -> None:
        """Forgets what was not logged yet."""
        self.clear("train")
        self.computed, self.passed = 0, 0

    def of_computed(self, logs: MutableMapping[str, float]) -> None:
        """Makes the Trainer's mean loss one over the micro-batches that learnt, and takes it away where none did."""
        if "loss" in logs and self.passed:
            logs["loss"] *= (self.computed + self.passed) / max(self.computed, 1)
            for name in ("loss", "grad_norm") if not self.computed else ():
                logs.pop(name, None)
        if "learning_rate" in logs:
            self.computed, self.passed = 0, 0

    def clear(self, mode: str) -> None:
        """Forgets one mode's sums."""
        self._sums[mode] = {}

    def add(self, mode: str, name: str, total: float, count: float) -> None:
        """Takes in a batch: the sum over its tokens, and how many they are."""
        before = self._sums[mode].get(name, (0.0, 0.0))
        self._sums[mode][name] = before[0] + total, before[1] + count

    def take_the_place(self, metrics: MutableMapping[str, defaultdict[str, list[float]]], mode: str) -> None:
        """Puts the means into a trainer's metrics, in place of what it has under their names, and begins anew."""
        for name, (total, count) in self._sums[mode].items():
            metrics[mode][name] = [total / max(count, 1)]
        self._sums[mode] = {}


def in_all(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The Trainer's metrics of several trainings as one: seconds and operations in all, samples and steps a second."""
    seconds = sum(its["train_runtime"] for its in stages)
    whole = {"train_runtime": seconds, "total_flos": sum(its.get("total_flos", 0.0) for its in stages)}
    for name in ("train_samples_per_second", "train_steps_per_second"):
        number = sum(its.get(name, 0.0) * its["train_runtime"] for its in stages)
        whole[name] = round(number / seconds, 3) if seconds else 0.0
    if stages and "epoch" in stages[-1]:
        whole["epoch"] = stages[-1]["epoch"]
    return whole


def mean_loss(log_history: Sequence[dict[str, Any]]) -> float:
    """The mean training loss of the steps that were logged, without those in which nothing was learnt; 0 if none was."""
    total, count, last = 0.0, 0, 0
    for logs in log_history:
        if "loss" in logs:
            total += logs["loss"] * (logs["step"] - last)
            count += logs["step"] - last
        if "loss" in logs or "learning_rate" in logs:
            last = logs["step"]
    return total / count if count else 0.0

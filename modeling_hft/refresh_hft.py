"""Refresh: an old task learns anew how much to let in of all that exists now. Only its gates move, and only if it helps.

B batch, T tokens, V vocabulary, L layers, N sources.
"""

import copy
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .gates_hft import HFTGateTable
from .padding_hft import left_padded


Row = Mapping[str, Sequence[int]]  # tokenised: {"input_ids": [T], "labels": [T]}

# Of one pass over rows of any length; at least one row.
MOST_TOKENS = 2**11  # padding included
MOST_LOGITS = 2**26  # each takes about 16 bytes: in the backbone's dtype, in float32, and its gradient


@dataclass(frozen=True)
class HFTRefresh:
    """What a refresh found out.

    Args:
        task: whose gates were learnt anew.
        kept: whether the new gates took the place of the old ones.
        before, after: mean loss a validation row with the old and the new gates, in nats a token.
        error: the standard error of the mean difference of the two over the validation rows.
        gates: the task's gates as they are now.
    """

    task: str
    kept: bool
    before: float
    after: float
    error: float
    gates: HFTGateTable

    def __str__(self) -> str:
        change = (
            f"validation loss {self.before:.4f} -> {self.after:.4f}, standard error of the change {self.error:.4f}"
        )
        if self.kept:
            sources = ", ".join(f"{name} {mean:.2f}" for name, mean in self.gates.mean().items())
            return f"{self.task}: refreshed; {change}. Mean gates: {sources}."
        return f"{self.task}: left as it was; {change}, no gain beyond it."


class HFTRefreshing:
    """The part of `HFTPreTrainedModel` that refreshes gates."""

    @torch.inference_mode(False)
    def refresh_gates(
        self,
        task: str,
        dataset: Iterable[Row],
        *,
        validation: Iterable[Row] | None = None,
        num_steps: int = 30,
        batch_size: int = 8,
        learning_rate: float = 5e-2,
        threshold: float = 0.05,
        seed: int = 0,
    ) -> HFTRefresh:
        """Learns a sealed task's gates anew over all nodes and memory pages that are sealed by now.

        Nodes and pages that the task did not read start at 0. Gates that end nearer to 0 than `threshold` are set to exactly
        0, and a source beside the path whose gates are all 0 is not read. Then the loss on validation rows decides: the new
        gates are kept if it fell by more than its standard error; else the task is left as it was, to the bit. Other tasks
        never change: a child has gates of its own. Layers are checkpointed if the model's are in training.

        Args:
            task: a sealed task.
            dataset: tokenised rows {"input_ids": [T], "labels": [T]}, -100 where there is no loss; a small sample is enough.
            validation: rows of the same form; by default every third row of `dataset`, which is then not learnt from.
            num_steps: steps of Adam, 1 or more.
            batch_size: rows a step; 1 or more.
            learning_rate: of the gates; above 0.
            threshold: 0 or more.
            seed: of the order of the rows.

        Returns:
            What was found out.

        Raises:
            ValueError: an unknown or open task, a number out of its range, or fewer than two rows to learn from or to
                validate on; a folded model; or within `activate`.
        """
        self._check_unfolded()
        self._check_inactive()
        for name, number, least in (
            ("num_steps", num_steps, 1),
            ("batch_size", batch_size, 1),
            ("threshold", threshold, 0),
        ):
            if not number >= least:
                raise ValueError(f"`{name}` of the refresh is {number}; it must be {least} or more.")
        if not learning_rate > 0:
            raise ValueError(f"`learning_rate` of the refresh is {learning_rate}; it must be above 0.")
        entry = self.config.sealed_task(task)
        rows = list(dataset)
        checks = list(validation) if validation is not None else rows[::3]
        if validation is None:
            rows = [row for place, row in enumerate(rows) if place % 3]
        if min(len(rows), len(checks)) < 2:
            raise ValueError(
                f"Refreshing {task!r} needs two rows or more to learn from and two to validate on; there are {len(rows)} "
                f"and {len(checks)}."
            )
        old_entry, old_gates = copy.deepcopy(entry), self.hft_gates.of(task)
        with frozen(self):
            before = self.losses(task, checks, batch_size)
            try:
                self._read_everything(task)
                self._fit_gates(task, rows, num_steps, batch_size, learning_rate, seed)
                self._drop_small_gates(task, threshold)
                after = self.losses(task, checks, batch_size)
                gain, error = mean_and_error([old - new for old, new in zip(before, after, strict=True)])
                kept = gain > error
            except BaseException:
                kept = False
                raise
            finally:
                if not kept:
                    entry.update(old_entry)
                    self.hft_gates.register_parameter(f"g_{task}", old_gates)
        return HFTRefresh(task, kept, statistics.mean(before), statistics.mean(after), error, self.gates(task))

    @torch.no_grad()
    def _read_everything(self, task: str) -> None:
        """Adds all sealed nodes and pages to what a task reads, behind gates that are 0."""
        entry = self.config.task(task)
        path = self.hierarchy.path(task)
        self._take_gates(
            task,
            borrows=[name for name in self.config.sealed_tasks() if name not in path],
            pages=[page["id"] for page in self.config.pages if page["sealed"] or page["id"] in entry["pages"]],
        )

    @torch.no_grad()
    def _drop_small_gates(self, task: str, threshold: float) -> None:
        """Sets small gates to exactly 0, and no longer reads what is 0 at all layers and not on the path."""
        gates_LN = self.hft_gates.of(task)
        gates_LN[gates_LN.abs() < threshold] = 0
        is_read = dict(zip(self.sources(task).labels(), gates_LN.any(0).tolist(), strict=True))
        entry = self.config.task(task)
        self._take_gates(
            task,
            borrows=[name for name in entry["borrows"] if is_read[name]],
            pages=[page_id for page_id in entry["pages"] if is_read[f"page:{page_id}"]],
        )

    def _take_gates(self, task: str, borrows: list[str], pages: list[int]) -> None:
        """Changes what a task reads; gates on what it reads already keep their values, others are 0."""
        old = dict(zip(self.sources(task).labels(), self.hft_gates.of(task).detach().unbind(1), strict=True))
        self.config.task(task).update(borrows=borrows, pages=pages)
        self._make_gates(task)
        gates_LN = self.hft_gates.of(task).requires_grad_(False)
        for column, label in enumerate(self.sources(task).labels()):
            gates_LN[:, column] = old.get(label, 0.0)

    def _fit_gates(
        self, task: str, rows: list[Any], num_steps: int, batch_size: int, learning_rate: float, seed: int
    ) -> None:
        gates_LN = self.hft_gates.of(task).requires_grad_(True)
        optimizer = torch.optim.Adam([gates_LN], lr=learning_rate)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(num_steps):
            if len(order) < batch_size:
                order += torch.randperm(len(rows), generator=generator, device="cpu").tolist()
            chosen, order = order[:batch_size], order[batch_size:]
            (gates_LN.grad,) = self.loss_gradients(task, [rows[i] for i in chosen], [gates_LN])
            optimizer.step()
        gates_LN.grad = None
        gates_LN.requires_grad_(False)

    @torch.no_grad()
    def losses(self, task: str, rows: Sequence[Row], batch_size: int) -> list[float]:
        """As `row_losses`, of any number of rows: so many at once, or as many of them as a pass has room for."""
        return [
            float(loss)
            for begin in range(0, len(rows), batch_size)
            for part in self._parts(rows[begin : begin + batch_size])
            for loss in self.row_losses(task, part)
        ]

    def loss_gradients(self, task: str, rows: Sequence[Row], parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of the mean over rows of their losses (`row_losses`) by each of these parameters.

        The rows are taken in parts that a pass has room for. Where the model's layers are checkpointed in training, they are
        here, too, whether or not the model is in evaluation mode.
        """
        total = [torch.zeros_like(parameter) for parameter in parameters]
        with torch.enable_grad(), _checkpointed(self):
            for part in self._parts(rows):
                loss = torch.stack(self.row_losses(task, part)).sum() / len(rows)
                for whole, its in zip(
                    total, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True
                ):
                    whole += its
        return total

    def _parts(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows in parts of at most `MOST_TOKENS` tokens and `MOST_LOGITS` logits each, as `row_losses` pads them."""
        vocab_size = self.config.text_config.vocab_size
        begin = length = scored = 0
        for end, row in enumerate(rows):
            first = next((place for place, label in enumerate(row["labels"]) if place and label != -100), 0)
            length, scored = max(length, len(row["labels"])), max(scored, len(row["labels"]) - first)
            count = end - begin + 1
            if end > begin and (count * length > MOST_TOKENS or count * scored * vocab_size > MOST_LOGITS):
                yield rows[begin:end]
                begin, length, scored = end, len(row["labels"]), len(row["labels"]) - first
        if rows[begin:]:
            yield rows[begin:]

    def row_losses(self, task: str, rows: Sequence[Row]) -> list[torch.Tensor]:
        """The mean loss of each row's labels on a task's path, with gradients where they are on.

        Rows are padded on the left, so that all answers end together, and only positions that some row is scored on meet the
        head.

        Args:
            task: whose path; `"backbone"` for the plain backbone.
            rows: tokenised {"input_ids": [T], "labels": [T]}, -100 where there is no loss; a first token has none.

        Returns:
            A scalar a row, in nats a token.

        Raises:
            ValueError: a row of fewer than two tokens, or with another number of labels than tokens.
            TypeError: a decoder without a head.
        """
        if not self.can_generate():
            raise TypeError(f"{type(self).__name__} has no head to compute a loss with; load HFTForCausalLM.")
        if not rows:
            return []
        for row in rows:
            if len(row["input_ids"]) < 2 or len(row["labels"]) != len(row["input_ids"]):
                raise ValueError(
                    f"A row of task {task!r} has {len(row['input_ids'])} tokens and {len(row['labels'])} labels; give two "
                    "tokens or more, and a label for each."
                )
        device = self.get_input_embeddings().weight.device
        ids_BT, mask_BT = left_padded([row["input_ids"] for row in rows], device)
        # Nothing comes before a row's first token; a row that is padded would score it from the padding.
        labels_BT, _ = left_padded([[-100, *row["labels"][1:]] for row in rows], device, filler=-100)
        length = ids_BT.shape[1]
        first = int((labels_BT != -100).any(0).int().argmax())
        keep = min(length - first, length - 1)  # positions that some row is scored on
        logits_BTV = self(
            ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=keep + 1,
            use_cache=False,
            task=task,
        ).logits[:, :-1]
        labels_BT = labels_BT[:, -keep:]
        loss_BT = torch.nn.functional.cross_entropy(
            logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=-100, reduction="none"
        )
        count_B = (labels_BT != -100).sum(1).clamp(min=1)
        return list((loss_BT.sum(1) / count_B).unbind())


@contextmanager
def _checkpointed(model: Any):
    """Layers whose checkpointing is switched on do so in evaluation mode, too, in which what is in them stays."""
    layers = [its for its in model.modules() if isinstance(its, GradientCheckpointingLayer) and not its.training]
    for layer in layers:
        layer.training = layer.gradient_checkpointing
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


@contextmanager
def frozen(model: Any):
    """Evaluation mode, nothing trainable; afterwards as before."""
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of numbers, and its standard error (of one number: 0); NaN if one of them is not finite."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))

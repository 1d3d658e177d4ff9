"""How much a source's scores of options say about the right answers, whatever it takes the answers' form or shares to be.

N rows, O options.
"""

import math
from collections.abc import Sequence

import torch


FOLDS = 4
_PENALTY = 0.1  # on each squared number of the fit, in nats: a normal prior of variance 5


def calibrated_losses(
    likelihoods: Sequence[Sequence[float]], answers: Sequence[int], options: Sequence[Sequence[str]]
) -> list[float]:
    """The loss of each row once scale and shares are taken out: logistic regression on the scores of options, cross-fitted.

    Any training teaches a model the form of an answer, and how sure to be; either lowers a plain loss without saying which
    answer is right. Here the log-likelihoods of a row's options are centred, scaled by one number, and each option gets an
    offset; all are fitted on the other rows of four folds. As calibration of scores by Platt 1999 (Probabilistic Outputs for
    Support Vector Machines), for more than two answers. The number may be negative: who is always wrong knows what is right.

    Args:
        likelihoods: a row's log-likelihood of each option, in nats; all the same: the loss of guessing by shares.
        answers: the place of the right option.
        options: the texts; where rows have different ones, no offsets are fitted.

    Returns:
        N losses, in nats: about the entropy of the shares for a source that knows nothing, 0 for one that knows all. NaN
        where a likelihood is not finite.
    """
    if not all(math.isfinite(value) for row in likelihoods for value in row):
        return [float("nan")] * len(answers)
    names = list(dict.fromkeys(tuple(row) for row in options))
    order = list(dict.fromkeys(text for row in options for text in row))
    with_offsets = all(set(row) == set(order) for row in names)
    width = max(len(row) for row in likelihoods)
    scores_NO = torch.zeros(len(answers), width, dtype=torch.float64, device="cpu")
    known_NO = torch.zeros(len(answers), width, dtype=torch.bool, device="cpu")
    which_NO = torch.zeros(len(answers), width, dtype=torch.long, device="cpu")
    for i, row in enumerate(likelihoods):
        values = torch.tensor(row, dtype=torch.float64, device="cpu")
        scores_NO[i, : len(row)] = values - values.mean()
        known_NO[i, : len(row)] = True
        which_NO[i, : len(row)] = torch.tensor([order.index(text) for text in options[i]], device="cpu")
    if with_offsets:  # what an option gets in all rows says nothing of one
        for place in range(len(order)):
            is_it_NO = known_NO & (which_NO == place)
            scores_NO[is_it_NO] -= scores_NO[is_it_NO].mean()
    scores_NO /= scores_NO[known_NO].square().mean().sqrt().clamp(min=1e-6)
    answers_N = torch.tensor(answers, device="cpu")

    def logits(numbers: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        scaled_NO = numbers[0] * scores_NO[rows_N]
        if with_offsets:
            scaled_NO = scaled_NO + numbers[1:][which_NO[rows_N]]
        return scaled_NO.masked_fill(~known_NO[rows_N], -torch.inf)

    order_N = torch.tensor(sorted(range(len(answers)), key=lambda i: options[i][answers[i]]), device="cpu")
    fold_N = torch.empty_like(order_N)
    # Each answer in all folds: else the shares would differ.
    fold_N[order_N] = torch.arange(len(answers), device="cpu") % FOLDS
    losses_N = torch.zeros(len(answers), dtype=torch.float64, device="cpu")
    for fold in range(min(FOLDS, len(answers))):
        others_N, its_N = (fold_N != fold).nonzero()[:, 0], (fold_N == fold).nonzero()[:, 0]
        numbers = _fit(lambda n, r=others_N: _loss(logits(n, r), answers_N[r]).sum(), 1 + len(order))
        losses_N[its_N] = _loss(logits(numbers, its_N), answers_N[its_N])
    return losses_N.tolist()


def _loss(logits_NO: torch.Tensor, answers_N: torch.Tensor) -> torch.Tensor:
    return -logits_NO.log_softmax(1).gather(1, answers_N[:, None])[:, 0]


def _fit(loss, count: int) -> torch.Tensor:
    """The numbers with the least penalised loss, which is convex, starting at 0."""
    with torch.enable_grad(), torch.inference_mode(False):
        numbers = torch.zeros(count, dtype=torch.float64, requires_grad=True, device="cpu")
        optimizer = torch.optim.LBFGS([numbers], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            total = loss(numbers) + _PENALTY * numbers.square().sum()
            total.backward()
            return total

        optimizer.step(closure)
    return numbers.detach()

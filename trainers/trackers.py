"""What TRL's `report_to` does not do by itself: pictures, and a run a stage."""

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import (
    ClearMLCallback,
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hft.hierarchy_hft import nearest


# Their names are not their packages', they need none, or they give way to another.
UNCHECKED = ("azure_ml", "dagshub", "flyte")


def check_trackers(report_to: Iterable[str]) -> None:
    """Whether `report_to` names trackers that are there, before anything is loaded.

    Args:
        report_to: as transformers' training arguments have it in the end: a list.

    Raises:
        ValueError: an unknown tracker, or one whose package is not installed.
    """
    for name in report_to:
        if name == "none":
            raise ValueError("`report_to` names 'none' beside others; give it alone, or leave it out.")
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to` names the tracker {name!r}. {nearest(name, [*INTEGRATION_TO_CALLBACK, 'none'])}"
            )
        if name not in UNCHECKED and name not in get_available_reporting_integrations():
            raise ValueError(
                f"`report_to` names {name!r}, which is not installed or is switched off; install it (pip install {name}) "
                "or leave it out."
            )


@contextmanager
def one_run(callbacks: Iterable[TrainerCallback]) -> Iterator[None]:
    """Around all stages: MLflow's and ClearML's runs, which end with a training of transformers', end after the last one."""
    ends: dict[TrainerCallback, functools.partial] = {}
    those = [callback for callback in callbacks if isinstance(callback, (ClearMLCallback, MLflowCallback))]
    for callback in those:

        def later(*given: Any, callback: Any = callback, **more: Any) -> None:
            ends[callback] = functools.partial(type(callback).on_train_end, callback, *given, **more)

        callback.on_train_end = later
    try:
        yield
    finally:
        for callback in those:
            del callback.on_train_end
        for end in ends.values():
            end()


def begin_stage(callbacks: Iterable[TrainerCallback]) -> None:
    """Gives each stage a run of its own in TensorBoard, since each counts its steps from 0."""
    for callback in callbacks:
        if not isinstance(callback, TensorBoardCallback) or isinstance(callback._SummaryWriter, functools.partial):
            continue
        its_own = callback.logging_dir is not None and "TENSORBOARD_LOGGING_DIR" not in os.environ
        if callback.tb_writer is not None and not its_own:  # people's own, or where they say: all stages write there
            callback._SummaryWriter = functools.partial(_the_same, callback.tb_writer)
            callback.logging_dir = callback.tb_writer.log_dir
        elif its_own:
            if callback.tb_writer is not None:
                callback.tb_writer.close()
            callback.tb_writer, callback.logging_dir = None, None


def _the_same(writer: Any, log_dir: str | None = None) -> Any:
    """As a maker of writers: one that there is already, which opens its file again when it was closed."""
    return writer


def show_picture(callbacks: Iterable[TrainerCallback], name: str, figure: Any, step: int) -> None:
    """Sends a matplotlib figure to the trackers that take pictures: TensorBoard, wandb, trackio.

    Args:
        callbacks: the trainer's.
        name: what it is called there.
        figure: a `matplotlib.figure.Figure`.
        step: the level of the stage.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, _pixels(figure), step, dataformats="HWC")
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback):
            callback._wandb.log({name: callback._wandb.Image(_pixels(figure))})
        elif isinstance(callback, TrackioCallback):
            callback._trackio.log({name: callback._trackio.Image(_pixels(figure))})


def _pixels(figure: Any) -> Any:
    """A figure as an array [H, W, 3] of bytes."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()

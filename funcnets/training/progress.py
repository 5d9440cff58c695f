"""A progress bar where rich is installed and there is a terminal to draw it on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from torch import Tensor


@contextlib.contextmanager
def bar(shown: bool, total: int | None, start: int) -> Iterator[Callable[[int, Tensor], None]]:
    """A function ``show(step, loss)``, which does nothing where no bar is wanted or possible.

    >>> import torch
    >>> with bar(False, 10, 0) as show:
    ...     show(1, torch.tensor(0.5))
    """
    try:
        from rich.progress import MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        shown = False
    if not shown:
        yield lambda step, loss: None
        return
    columns = MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*Progress.get_default_columns(), *columns) as progress:
        progress.disable = not progress.console.is_terminal
        task = progress.add_task("training", total=total, completed=start, loss="")
        drawn = 0.0

        def show(step: int, loss: Tensor) -> None:
            nonlocal drawn
            if step == total or time.monotonic() - drawn > 0.1:  # reading it waits for the device
                text = f"loss {loss.double().mean().item():.4g}"
                progress.update(task, completed=step, loss=text)
                drawn = time.monotonic()

        yield show

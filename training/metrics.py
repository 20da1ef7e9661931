"""What a run reports: a line of JSON per step, event files for TensorBoard if asked for, one line on the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from optc.errors import MissingDependencyError

_QUIET = 10.0  # seconds between lines where there is no terminal


class Log:
    """Writes ``metrics.jsonl`` in ``folder``. A resumed run drops the lines of the steps that it repeats."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._writer: Any = _tensorboard(folder, step) if tensorboard else None

    def _lines(self) -> list[str]:
        """Whole lines; the last one of a killed run may be cut short."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    def add(self, step: int, **values: float | None) -> None:
        """Note the values of a finished step."""
        known = {name: value for name, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in known.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("TensorBoard is not installed", hint="pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step + 1)


class ProgressLine:
    """Step, loss, speed and remaining time; a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, first: int, steps: int) -> None:
        self._console = Console(stderr=True)
        self._steps, self._spoken, self._started, self._first = steps, 0.0, time.monotonic(), first
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=steps, completed=first)

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, loss: float) -> None:
        """Say that ``step`` is done."""
        now = time.monotonic()
        speed = (step - self._first) / max(now - self._started, 1e-9)
        text = f"loss {loss:.4f}, {speed:.1f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._spoken > _QUIET or step == self._steps:
            self._spoken = now
            self._console.print(f"step {step}/{self._steps}: {text}")

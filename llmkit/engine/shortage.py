"""Steps that do not fit the device's memory: the engine goes on with less instead of dying.

The plan leaves room for the largest step, but others may have taken it since. Then cached and captured memory is given back, the
next steps are half as large, and nothing is lost: what the step was to compute, the next ones do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmkit.errors import OutOfMemoryError
from llmkit.whole_gpu import empty_cache

if TYPE_CHECKING:
    from llmkit.engine.batch import Batch
    from llmkit.engine.engine import Engine
    from llmkit.engine.runner import StepResult
    from llmkit.engine.scheduler import Schedule

_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")
NOTE = "a step did not fit the device's memory: steps are smaller for a while"


def is_shortage(error: RuntimeError) -> bool:
    """Whether memory ran out: torch has a class for what its allocator on a GPU says; what the driver (of a graph or a kernel
    that finds no room), cuBLAS and a CPU say comes as text."""
    causes = [error, error.__context__]  # a capture that lacked memory may fail once more where it is ended
    return any(isinstance(e, torch.OutOfMemoryError) or any(words in str(e) for words in _WORDS) for e in causes)


class Shortage:
    """failed: a step that did not fit, until room is made. before: tokens of the last such step, until one fits."""

    def __init__(self) -> None:
        self.failed: Schedule | None = None
        self.before = 0

    def run(self, engine: Engine, batch: Batch, schedule: Schedule) -> StepResult | None:
        """Run a step; None when it does not fit. The exception ends here: it holds the tensors of the step."""
        try:
            result = engine.runner.run(batch, schedule)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            self.failed = schedule
            return None
        self.before = 0
        return result

    def relieve(self, engine: Engine) -> None:
        """Make room after a step that did not fit; nothing may be under way. OutOfMemoryError when one token failed twice."""
        if self.failed is None:
            return
        schedule, self.failed = self.failed, None
        engine.scheduler.give_way(schedule)
        engine.runner.attach(engine.rows)  # however far the step came, nothing is left of it
        if engine.model.device.type == "cuda":
            empty_cache()
        before, self.before = self.before, schedule.num_tokens
        if before == self.before == 1:
            self.before = 0
            fixes = "; or ".join(engine.plan.fixes())
            raise OutOfMemoryError(f"not even one token fits the device's memory\n{engine.plan}", fixes)
        engine.plan.note_once(NOTE)

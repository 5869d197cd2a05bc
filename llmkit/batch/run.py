"""The loop of a batch: as many lines at once as the answerer takes, their answers written in groups."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.batch.answerers import Answerer
from llmkit.batch.journal import Journal
from llmkit.batch.tasks import Task, read_tasks
from llmkit.errors import ConfigError, ServerError
from llmkit.progress import GenerationBar

Line = dict[str, Any]  # of OUT
GROUP = 0.2  # seconds for which answers gather before they are written together: a disk takes its time to say "written"


@dataclass
class Count:
    """lines: tasks in IN. done: of them, answered. before: of those, by an earlier run. failed: errors. tokens: generated now."""

    lines: int
    before: int
    done: int
    failed: int
    tokens: int = 0


class Batch:
    """One input file and its journal."""

    def __init__(self, source: Path, journal: Journal) -> None:
        """Raises ConfigError when the journal belongs to another file."""
        self.source, self.journal = source, journal
        known = [task.id for task in read_tasks(source)]
        if strange := len(journal.done - set(known)):
            raise ConfigError(f"{journal.path} has {strange} answers to lines that are not in {source}",
                              "give another file for the answers, or the input they belong to")  # fmt: skip
        self.count = Count(len(known), len(journal.done), len(journal.done), journal.failed)

    @property
    def left(self) -> int:
        return self.count.lines - self.count.done

    def tasks(self) -> Iterator[Task]:
        """What is not answered yet."""
        before = set(self.journal.done)  # those of this run come in while the file is read
        return (task for task in read_tasks(self.source) if task.id not in before)

    def model_name(self) -> str | None:
        """The one model that the lines to answer name; None when they name none. Raises ConfigError for several."""
        names = {name for task in self.tasks() if isinstance(name := (task.body or {}).get("model"), str)}
        if len(names) > 1:
            raise ConfigError(f"the lines name {len(names)} models: {', '.join(sorted(names)[:5])}",
                              "one at a time, or --model MODEL --served-model-name NAME for each name")  # fmt: skip
        return names.pop() if names else None

    async def run(self, answerer: Answerer, bar: GenerationBar) -> None:
        """Answer everything that is left. Interrupted or broken, what was answered by then is on the disk."""
        begin, answers, todo = time.monotonic(), list[Line](), self.tasks()
        workers = [asyncio.create_task(_work(todo, answerer, answers)) for _ in range(min(answerer.width, self.left))]
        try:
            while not _all_done(workers):
                await asyncio.wait(workers, timeout=GROUP, return_when=asyncio.FIRST_EXCEPTION)
                self._store(answers)
                bar.show(self.count.done, self.count.tokens / (time.monotonic() - begin))
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self._store(answers)

    def _store(self, answers: list[Line]) -> None:
        """Write what has gathered."""
        if answers:
            self.journal.append(answers)
        self.count.done, self.count.failed = len(self.journal.done), self.journal.failed
        self.count.tokens += sum(map(_tokens, answers))
        answers.clear()


async def _work(todo: Iterator[Task], answerer: Answerer, answers: list[Line]) -> None:
    """One of the workers: take the next line, answer it, until there is none."""
    for task in todo:
        answers.append(await _answer(task, answerer))


async def _answer(task: Task, answerer: Answerer) -> Line:
    if task.body is None:
        return task.failed("invalid_line", f"line {task.number}: {task.wrong}")
    try:
        reply = await answerer.ask(task.url, task.body)
    except ServerError as e:
        if not await answerer.alive():  # a server that is gone is no property of this line: stop, and go on another day
            raise
        return task.failed("no_answer", e.message)
    return task.answered(reply.status, reply.request_id, reply.body)


def _all_done(workers: list[asyncio.Task[None]]) -> bool:
    """Whether there is nothing to wait for; raises what broke one of them."""
    for worker in workers:
        if worker.done():
            worker.result()
    return all(worker.done() for worker in workers)


def _tokens(line: Line) -> int:
    """Tokens that an answer says it generated."""
    body = (line["response"] or {}).get("body")
    usage = body.get("usage") if isinstance(body, dict) else None
    return (usage or {}).get("completion_tokens") or 0

"""Work done beside other work, in order and in bounded memory: ahead of it by threads, or behind it by one."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from types import TracebackType
from typing import TypeVar

from indexes.runtime import thread_count

_AHEAD_PER_THREAD = 8
_BEHIND = 4  # tasks that wait: of an index run, batches of rows that a kill loses beside those not committed yet
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], batch: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) in the order of the items, some of them computed ahead by threads.

    Threads suffice for pictures: decoding lets go of the interpreter lock. What the function raises is raised here, at
    its item. Leaving the loop early cancels what has not begun.

    Args:
        function: computes a result, in one of several threads.
        items: what it is given.
        batch: how many results the caller takes at once before it does something long: so many are computed meanwhile.
    """
    threads = thread_count()
    ahead = max(batch, threads * _AHEAD_PER_THREAD)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Behind:
    """One thread that does what it is handed, in order, while whoever hands it over goes on.

    What a task raises is raised by the next :meth:`do`, or at the end of the block, and no task behind it is done. The
    block ends when everything is done, or, at an interrupt while it waits for that, when the task in hand is.
    """

    def __init__(self) -> None:
        self._tasks: Queue[Callable[[], object] | None] = Queue(_BEHIND)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def do(self, task: Callable[[], object]) -> None:
        """Hand over a task; waits while too many are waiting."""
        if self._failed is not None:
            raise self._failed
        self._tasks.put(task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupt: BaseException | None = None
        told = False
        while self._thread.is_alive():  # whoever comes next must find nobody at work
            try:
                if not told:
                    self._tasks.put(None)
                    told = True
                self._thread.join()
            except KeyboardInterrupt as again:
                interrupt = self._failed = again
        if interrupt is not None:
            raise interrupt
        if self._failed is not None and error is None:
            raise self._failed

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._failed is None:
                try:
                    task()
                except BaseException as error:  # it belongs to whoever handed the task over
                    self._failed = error


class Stopwatch:
    """Seconds spent inside ``with watch.running():``, added up over all threads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            with self._lock:
                self.seconds += spent

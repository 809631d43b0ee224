"""The local runtime: the worker in this process, one thread a stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Final

from rv_distributed.errors import WorkerError
from rv_distributed.plan import PieceTask
from rv_distributed.runtime.model import PieceResult, WorkerConfig, WorkerShape, patience_s
from rv_distributed.runtime.worker import Stopped, Worker, choose_device
from rv_distributed.storage.ending import briefly

#: Longest time between two looks at whether a stream hangs, in seconds.
_LOOK_S: Final = 1.0


class LocalRuntime:
    """Runs tasks on threads of this process."""

    def __init__(self, device: str, shape: WorkerShape) -> None:
        self._device = device
        self.shape = shape

    def __enter__(self) -> LocalRuntime:
        # A machine may have a GPU that its torch cannot use.
        self.shape = self.shape._replace(has_gpu=choose_device(self._device) != "cpu")
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(
        self,
        tasks: Iterable[PieceTask],
        config: WorkerConfig,
        *,
        kept: int = 0,  # noqa: ARG002 - it shows no progress
    ) -> Generator[PieceResult, None, None]:
        """As `Runtime.run`."""
        worker = Worker(config)
        source = iter(tasks)
        outputs = len(config.outputs)
        # Seconds in which nothing came. The clock would also count those in which this whole process was stopped.
        idle_s = 0.0
        making: dict[int, tuple[PieceTask, float]] = {}
        """What each stream makes, and the idle seconds at its start."""
        taking = threading.Lock()
        results: queue.SimpleQueue[PieceResult | BaseException | None] = queue.SimpleQueue()

        def stream(number: int) -> None:
            try:
                while True:
                    with taking:
                        task = next(source, None)
                    if task is None:
                        break
                    making[number] = task, idle_s
                    results.put(worker.run(task))
            except Stopped:
                pass
            except BaseException as error:
                results.put(error)
            finally:
                making.pop(number, None)
                results.put(None)

        # Daemons, since nothing ends a thread that hangs in the storage.
        threads = [
            threading.Thread(target=stream, args=(n,), name=f"rv-stream-{n}", daemon=True)
            for n in range(config.streams)
        ]

        def join() -> None:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()

        try:
            for thread in threads:
                thread.start()
            running = len(threads)
            while running:
                try:
                    result = results.get(timeout=_LOOK_S)
                except queue.Empty:
                    idle_s += _LOOK_S
                    for task, since in list(making.values()):
                        patience = patience_s(task, outputs)
                        if idle_s - since >= patience:
                            raise WorkerError(
                                f"{task.shard_name}, bytes {task.piece.start} to {task.piece.stop}: not made in "
                                f"{patience:.0f} s; the storage of the inputs or of the output hangs"
                            ) from None
                    continue
                if result is None:
                    running -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    yield result
        finally:
            worker.stop()
            briefly(join)

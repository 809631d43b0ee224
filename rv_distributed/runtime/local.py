"""The local runtime: the worker in this process, one thread a stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable

import torch

from rv_distributed.plan import PieceTask
from rv_distributed.runtime.model import PieceResult, WorkerConfig
from rv_distributed.runtime.worker import Stopped, Worker, choose_device


class LocalRuntime:
    """Runs tasks on threads of this process."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> LocalRuntime:
        choose_device(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, tasks: Iterable[PieceTask], config: WorkerConfig) -> Generator[PieceResult, None, None]:
        """As `Runtime.run`."""
        worker = Worker(config)
        source = iter(tasks)
        taking = threading.Lock()
        results: queue.SimpleQueue[PieceResult | BaseException | None] = queue.SimpleQueue()

        def stream() -> None:
            try:
                while True:
                    with taking:
                        task = next(source, None)
                    if task is None:
                        break
                    results.put(worker.run(task))
            except Stopped:
                pass
            except BaseException as error:
                results.put(error)
            finally:
                results.put(None)

        # The streams are the parallelism; torch's own threads would only get in their way.
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        threads = [threading.Thread(target=stream, name=f"rv-stream-{n}") for n in range(config.streams)]
        try:
            for thread in threads:
                thread.start()
            running = len(threads)
            while running:
                result = results.get()
                if result is None:
                    running -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    yield result
        finally:
            worker.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            torch.set_num_threads(torch_threads)

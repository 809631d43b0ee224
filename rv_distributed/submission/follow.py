"""The log of a job as it is written, however often its stream breaks."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from rv_distributed.errors import RunError, redacted
from rv_distributed.submission.server import JobServer, JobState, brief

#: After so long without an answer the job server counts as lost; the head of a cluster may restart meanwhile.
_LOST_S: Final = 120.0
#: Without log lines for so long, the status is asked for: the stream may be dead without knowing it. Much longer
#: than the second or two that the server itself pauses before it sends a log, and before it ends one.
_SILENCE_S: Final = 20.0
_PAUSE_S: Final = 1.0
#: Attempts to read the log of a job that has ended; it may have gone with its node.
_LAST_READS: Final = 3


class Follower:
    """The log of a job, line by line, and then its end.

    A thread reads, so that a signal finds the main thread waiting in `next`, where it can raise: what was not taken
    yet is still there afterwards.
    """

    def __init__(self, server: JobServer, submission_id: str) -> None:
        self._server = server
        self._id = submission_id
        self._items: queue.SimpleQueue[str | JobState | BaseException] = queue.SimpleQueue()
        self._seen = 0
        """Characters of the log that were read; every stream begins at its start."""
        self._partial = ""
        self._answered = time.monotonic()
        # A daemon: at the exit nobody waits for a server that does not answer.
        threading.Thread(target=self._run, daemon=True).start()

    def next(self, timeout_s: float | None = None) -> str | JobState:
        """The next line of the log, or the job's state: while it is silent, and, as the last item, at its end.

        Raises RunError when the job server is lost, and queue.Empty after ``timeout_s``.
        """
        item = self._items.get(timeout=timeout_s)
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            self._items.put(asyncio.run(self._follow()))
        except BaseException as error:
            self._items.put(error)

    async def _follow(self) -> JobState:
        reads_left = _LAST_READS
        while True:
            try:
                complete = await self._read_log()
            except self._server.failures:
                complete = False
            state = self._state()
            if state is not None and state.ended:
                reads_left -= 1
                if complete or reads_left == 0:
                    self._put_text("\n" if self._partial else "")
                    return state
            await asyncio.sleep(_PAUSE_S)

    def _state(self) -> JobState | None:
        """The job's state, if the server answers. Raises RunError when it has been silent for too long."""
        try:
            state = self._server.state(self._id)
        except self._server.failures as error:
            if time.monotonic() - self._answered <= _LOST_S:
                return None
            raise RunError(
                f"the job server at {redacted(self._server.address)} is lost: {brief(error)}. Job {self._id} may "
                "still be running; when the server answers again, the same command follows it"
            ) from None
        self._answered = time.monotonic()
        return state

    async def _read_log(self) -> bool:
        """Put the lines that are new; whether the stream came to its end. Raises one of the server's failures."""
        position = 0
        async with aclosing(self._stream()) as stream:
            async for text in stream:
                if text is None:
                    state = self._server.state(self._id)
                    if state.ended:
                        return False
                    self._items.put(state)
                else:
                    fresh = text[max(0, self._seen - position) :]
                    position += len(text)
                    self._seen = max(self._seen, position)
                    self._put_text(fresh)
                self._answered = time.monotonic()
        return True

    async def _stream(self) -> AsyncGenerator[str | None, None]:
        """The log from its start, as it comes; None whenever it was silent for `_SILENCE_S`."""
        async with aclosing(self._server.client.tail_job_logs(self._id)) as stream:
            while True:
                text = asyncio.ensure_future(anext(stream, None))
                try:
                    while not (await asyncio.wait({text}, timeout=_SILENCE_S))[0]:
                        yield None
                finally:
                    # A stream cannot be closed while something waits for it.
                    text.cancel()
                    await asyncio.wait({text})
                if (received := text.result()) is None:
                    return
                yield received

    def _put_text(self, text: str) -> None:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._items.put(line)

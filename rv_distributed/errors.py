"""Every error that rv_distributed raises on purpose.

::

    RvError
    ├── UsageError        bad arguments                                        exit status 2
    ├── InputError        problems of the inputs, all of them at once          exit status 2
    │   └── NonFiniteError  NaN or infinity in an output; what was finished is kept
    ├── OutputError       the output exists, is in use, or holds another plan  exit status 2
    ├── RunError          the run failed; what was finished is kept            exit status 1
    │   ├── PieceError    one piece failed on its data or its storage
    │   ├── WorkerError   workers died, and no attempts are left
    │   └── ChangedError  an input changed while it was read
    ├── VerifyError       a finished output differs from its manifest          exit status 3
    ├── Interrupted       SIGINT, SIGTERM, SIGHUP; the run can be resumed      exit status 130, 143, 129
    └── Cancelled         the caller's event asked the run to stop; it can be resumed

All of them survive pickling: their constructors take exactly the values that they keep in ``args``. What they
quote from files is hostile until `one_line` or `printable` has been over it; the command line shows nothing else.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

#: Problems with the tensors of an input, or the like, that are told one by one.
MAX_REPORTED: Final = 20
_MAX_QUOTED: Final = 1000
_NOT_ASCII: Final = re.compile(r"[^ -~]")
_USER_INFO: Final = re.compile(r"(?<=://)[^\s/@\\\"']+@")
_SECRET_FIELD: Final = re.compile(
    r"([?&](?:x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|googleaccessid|[\w-]*(?:sig|signature|token|secret|key|password"
    r"|credential))=)[^&#\s\\\"']+?(?=[:;,.)]{0,3}(?:[&#\s\\\"']|$))",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """``text`` without the passwords, tokens and signatures of the URIs in it; JSON stays JSON."""
    return _SECRET_FIELD.sub(r"\g<1>***", _USER_INFO.sub("***@", text))


def one_line(text: str) -> str:
    """``text`` with escapes in place of all that a terminal obeys or that reorders what is read: control
    characters, ends of lines, marks of text direction. Cut where it is too long to be read."""
    text = redacted(text[: 10 * _MAX_QUOTED])
    text = text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…"
    return _NOT_ASCII.sub(_escape, text)


def printable(text: str) -> str:
    """``text`` for a terminal or a log: every line as `one_line`, but of any length."""
    return "\n".join(_NOT_ASCII.sub(_escape, line) for line in redacted(text).split("\n"))


def without_prefix(message: str) -> str:
    """A message of pydantic's, which checks recipe files and, within typer, options, without the words that it puts
    before what a check of ours or of typer's says."""
    return message.removeprefix("Value error, ")


def _escape(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else found[0].encode("unicode_escape").decode()


class RvError(Exception):
    """Base of all errors raised on purpose; ``exit_status`` is what the command line returns."""

    exit_status = 1


class UsageError(RvError):
    """The arguments do not make sense, whatever the inputs hold."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an input."""

    where: str
    """The file, folder or URI at fault."""
    what: str
    """What is wrong, with the expected and the actual value."""
    remedy: str
    """What the user can do about it."""
    tensor: str | None = None
    """The tensor at fault, if it is one tensor's problem."""

    def __str__(self) -> str:
        where = one_line(self.where)
        subject = f"{where}: tensor {one_line(repr(self.tensor))}" if self.tensor is not None else where
        return f"{subject}: {one_line(self.what)}. {one_line(self.remedy)}"


class InputError(RvError):
    """The inputs cannot be used. ``problems`` lists all that was found, before any output exists."""

    exit_status = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "\n".join(f"  {n}. {problem}" for n, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} problems with the inputs:\n{lines}"


class NonFiniteError(InputError):
    """An output holds NaN or infinity, so it is not published. Its finished pieces are kept."""


class OutputError(RvError):
    """The output's place cannot be used: it exists, another run holds it, or there is no room."""

    exit_status = 2


class RunError(RvError):
    """The run failed after it began. Finished pieces are kept: the same command resumes."""


class PieceError(RunError):
    """One piece failed. Names the storage at fault, the byte range and the tensors it concerns."""

    def __init__(self, cause: str, file: str, start: int, stop: int, tensors: tuple[str, ...]) -> None:
        super().__init__(cause, file, start, stop, tensors)
        self.cause, self.file, self.start, self.stop, self.tensors = cause, file, start, stop, tensors

    def __str__(self) -> str:
        names = ", ".join(one_line(repr(name)) for name in self.tensors[:3])
        more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        of = f" (tensor {names}{more})" if names else ""
        return f"{one_line(self.file)}, bytes {self.start} to {self.stop}{of}: {one_line(self.cause)}"


class WorkerError(RunError):
    """Workers died, and every allowed attempt is used up."""


class ChangedError(RunError):
    """An input was replaced, truncated or touched between planning and commit; nothing is published."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference that `verify` found."""

    file: str
    """File name inside the output."""
    what: str
    """What differs."""
    tensor: str | None = None
    """The tensor, if the difference lies in one."""
    start: int | None = None
    """First byte, inside the file, of the smallest range known to differ."""
    stop: int | None = None
    """One past the last byte of that range."""

    def __str__(self) -> str:
        place = f", bytes {self.start} to {self.stop}" if self.start is not None else ""
        tensor = f", tensor {one_line(repr(self.tensor))}" if self.tensor is not None else ""
        return f"{one_line(self.file)}{place}{tensor}: {one_line(self.what)}"


class VerifyError(RvError):
    """An output is not what its manifest says. ``findings`` lists every difference."""

    exit_status = 3

    def __init__(self, uri: str, findings: Iterable[Finding]) -> None:
        self.uri, self.findings = uri, tuple(findings)
        super().__init__(self.uri, self.findings)

    def __str__(self) -> str:
        lines = "\n".join(f"  {finding}" for finding in self.findings)
        count = len(self.findings)
        return f"{one_line(self.uri)}: {count} difference{'s' if count != 1 else ''} found\n{lines}"


class Interrupted(RvError):
    """A signal asked the run to stop. Finished pieces are kept: the same command resumes."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_status(self) -> int:  # type: ignore[override]
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class Cancelled(RvError):
    """The caller asked the run to stop. Finished pieces are kept: the same call resumes."""

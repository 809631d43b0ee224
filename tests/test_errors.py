"""Errors cross processes: each comes out of a pickle as it went in, and keeps its exit status."""

from __future__ import annotations

import pickle
import signal
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from rv_distributed import errors
from rv_distributed.errors import (
    Cancelled,
    ChangedError,
    Finding,
    InputError,
    Interrupted,
    NonFiniteError,
    OutputError,
    PieceError,
    Problem,
    RunError,
    RvError,
    UsageError,
    VerifyError,
    WorkerError,
)

MISSING = Problem("/m/model.safetensors.index.json", "names the shard x, which is missing", "Download the shard.")
WRONG = Problem("/m/x.safetensors", "has the unknown dtype 'Q4'", "Convert it.", "layers.0.weight")
CHANGED = Finding("x.safetensors", "differs", "layers.0.weight", 4096, 8192)
GONE = Finding("y.safetensors", "is missing")

ERRORS: dict[str, tuple[RvError, int, str]] = {
    "RvError": (RvError("it failed"), 1, "it failed"),
    "UsageError": (UsageError("--alpha nan is not a number"), 2, "--alpha nan is not a number"),
    "InputError, one problem": (
        InputError([WRONG]),
        2,
        "/m/x.safetensors: tensor 'layers.0.weight': has the unknown dtype 'Q4'. Convert it.",
    ),
    "InputError, several problems": (
        InputError(iter([MISSING, WRONG])),
        2,
        "2 problems with the inputs:\n"
        "  1. /m/model.safetensors.index.json: names the shard x, which is missing. Download the shard.\n"
        "  2. /m/x.safetensors: tensor 'layers.0.weight': has the unknown dtype 'Q4'. Convert it.",
    ),
    "NonFiniteError": (
        NonFiniteError([WRONG]),
        2,
        "/m/x.safetensors: tensor 'layers.0.weight': has the unknown dtype 'Q4'. Convert it.",
    ),
    "Cancelled": (Cancelled("stopped by its caller"), 1, "stopped by its caller"),
    "OutputError": (OutputError("/out already exists"), 2, "/out already exists"),
    "RunError": (RunError("no space", 28), 1, "('no space', 28)"),
    "PieceError, no tensor": (
        PieceError("cannot be written", "/out/x", 0, 4096, ()),
        1,
        "/out/x, bytes 0 to 4096: cannot be written",
    ),
    "PieceError, one tensor": (
        PieceError("holds NaN", "/m/x", 8, 16, ("a",)),
        1,
        "/m/x, bytes 8 to 16 (tensor 'a'): holds NaN",
    ),
    "PieceError, three tensors": (
        PieceError("holds NaN", "/m/x", 8, 16, ("a", "b", "c")),
        1,
        "/m/x, bytes 8 to 16 (tensor 'a', 'b', 'c'): holds NaN",
    ),
    "PieceError, five tensors": (
        PieceError("holds NaN", "/m/x", 8, 16, ("a", "b", "c", "d", "e")),
        1,
        "/m/x, bytes 8 to 16 (tensor 'a', 'b', 'c' and 2 more): holds NaN",
    ),
    "WorkerError": (WorkerError("3 workers died"), 1, "3 workers died"),
    "ChangedError": (ChangedError("/m/x was replaced"), 1, "/m/x was replaced"),
    "VerifyError, one finding": (
        VerifyError("/out", [GONE]),
        3,
        "/out: 1 difference found\n  y.safetensors: is missing",
    ),
    "VerifyError, two findings": (
        VerifyError("/out", iter([CHANGED, GONE])),
        3,
        "/out: 2 differences found\n"
        "  x.safetensors, bytes 4096 to 8192, tensor 'layers.0.weight': differs\n"
        "  y.safetensors: is missing",
    ),
    "Interrupted by SIGINT": (Interrupted(signal.SIGINT), 130, "stopped by SIGINT"),
    "Interrupted by SIGTERM": (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM"),
}
CASES = pytest.mark.parametrize(("error", "status", "text"), ERRORS.values(), ids=ERRORS)

BASES: dict[type[RvError], type[Exception]] = {
    RvError: Exception,
    UsageError: RvError,
    InputError: RvError,
    NonFiniteError: InputError,
    OutputError: RvError,
    RunError: RvError,
    PieceError: RunError,
    WorkerError: RunError,
    ChangedError: RunError,
    VerifyError: RvError,
    Interrupted: RvError,
    Cancelled: RvError,
}


def all_errors() -> set[type[RvError]]:
    return {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RvError)}


def test_every_error_of_the_module_is_tested_here_and_drawn_in_its_docstring() -> None:
    assert all_errors() == set(BASES) == {type(error) for error, _, _ in ERRORS.values()}
    assert errors.__doc__ is not None
    for kind in BASES:
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", BASES, ids=lambda kind: kind.__name__)
def test_the_tree_is_the_one_that_is_drawn(kind: type[RvError]) -> None:
    assert kind.__bases__ == (BASES[kind],)


@CASES
def test_an_error_says_what_it_knows(error: RvError, status: int, text: str) -> None:
    assert str(error) == text
    assert error.exit_status == status


@CASES
def test_an_error_survives_pickling(error: RvError, status: int, text: str) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own bytes
        assert type(copy) is type(error)
        assert (str(copy), copy.args, vars(copy)) == (text, error.args, vars(error))
        assert copy.exit_status == status


def test_the_attributes_are_the_values_given() -> None:
    piece = PieceError("holds NaN", "/m/x", 8, 16, ("a",))
    assert (piece.cause, piece.file, piece.start, piece.stop, piece.tensors) == ("holds NaN", "/m/x", 8, 16, ("a",))
    assert InputError(iter([MISSING, WRONG])).problems == (MISSING, WRONG)
    verify = VerifyError("/out", iter([CHANGED]))
    assert (verify.uri, verify.findings) == ("/out", (CHANGED,))
    assert Interrupted(signal.SIGTERM).signum == signal.SIGTERM


def _fail(name: str) -> None:
    raise ERRORS[name][0]


def test_every_error_arrives_whole_from_another_process() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        for name, (error, _, text) in ERRORS.items():
            raised = pool.submit(_fail, name).exception()
            assert type(raised) is type(error)
            assert str(raised) == text
            assert text in "".join(traceback.format_exception(raised))


LINES = {
    "problem": (MISSING, "/m/model.safetensors.index.json: names the shard x, which is missing. Download the shard."),
    "problem, empty tensor name": (Problem("/m", "bad", "Fix it.", ""), "/m: tensor '': bad. Fix it."),
    "finding": (GONE, "y.safetensors: is missing"),
    "finding, first byte": (Finding("f", "differs", None, 0, 8), "f, bytes 0 to 8: differs"),
    "finding, empty tensor name": (Finding("f", "differs", ""), "f, tensor '': differs"),
}


@pytest.mark.parametrize(("record", "text"), LINES.values(), ids=LINES)
def test_a_problem_or_a_finding_is_one_line_and_survives_pickling(record: Problem | Finding, text: str) -> None:
    assert str(record) == text
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301 - our own bytes

"""The ``rv`` application: its commands, and the one place where errors become exit statuses."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from types import FrameType
from typing import Any, Final

import typer

from rv_distributed import __version__
from rv_distributed.cli import (
    bench,
    demo,
    diff,
    evaluate,
    inspect,
    merge,
    push,
    recipe,
    report,
    submit,
    verify,
    version,
)
from rv_distributed.cli.command import Command
from rv_distributed.cli.terminal import say, warn
from rv_distributed.errors import (
    ChangedError,
    InputError,
    Interrupted,
    RunError,
    RvError,
    VerifyError,
    one_line,
    without_prefix,
)

app = typer.Typer(
    name="rv",
    help="Add, subtract and transfer the weights of models too large for one GPU or one machine.",
    epilog="Exit status: 0 done; 1 the run failed, run again to resume; 2 bad arguments or bad input; "
    "3 verify found a difference; 129, 130 or 143 interrupted, run again to resume.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS = (
    *(merge.extract, merge.apply, merge.transfer, recipe.run),
    *(inspect.inspect, diff.diff, verify.verify, push.push, report.report),
    *(bench.bench, demo.demo, version.version),
)
for _command in _COMMANDS:
    app.command(cls=Command, context_settings={"auto_envvar_prefix": f"RV_{_command.__name__.upper()}"})(_command)
app.command("eval", cls=Command, context_settings={"auto_envvar_prefix": "RV_EVAL"})(evaluate.evaluate)
app.add_typer(recipe.app, name="recipe")
# Options behind the name of the command that is submitted are that command's.
app.command(cls=Command, context_settings={"allow_interspersed_args": False, "auto_envvar_prefix": "RV_SUBMIT"})(
    submit.submit
)

#: Those that go on where they were when they are run again.
_RESUMABLE: Final = frozenset({"extract", "apply", "transfer", "run", "eval", "push"})


def _show_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.callback()
def _root(
    shown: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    """The version is shown by its option's callback, before a missing command would be an error."""


def main() -> None:
    """Run ``rv`` with the process's arguments, and exit with its status."""
    # Imports make hundreds of thousands of objects that live to the end. Looking through them for garbage, while
    # they come and once more at the exit, would take half a second.
    gc.set_threshold(100_000)
    # An exception of ours for all: typer would turn KeyboardInterrupt into a silent Abort.
    _on_stop(_interrupt)
    try:
        status = app(prog_name="rv", standalone_mode=False)
        _let_go()
    except typer.Exit as done:
        status = done.exit_code
    except RvError as error:
        status = report_error(error)
        if isinstance(error, (Interrupted, RunError)):
            # A thread may hang in the storage for ever, and Python would wait for it. All is printed, and flushed.
            os._exit(status)
    except OSError as error:
        status = report_error(RvError(f"{error.filename or 'storage'}: {error.strerror or error}"))
    except Exception as error:
        # click's own errors know how to show themselves; anything else is a bug and keeps its traceback.
        if not hasattr(error, "show"):
            raise
        of_click: Any = error
        of_click.message = without_prefix(of_click.message)
        of_click.show()
        status = 2
        if wants_json():
            print_error(type(error).__name__, of_click.format_message(), status)
    _let_go()
    gc.freeze()
    sys.exit(status if isinstance(status, int) else 0)


def report_error(error: RvError) -> int:
    """Print an error, as JSON too where that was asked for, and return its exit status."""
    hint = "\nNothing that was finished is lost: run the same command again to resume."
    stopped = isinstance(error, (Interrupted, RunError)) and not isinstance(error, ChangedError)
    resumable = stopped and bool(_RESUMABLE & set(sys.argv[1:2]))
    # The errors with lists have a line for each entry; in the others, a line end came with a name.
    text = str(error) if isinstance(error, (InputError, VerifyError)) else one_line(str(error))
    warn(f"rv: {text}{hint if resumable else ''}")
    if wants_json():
        more: dict[str, object] = {}
        if isinstance(error, InputError):
            more["problems"] = [
                {"where": p.where, "tensor": p.tensor, "what": p.what, "remedy": p.remedy} for p in error.problems
            ]
        if isinstance(error, VerifyError):
            more["findings"] = [
                {"file": f.file, "tensor": f.tensor, "start": f.start, "stop": f.stop, "what": f.what}
                for f in error.findings
            ]
        print_error(type(error).__name__, str(error), error.exit_status, **more)
    return error.exit_status


def wants_json() -> bool:
    """Whether one JSON document was asked for, also where the arguments could not be parsed."""
    return "--json" in sys.argv[1:] or os.environ.get("RV_JSON", "").lower() in ("1", "true", "t", "yes", "y", "on")


def print_error(kind: str, message: str, status: int, **more: object) -> None:
    """Print the JSON document of an error."""
    error = {"type": kind, "message": message, "exit_status": status}
    say(json.dumps({"schema_version": 1, "status": "error", "error": error, **more}, indent=2))


def _let_go() -> None:
    """From here on there is nothing to stop in order: a signal ends the process as it would any other."""
    _on_stop(signal.SIG_DFL)


def _on_stop(handler: Any) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup a run goes on when its terminal is closed.
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    if signum == signal.SIGHUP:
        _leave_terminal()
    # This may come in the middle of starting a thread, which then complains of it with a traceback of its own.
    sys.unraisablehook = lambda _: None
    raise Interrupted(signum)


def _leave_terminal() -> None:
    """Let what is written to a terminal that is gone go nowhere: an error of that would hide why the run stops."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

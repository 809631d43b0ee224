"""``rv push``: a finished output, to the Hugging Face Hub."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from rv_distributed.cli import options as opt
from rv_distributed.cli.terminal import hide_upload_bars, say, warn


def push(
    out: Annotated[str, typer.Argument(help="Folder of an output.", metavar="OUT")],
    repository: Annotated[str, typer.Argument(help="Repository; it is made if it does not exist.", metavar="ORG/NAME")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; it is made, too.", metavar="NAME")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Upload an output with its model card to the Hugging Face Hub. A push that was cut short is resumed.

    An output that is not what its manifest says is refused, with exit status 3; the weights themselves are not read
    for that: rv verify does.

    \b
    Examples:
      rv push out org/name
      rv push out org/name --public --revision v2
    """
    if json or quiet:
        hide_upload_bars()
    from rv_distributed.api import push as push_output

    pushed = push_output(out, repository, public=public, revision=revision, create_pr=create_pr)
    if public and pushed.private:
        warn(f"warning: {repository} was there before, and is private; its settings on the Hub make it public")
    if json:
        say(jsonlib.dumps({"schema_version": 1, "status": "pushed", "path": out, **pushed._asdict()}, indent=2))
    elif not quiet:
        say(f"{pushed.url}\n  commit {pushed.revision}, {'private' if pushed.private else 'public'}")

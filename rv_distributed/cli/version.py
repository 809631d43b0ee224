"""``rv version``: what is installed, for reports of faults and for pipelines."""

from __future__ import annotations

import json as jsonlib

from rv_distributed import __version__
from rv_distributed.cli.options import Json
from rv_distributed.cli.terminal import say


def version(json: Json = False) -> None:
    """Print the versions of rv, of Python and of the packages that matter.

    \b
    Example:
      rv version --json
    """
    from rv_distributed.versions import all_versions

    versions = all_versions()
    if json:
        document = {"schema_version": 1, "status": "shown", "version": __version__, "versions": versions}
        say(jsonlib.dumps(document, indent=2))
    else:
        say("\n".join(f"{name:>16}  {found}" for name, found in versions.items()))

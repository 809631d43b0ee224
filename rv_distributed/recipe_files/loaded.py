"""What a recipe file says, whatever its format, and what its names mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from rv_distributed.checkpoint.uris import is_remote, join
from rv_distributed.errors import UsageError
from rv_distributed.plan import PlanOptions
from rv_distributed.recipe import Recipe, named_out
from rv_distributed.storage import HUB, is_hub_name


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """What a recipe file says."""

    recipe: Recipe
    plan_options: PlanOptions
    labels: tuple[Mapping[str, str], ...]
    """What goes for ``{alpha}`` and ``{include}`` in the names of the outputs: one map an output."""

    def outs(self, template: str) -> list[str]:
        """The name of each output. Raises UsageError when they would have the same, or hold what is not swept over."""
        outs = [named_out(template, labels) for labels in self.labels]
        if len(set(outs)) < len(outs):
            wanted = "".join(f"-{{{name}}}" for name in self.labels[0])
            raise UsageError(f"--out: the recipe makes {len(outs)} outputs; write for instance --out 'out{wanted}'")
        return outs


def resolve(name: str, folder: str) -> str:
    """A checkpoint's name in a recipe: a URI as it is, a path from ``folder`` on, which may be a URI itself, or else
    ``org/name`` on the Hub; and the two parts of ``model+adapter`` each by itself."""
    start, place = name.partition("+")[0], _place(name, folder)
    if is_remote(start) or "+" not in name or os.path.lexists(place):
        return place
    # What a folder's name itself holds is no end of the model's.
    ends = [place for place, letter in enumerate(name) if letter == "+"]
    end = next((end for end in ends if os.path.lexists(_place(name[:end], folder))), len(start))
    return f"{_place(name[:end], folder)}+{_place(name[end + 1 :], folder)}"


def _place(name: str, folder: str) -> str:
    if is_remote(name):
        return name
    path = os.path.expanduser(name)
    if is_remote(folder) and not os.path.isabs(path):
        return join(folder, name)
    path = os.path.normpath(os.path.join(folder, path))
    return HUB + name if is_hub_name(name) and not os.path.lexists(path) else path

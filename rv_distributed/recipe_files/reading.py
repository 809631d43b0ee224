"""Reading a recipe file, ours or mergekit's."""

from __future__ import annotations

import os

from rv_distributed.recipe_files.document import read_document
from rv_distributed.recipe_files.loaded import LoadedRecipe
from rv_distributed.recipe_files.mergekit import from_mergekit
from rv_distributed.recipe_files.own import from_own


def load_recipe(path: str | os.PathLike[str]) -> LoadedRecipe:
    """What a recipe file says: one with ``merge_method`` is mergekit's.

    Raises InputError with every problem of the file, each with its line and field.
    """
    document = read_document(os.fspath(path))
    return from_mergekit(document) if "merge_method" in document.value else from_own(document)

"""Recipe files: read as hostile input, ours and mergekit's, and written beside every output.

Imports pydantic and yaml; it is imported late, where a file is read.
"""

from rv_distributed.recipe_files.reading import LoadedRecipe, load_recipe
from rv_distributed.recipe_files.writing import recipe_text

__all__ = ["LoadedRecipe", "load_recipe", "recipe_text"]

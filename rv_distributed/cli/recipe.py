"""``rv run`` and ``rv recipe``: recipe files, ours and mergekit's."""

from __future__ import annotations

import json as jsonlib
import os
from typing import Annotated, Any, Final

import typer

from rv_distributed.cli.options import Json, Out, Running, with_common
from rv_distributed.cli.terminal import say
from rv_distributed.errors import OutputError, RunError, UsageError, one_line

File = Annotated[str, typer.Argument(help="Recipe file or its URI, of rv or of mergekit.", metavar="RECIPE")]

app = typer.Typer(
    help="Write, check and describe recipe files; rv run makes what they say.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

#: What ``rv recipe init`` writes.
STARTER: Final = """\
# yaml-language-server: $schema=./rv-recipe.schema.json
# (rv recipe schema > rv-recipe.schema.json gives editors the fields.)
#
#   rv recipe check recipe.yaml
#   rv run recipe.yaml --out 'out-{alpha}'
#
# Paths begin at this file's folder; s3://, gs://, … and org/name on the Hub go as well.
# ${NAME} and ${NAME:-default} are environment variables.

target: models/instruct            # the model that receives the vectors
vectors:                           # added in this order
  - donor: models/grpo             # the vector donor - reference
    reference: models/sft
  # - vector: vectors/math         # a stored vector
  #   alpha: 0.5                   # its own scale, whatever sweep says
  # - vector: vectors/code
  #   alpha: [0.0, 0.4, 0.8]       # from the first layer to the last, interpolated
  # - vector: vectors/chat
  #   alpha:                       # the first choice that fits a tensor's name; 0 where none does
  #     - match: '\\.mlp\\.'
  #       alpha: 0.3
  #     - alpha: 0.1

sweep:                             # one output for each; leave it out for one output with alpha 1
  alpha: [0.5, 0.7, 1.0]
  # include: {mlp: '\\.mlp\\.', attention: 'self_attn'}   # and for each of these: --out 'out-{alpha}-{include}'

dtype: auto                        # of the output: as in the target, or float32, bfloat16, float16
rounding: nearest                  # or stochastic, with a seed: right on average where the output has 16 bits
# include: 'layers'                # only tensors whose name matches get the vectors
# exclude: 'embed_tokens|lm_head'
"""


@with_common
def run(recipe: File, out: Out, common: Running) -> None:
    """Make what a recipe file says. What was made is stored as rv_recipe.yaml in the output.

    Files of mergekit run unchanged where they are linear or task_arithmetic; what else they ask for is refused.

    \b
    Examples:
      rv run recipe.yaml --out out
      rv run sweep.yaml --out 'out-{alpha}'
      rv run out/rv_recipe.yaml --out again
      rv run mergekit.yaml --out merged --dry-run
    """
    from rv_distributed.cli.run import run as run_job
    from rv_distributed.recipe_files.reading import load_recipe

    loaded = load_recipe(recipe)
    run_job(loaded.recipe, loaded.plan_options, loaded.outs(out), common)


@app.command()
def init(
    file: Annotated[str | None, typer.Argument(help="File to write; stdout if not given.", metavar="FILE")] = None,
    json: Json = False,
) -> None:
    """Write a recipe to begin with, with all fields explained.

    \b
    Example:
      rv recipe init recipe.yaml
    """
    if file is None and json:
        raise UsageError("with --json, give a file to write the recipe to")
    if file is None:
        say(STARTER.rstrip("\n"))
        return
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(STARTER)
    except FileExistsError:
        raise OutputError(f"{file} already exists. Give another name.") from None
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror or error}") from error
    if json:
        say(jsonlib.dumps({"schema_version": 1, "status": "written", "path": os.path.abspath(file)}, indent=2))


@app.command()
def check(recipe: File, json: Json = False) -> None:
    """Check a recipe file by itself, and say what it makes. rv run --dry-run checks the checkpoints too.

    \b
    Examples:
      rv recipe check recipe.yaml
      rv recipe check mergekit.yaml --json
    """
    from rv_distributed.recipe_files.reading import load_recipe

    loaded = load_recipe(recipe)
    made = loaded.recipe
    vectors: list[dict[str, Any]] = [{"plus": vector.plus, "minus": vector.minus} for vector in made.vectors]
    if json:
        document = {"schema_version": 1, "status": "checked", "path": recipe, "operation": made.operation}
        document |= {"target": made.target, "vectors": vectors, "outputs": list(map(dict, loaded.labels))}
        say(jsonlib.dumps(document, indent=2))
        return
    lines = [f"{made.operation}, {len(loaded.labels)} output{'s' if len(loaded.labels) > 1 else ''}"]
    lines += [f"target    {made.target}"] if made.target else []
    for vector in made.vectors:
        minus = f" − {vector.minus}" if vector.minus else ""
        lines.append(f"{'model' if made.operation == 'linear' else 'vector':9} {vector.plus}{minus}")
    say("\n".join(map(one_line, lines)))


@app.command()
def schema(json: Json = False) -> None:
    """Print the JSON schema of recipe files, for editors. It is the document itself, with --json and without.

    \b
    Example:
      rv recipe schema > rv-recipe.schema.json
    """
    from rv_distributed.recipe_files.fields import recipe_schema

    del json
    say(jsonlib.dumps(recipe_schema(), indent=2))

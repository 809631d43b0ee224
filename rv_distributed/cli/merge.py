"""``rv extract``, ``rv apply`` and ``rv transfer``: flags in, a `Recipe` out, and the shared run."""

from __future__ import annotations

import os
import re
from typing import Annotated, Final

import typer

from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.cli.options import Common, Out, with_common
from rv_distributed.errors import UsageError
from rv_distributed.recipe import Recipe, Vector, named_out

Target = Annotated[str, typer.Option("--target", help="Checkpoint that receives the vector.", metavar="PATH")]
Donor = Annotated[str, typer.Option("--donor", help="Checkpoint A of A − B: has the skill.", metavar="PATH")]
Reference = Annotated[str, typer.Option("--reference", help="Checkpoint B of A − B: its twin without.", metavar="PATH")]
Vectors = Annotated[
    list[str],
    typer.Option("--vector", help="Stored vector, with or without its own alpha; repeat.", metavar="PATH[=ALPHA]"),
]
Alpha = Annotated[
    list[str],
    typer.Option(
        help="Scale, in --compute-dtype. Several, with commas or given again, make one output each.",
        metavar="NUMBER[,…]",
    ),
]

WHOLE: Final = ["1.0"]
#: The name of an option at the end of a URI, without its value.
_OPTION: Final = re.compile(r"[?&]\w+$")


@with_common
def extract(donor: Donor, reference: Reference, out: Out, common: Common) -> None:
    """Store the vector V = A − B of two checkpoints.

    \b
    Examples:
      rv extract --donor grpo --reference sft --out vector
      rv extract --donor grpo --reference sft --out vector-mlp --include '\\.mlp\\.'
    """
    _run(Recipe("extract", None, (Vector(donor, reference),), ((1.0,),)), [named_out(out, {})], common)


@with_common
def apply(target: Target, vector: Vectors, out: Out, common: Common, alpha: Alpha = WHOLE) -> None:
    """Add stored vectors to a model: O = T + Σ αₖ·Vₖ.

    \b
    Examples:
      rv apply --target instruct --vector vector --alpha 0.7 --out out
      rv apply --target instruct --vector math=0.5 --vector code=-0.3 --out out
    """
    named = [_split(text) for text in vector]
    alphas = parse_alphas(alpha)
    rows = tuple(tuple(value if own is None else own for _, own in named) for _, value in alphas)
    _run(Recipe("apply", target, tuple(Vector(path) for path, _ in named), rows), _outs(out, alphas), common)


@with_common
def transfer(
    target: Target, donor: Donor, reference: Reference, out: Out, common: Common, alpha: Alpha = WHOLE
) -> None:
    """Move a skill in one pass, storing no vector: O = T + α·(A − B).

    \b
    Examples:
      rv transfer --target instruct --donor grpo --reference sft --alpha 0.7 --out out
      rv transfer --target instruct --donor grpo --reference sft --alpha 0.5,0.7,1.0 --out 'out-{alpha}'
      rv transfer --target org/instruct --donor s3://lab/grpo --reference sft --out gs://lab/out
    """
    alphas = parse_alphas(alpha)
    rows = tuple((value,) for _, value in alphas)
    _run(Recipe("transfer", target, (Vector(donor, reference),), rows), _outs(out, alphas), common)


def _run(recipe: Recipe, outs: list[str], common: Common) -> None:
    # Imported here, as in the other commands: --help needs nothing of it.
    from rv_distributed.cli.run import run

    run(recipe, common.plan_options(), outs, common)


def _split(text: str) -> tuple[str, float | None]:
    """``PATH=ALPHA`` as its two parts; a path may itself hold an equals sign, and so do a URI's options. What is there
    under the whole name is meant."""
    path, equals, alpha = text.rpartition("=")
    if os.path.lexists(os.path.expanduser(text)):
        return text, None
    is_option = is_remote(path) and _OPTION.search(path)
    try:
        return (path, float(alpha)) if equals and not is_option else (text, None)
    except ValueError:
        return text, None


def parse_alphas(texts: list[str]) -> list[tuple[str, float]]:
    """Each alpha as it was written and as a number."""
    try:
        return [(part.strip(), float(part)) for text in texts for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--alpha: {', '.join(texts)!r} is not a number, nor several with commas between") from None


def _outs(template: str, alphas: list[tuple[str, float]]) -> list[str]:
    texts = dict[float, str]()
    for text, value in alphas:
        if value in texts:
            raise UsageError(f"--alpha: {texts[value]} and {text} are the same number; give it once")
        texts[value] = text
    if len(alphas) > 1 and "{alpha}" not in template:
        raise UsageError("--out: several alphas make several outputs; write for instance --out 'out-{alpha}'")
    return [named_out(template, {"alpha": text}) for text, _ in alphas]

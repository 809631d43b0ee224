"""The class of all commands: what it adds to typer's."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class Command(TyperCommand):
    """A command that names all that is missing of its options and arguments, where typer names the first alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Versions of typer have click's errors in different places.
            if type(error).__name__ == "MissingParameter":
                of_click: Any = error
                of_click.param_hint = self._missing(ctx, given)
            raise

    def _missing(self, ctx: Any, args: list[str]) -> str:
        given = self.make_parser(ctx).parse_args(args)[0]
        params: list[Any] = [param for param in self.params if param.required]
        return ", ".join(map(_named, (one for one in params if one.value_is_missing(one.consume_value(ctx, given)[0]))))


def _named(param: Any) -> str:
    if param.param_type_name == "argument":
        return repr(param.name.upper())
    variables = [param.envvar] if isinstance(param.envvar, str) else param.envvar or []
    return f"'{param.opts[0]}'" + (f" (or {' or '.join(variables)} in the environment)" if variables else "")

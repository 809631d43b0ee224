"""Log records as JSON lines, for machines."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Final

from rv_distributed.errors import redacted

#: The logger that says when machine code is made, while nothing else gets on.
COMPILING: Final = "rv_distributed.compiling"


class JsonLines(logging.Formatter):
    """One JSON object a record: ``time``, ``level``, ``event``, and what ``extra={"fields": {…}}`` adds."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return redacted(json.dumps(document, default=str))

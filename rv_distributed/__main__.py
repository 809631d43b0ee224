"""``python -m rv_distributed``: ``rv`` where the console script is not installed, as in jobs that bring a wheel."""

from rv_distributed.cli import main

main()

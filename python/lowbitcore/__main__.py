"""``python -m lowbitcore``: the command line."""

from .cli import main

main()

"""``python -m lowbitcore``: the command line."""

from lowbitcore.cli import main

main()

"""``python -m tunediff``: the command line."""

from tunediff.cli.main import main

main()

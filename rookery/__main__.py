"""`python -m rookery`, for when the command `rookery` is not on the path."""

from rookery.cli import main

main()

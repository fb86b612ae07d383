"""``python -m hasten.cli``."""

from hasten.cli import main

main()

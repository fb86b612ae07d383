"""The command line. Each command is one module; what a command needs is imported when it runs."""

from hasten.cli.app import app, main

__all__ = ["app", "main"]

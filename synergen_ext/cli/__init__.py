"""The command line ``synergen``; ``main`` is the console script."""

from .app import main

__all__ = ["main"]

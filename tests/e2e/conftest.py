"""The command line within this process, for what a process of its own would show no better."""

from unit.cli.test_commands import run

__all__ = ["run"]

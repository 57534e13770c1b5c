"""The program `lamina`, also as `python -m lamina`: Ctrl-C is looked after before anything else is imported."""

from __future__ import annotations

from lamina.cli import interrupt


def main() -> None:
    """Run the command that the process was started with, and exit."""
    interrupt.begin()
    try:
        from lamina.cli.main import main as run

        run()
    except KeyboardInterrupt:
        interrupt.leave()


if __name__ == "__main__":
    main()

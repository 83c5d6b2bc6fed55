"""``python -m llava.cli`` is `visipruner`."""

from llava.cli import run

if __name__ == "__main__":
    run()

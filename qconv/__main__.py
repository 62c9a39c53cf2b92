"""`python -m qconv`."""

from qconv.cli.cli import run

if __name__ == "__main__":
    run()

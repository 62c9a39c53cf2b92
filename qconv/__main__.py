"""`python -m qconv`."""

from qconv.cli.main import run

if __name__ == "__main__":
    run()

"""`python -m qconv`."""

from qconv.cli import main

if __name__ == "__main__":
    main()

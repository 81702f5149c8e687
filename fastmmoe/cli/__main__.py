"""`python -m fastmmoe.cli`."""

from fastmmoe.cli import main

if __name__ == "__main__":
    main()

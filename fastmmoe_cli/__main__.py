"""`python -m fastmmoe_cli`."""

from fastmmoe_cli import main

if __name__ == "__main__":
    main()

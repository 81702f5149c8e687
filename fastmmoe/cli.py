"""`python -m fastmmoe.cli`, another way to start the command line; it lives in `fastmmoe_cli`, which starts at once."""

from fastmmoe_cli import main

if __name__ == "__main__":
    main()

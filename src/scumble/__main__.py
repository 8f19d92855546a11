"""`python -m scumble` is the `scumble` command."""

from scumble.cli.main import main

if __name__ == "__main__":
    main()

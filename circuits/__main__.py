"""`python -m circuits`: the command line (layer 7)."""

from circuits.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m circuits`: the command line."""

from circuits.cli.main import main

if __name__ == "__main__":
    main()

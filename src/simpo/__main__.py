"""`python -m simpo` is the `simpo` command."""

from simpo.cli import main

if __name__ == "__main__":
    main()

"""`python -m megatrain` is the `megatrain` command."""

from megatrain.cli.main import main

if __name__ == "__main__":
    main()

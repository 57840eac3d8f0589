"""`python -m flatq_cli` is `flatq`."""

from flatq_cli.cli.app import main

if __name__ == "__main__":
    main()

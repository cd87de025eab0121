"""`python -m virnucpro_cli`."""

from virnucpro_cli.cli import main

main()

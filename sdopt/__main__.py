"""`python -m sdopt`."""

from sdopt.cli.main import main

main()

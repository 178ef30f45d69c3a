"""`python -m mvmci`."""

from mvmci.cli import main

main()

"""`python -m moetune`."""

from moetune.cli.main import main

main()

"""`python -m dha_peft.cli` is the `dha` command."""

from . import main

main()

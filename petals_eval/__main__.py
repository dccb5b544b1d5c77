"""`python -m petals_eval`: the command, of the environment whose Python runs it."""

from petals_eval.cli import main

if __name__ == "__main__":
    main()

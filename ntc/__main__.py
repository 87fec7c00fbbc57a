"""``python -m ntc``: the same as the command ``ntc``."""

from ntc.cli import main

if __name__ == "__main__":
    main()

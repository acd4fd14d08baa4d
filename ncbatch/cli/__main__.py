"""``python -m ncbatch.cli``: what the command ``ncbatch`` does."""

from ncbatch.cli import main

if __name__ == "__main__":
    main()

"""`python -m grpo` is `grpo`."""

from grpo.cli import main

if __name__ == "__main__":
    main()

"""`python -m smoltolk`."""

from smoltolk.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

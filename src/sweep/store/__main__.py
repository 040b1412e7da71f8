"""`python -m sweep.store`."""

from sweep.store.rows import main

if __name__ == "__main__":
    main()

"""`python -m sweep.report`."""

from sweep.report.rendering import main

if __name__ == "__main__":
    main()

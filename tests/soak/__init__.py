"""The long forms of what the tests show with a handful; each runs as `python -m tests.soak.NAME`."""

"""Programs that use the import API; each runs as `python -m examples.NAME`."""

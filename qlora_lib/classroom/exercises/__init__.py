"""The exercises: one module a notebook, each registering its own (see `classroom/checks.py`)."""

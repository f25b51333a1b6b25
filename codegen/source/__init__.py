"""A plan's program as Python to read and to run: `written` makes the text, the other half is what the text calls."""

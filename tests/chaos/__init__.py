"""What is promised, while things break. `python -m tests.chaos` runs the whole programme and prints a table; the tests
run each of its scenarios for a short while."""

"""What things cost. `python -m tests.benchmarks` measures without sockets, `python -m tests.benchmarks.end_to_end` with
a server, and `python -m tests.benchmarks.stalled` with clients that don't read."""

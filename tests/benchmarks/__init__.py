"""What things cost. `python -m tests.benchmarks` measures without sockets, `python -m tests.benchmarks.end_to_end` with
a server, `python -m tests.benchmarks.stalled` with clients that don't read, and `python -m tests.benchmarks.fallbacks`
with clients without a WebSocket."""

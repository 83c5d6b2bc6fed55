"""Clocks for pruning: `python -m benchmarks.prefill --shape 1b` and its siblings `decode`, `throughput`, `memory`,
`methods`, `probe`; `python -m benchmarks.all --device cuda --shape 7b` runs all of them. `docs/benchmarks.md` has the
figures.

Weights are random, so decisions are forced (`llava.pruning.methods.Schedule`): the time depends on shapes
and schedule alone.
"""

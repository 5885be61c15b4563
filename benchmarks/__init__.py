"""Each file measures one promise beside a peer, in the same run: `python -m benchmarks.NAME`."""

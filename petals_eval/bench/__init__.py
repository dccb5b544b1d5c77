"""Benchmarks: what a swarm does, what it costs the client, and how far that is from what is possible."""

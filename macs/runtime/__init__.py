"""MACS in a running model: what every engine's adapter needs, with no engine in it."""

"""``macs bench``: what MACS costs and what it gains, beside the baselines and beside what is possible."""

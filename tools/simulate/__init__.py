"""``macs simulate``: how long MoE layers take on clusters nobody has at hand."""

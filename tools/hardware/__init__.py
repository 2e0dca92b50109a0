"""What GPUs and engines cost: ``fit`` makes the figures of published measurements, ``machine`` reads them."""

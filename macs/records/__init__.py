"""What is measured and kept: metrics of layers, profiles of models, recorded traffic."""

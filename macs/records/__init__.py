"""Measurements: loads of layers, counters, recorded routing, profiles of models."""

"""``macs calibrate``: which expert of a model serves which modality."""

from ..common import clone

clone.examples("tiny_vlm")

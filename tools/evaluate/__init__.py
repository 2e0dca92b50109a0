"""``macs evaluate`` and ``macs importance``: what a bounded step costs in answers."""

from ..common import clone

clone.examples("tiny_vlm")

"""``macs tune``: how a bound on the step is best split among the layers of a model."""

from ..common import clone

clone.examples("tiny_vlm")

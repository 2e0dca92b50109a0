"""``macs tune``, and the same for any engine: ``Tuned`` says what is measured, ``tune`` measures it."""

from .model import Tuned
from .tuning import tune

__all__ = ["Tuned", "tune"]

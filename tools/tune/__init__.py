"""``macs tune``, and the same for any engine: ``Scorer`` says what is measured, ``tune`` measures it."""

from .model import Scorer
from .tuning import tune

__all__ = ["Scorer", "tune"]

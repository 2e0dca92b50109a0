"""A tiny Qwen3-VL-MoE, trained on questions about real pictures, for the examples and tests.

The model is small enough to live in the repository, yet everything about it is real: the
Hugging Face model class, photographs, handwritten digits, held-out test data.
"""

import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm; ours say more

CHECKPOINT = Path(__file__).parent / "checkpoint"

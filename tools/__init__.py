"""The tools of macs, installed as ``macs_tools`` and run by the ``macs`` command.

Every command is a folder or a file: ``run`` has its arguments, which are checked before any engine is
imported, and its ``main``; ``common`` is what they share.
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm; what we run has bars of its own

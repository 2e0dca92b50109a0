"""``python -m macs``: the ``macs`` command."""

from .doctor import main

raise SystemExit(main())

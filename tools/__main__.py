"""``python -m macs_tools``: the ``macs`` command."""

from .cli import main

raise SystemExit(main())

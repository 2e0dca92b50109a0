"""``python -m macs``: the ``macs`` command, whose tools are a package of their own."""

from macs_tools.cli import main

raise SystemExit(main())

"""The tools of macs, installed as ``macs_tools`` and run by the ``macs`` command.

Every command is a folder or a file: ``run`` has its arguments, which are checked before any engine is
imported, and its ``main``; ``common`` is what they share.
"""

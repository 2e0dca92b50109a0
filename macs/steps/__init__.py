"""The steps of a plan, one file each; ``macs.planner`` calls them in order.

A step's public function is plain torch: the readable form, and the reference of its kernel. On a GPU with
Triton it calls the kernel of the same name and signature in the file of the same name in ``kernels``.
"""

"""For the CI's environment of vLLM: PyPI's torchvision is built for CUDA, and beside a torch for CPUs it does
not import, since two operators are not there. They are defined, not implemented, just before its import."""

import sys


class Finder:
    """Waits for the import of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            kept.append(self)


kept: list[Finder] = []
sys.meta_path.insert(0, Finder())

"""Where experts live and where tokens come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The expert-parallel layout as one process sees it.

    num_experts, num_ranks: E experts on R ranks, G = E / R each.
    expert_rank: for every expert the rank it lives on; contiguous blocks by default.
    sources: the ranks whose tokens this process plans. One, its own, under expert parallelism;
        several let one process plan what several would (``Tokens.source`` says whose a token is).
    """

    num_experts: int
    num_ranks: int = 1
    expert_rank: tuple[int, ...] = ()
    sources: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_ranks < 1 or self.num_experts % self.num_ranks:
            raise ValueError(
                f"topology: found {self.num_experts} experts on {self.num_ranks} ranks, expected ranks that "
                "divide them"
            )
        even = tuple(rank for rank in range(self.num_ranks) for _ in range(self.experts_per_rank))
        if not self.expert_rank:
            object.__setattr__(self, "expert_rank", even)
        if tuple(sorted(self.expert_rank)) != even:
            raise ValueError(
                f"topology.expert_rank: found {self.expert_rank}, expected each of {self.num_ranks} ranks "
                f"{self.experts_per_rank} times"
            )
        if not self.sources or not all(0 <= rank < self.num_ranks for rank in self.sources):
            raise ValueError(
                f"topology.sources: found {self.sources}, expected ranks from 0 to {self.num_ranks - 1}"
            )

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    def experts_of_rank(self) -> list[list[int]]:
        """Experts by rank, ascending: R lists of G."""
        return [
            [expert for expert, home in enumerate(self.expert_rank) if home == rank]
            for rank in range(self.num_ranks)
        ]

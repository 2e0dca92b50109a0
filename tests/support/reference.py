"""The algorithm once more: slow, plain Python, float64, written from the formulas alone.

Nothing of ``macs`` but its constants is used here, so that a mistake in one is not in the other.
Fixed-point numbers are exact fractions of a token: weights and capacities are rounded to 1/65536.
"""

from __future__ import annotations

import math
from fractions import Fraction

UNIT = 65536
PRIORITY = 1 << 24


def unit(row):
    """A vector of length 1, or of nothing but zeros."""
    length = math.sqrt(sum(value * value for value in row))
    return [value / length if length else 0.0 for value in row]


def entropy(features):
    """H = -sum p ln p, p = softmax(features); NaN if a feature is not finite."""
    if not all(math.isfinite(value) for value in features):
        return math.nan
    top = max(features)
    terms = [math.exp(value - top) for value in features]
    total = sum(terms)
    return -sum(term / total * (math.log(term) - math.log(total)) for term in terms if term > 0)


def normalized(entropies, groups, included):
    """(H - mu) / (sigma + 1e-6) in each group; 0 where there is no spread."""
    result = []
    for own, group in zip(entropies, groups, strict=True):
        members = [h for h, g, say in zip(entropies, groups, included, strict=True) if g == group and say]
        if not members:
            result.append(0.0)
            continue
        mean = sum(members) / len(members)
        sigma = math.sqrt(sum((h - mean) ** 2 for h in members) / len(members))
        result.append(0.0 if sigma < 1e-5 else (own - mean) / (sigma + 1e-6))
    return result


def weights(entropies, visual, groups, sharpness):
    """sigmoid(-sharpness * H~) for visual tokens, 1 for text, the least for what is not finite."""
    finite = [math.isfinite(h) for h in entropies]
    included = [v and f for v, f in zip(visual, finite, strict=True)]
    safe = [h if f else 0.0 for h, f in zip(entropies, finite, strict=True)]
    values = []
    for is_visual, is_finite, z in zip(visual, finite, normalized(safe, groups, included), strict=True):
        if not is_visual:
            values.append(1.0)
        elif not is_finite:
            values.append(1 / UNIT)
        else:
            values.append(1 / (1 + math.exp(min(700.0, sharpness * z))))
    return values


def visual_ratio(weight, visual):
    total = sum(weight)
    return sum(w for w, v in zip(weight, visual, strict=True) if v) / total if total else 0.5


def capacities(gamma, rho, floor, weight, visual, top_k, bias, pool):
    """The capacity of every pool, in tokens; pool[j] is the pool of expert j."""
    experts = len(bias)
    lean = visual_ratio(weight, visual) - 0.5
    factors = [1 + rho * m * lean for m in bias]
    result = []
    for p in range(max(pool) + 1):
        members = [factors[j] for j in range(experts) if pool[j] == p]
        share = math.ceil(gamma * len(weight) * top_k * len(members) / experts - 1e-9)
        room = min(share * sum(members) / len(members), len(weight) * top_k)
        result.append(max(floor, room))
    return result


def row_limit(target, assignments, ranks):
    """Rows of so many assignments that each rank may compute."""
    limit = math.floor(assignments / ranks * target)
    return max(limit, math.ceil(Fraction(assignments, ranks))) if target >= 1 else limit


def shared_limits(target, asked, tokens, top_k, ranks):
    """The same by source and rank, for sources that share a bound: asked [S][R] rows, tokens [S]."""
    own = [math.floor(count * top_k / ranks * target) for count in tokens]
    shared = [[one] * ranks for one in own]
    for rank in range(ranks):
        over = [max(row[rank] - one, 0) for row, one in zip(asked, own, strict=True)]
        free = [max(one - row[rank], 0) for row, one in zip(asked, own, strict=True)]
        spare = max(row_limit(target, sum(tokens) * top_k, ranks) - sum(own), 0) + sum(free)
        for source in range(len(own)):
            if over[source]:
                part = Fraction(over[source] * spare, sum(over))
                shared[source][rank] += min(over[source], math.floor(part))
            elif sum(free):
                part = Fraction(free[source] * min(sum(over), sum(free)), sum(free))
                shared[source][rank] -= math.ceil(part)
    return shared


def priority(rule, score, weight):
    """An integer from 0 to 2 ** 24; weight in 1/65536."""
    value = {"score": score, "product": weight / UNIT * score}[rule]
    return min(PRIORITY, max(0, round(value * PRIORITY)))


class Case:
    """One source's tokens, in batch-major order, and the room it has.

    experts[t] ascending, scores[t][j], cost[t] and weight[t] in 1/65536, room[pool] likewise,
    remaining_rows[rank] in rows or none, pool[j], rank[j], similarity[i][j].
    """

    def __init__(
        self, experts, scores, cost, weight, room, remaining_rows, pool, rank, similarity, rule, exempt=None
    ):
        self.experts, self.scores, self.cost, self.weight = experts, scores, cost, weight
        self.pool, self.rank, self.similarity, self.rule = pool, rank, similarity, rule
        self.room = list(room)
        self.remaining_rows = None if remaining_rows is None else list(remaining_rows)
        self.exempt = exempt or [False] * len(experts)
        self.placed = {}  # (token, slot) -> expert
        self.rerouted = set()

    def assignments(self):
        return [(t, i) for t, row in enumerate(self.experts) for i in range(len(row)) if row[i] >= 0]

    def order(self, assignment):
        t, i = assignment
        own = priority(self.rule, self.scores[t][self.experts[t][i]], self.weight[t])
        return (-(PRIORITY + 1) if self.exempt[t] else -own, t, i)

    def admit(self):
        """Longest prefix of each pool, then of each rank."""
        kept = []
        for p in sorted(set(self.pool)):
            used, full = 0, False
            for t, i in sorted(
                (a for a in self.assignments() if self.pool[self.experts[a[0]][a[1]]] == p), key=self.order
            ):
                used += self.cost[t]
                full = full or used > self.room[p]
                if not full or self.exempt[t]:
                    kept.append((t, i))
        if self.remaining_rows is not None:
            within = []
            for r in sorted(set(self.rank)):
                mine = sorted((a for a in kept if self.rank[self.experts[a[0]][a[1]]] == r), key=self.order)
                within += [a for n, a in enumerate(mine) if n < self.remaining_rows[r] or self.exempt[a[0]]]
            kept = within
        for t, i in kept:
            self.take(t, i, self.experts[t][i])

    def take(self, t, i, expert):
        self.placed[t, i] = expert
        self.room[self.pool[expert]] -= self.cost[t]
        if self.remaining_rows is not None:
            self.remaining_rows[self.rank[expert]] -= 1

    def reroute(self, rounds, where):
        spent = set()
        for _ in range(rounds):
            proposals = []
            for t in range(len(self.experts)):
                waiting = [
                    a for a in self.assignments() if a[0] == t and a not in self.placed and a not in spent
                ]
                if not waiting:
                    continue
                asks = min(waiting, key=self.order)
                found = self.best(t, self.experts[t][asks[1]], where)
                if found is None:
                    spent.add(asks)
                else:
                    rank = priority(self.rule, self.scores[t][found], self.weight[t])
                    proposals.append((-rank, t, asks[1], found))
            accepted = []
            for p in sorted(set(self.pool)):
                used, full = 0, False
                for proposal in sorted(q for q in proposals if self.pool[q[3]] == p):
                    used += self.cost[proposal[1]]
                    full = full or used > self.room[p]
                    if not full:
                        accepted.append(proposal)
            if self.remaining_rows is not None:
                accepted = [
                    q
                    for r in sorted(set(self.rank))
                    for n, q in enumerate(sorted(a for a in accepted if self.rank[a[3]] == r))
                    if n < self.remaining_rows[r]
                ]
            for _, t, i, expert in accepted:
                self.take(t, i, expert)
                self.rerouted.add((t, i))

    def best(self, t, home, where):
        """The open candidate of most score times similarity; ties to the lower expert."""
        taken = {e for e in self.experts[t] if e >= 0}
        taken |= {e for (token, _), e in self.placed.items() if token == t}
        options = []
        for j in range(len(self.pool)):
            if where == "rank" and self.rank[j] != self.rank[home]:
                continue
            value = self.scores[t][j] * self.similarity[home][j]
            open_ = j not in taken and value > 0 and self.room[self.pool[j]] >= self.cost[t]
            if self.remaining_rows is not None:
                open_ = open_ and self.remaining_rows[self.rank[j]] >= 1
            if open_:
                options.append((-value, j))
        return min(options)[1] if options else None

    def limit_drops(self, mass, max_drop):
        """mass[(t, i)] in 1/1048576; the fewest of the dropped, best first, come back."""
        everyone = self.assignments()
        dropped = sorted((a for a in everyone if a not in self.placed), key=self.order)
        excess = sum(mass[a] for a in dropped) - math.floor(sum(mass[a] for a in everyone) * max_drop)
        back = 0
        for t, i in dropped:
            if back >= excess:
                break
            back += mass[t, i]
            self.take(t, i, self.experts[t][i])

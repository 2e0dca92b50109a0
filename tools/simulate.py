"""How long MoE layers take on clusters nobody has at hand, by policy, from routings and measured costs.

    python tools/simulate.py --shape wide --ranks 8 16 32 64 128 256 512        # synthetic traffic
    python tools/simulate.py --recordings runs/routing.rank*.safetensors        # one's own
    python tools/simulate.py --check runs/layer.jsonl                           # against measurements

Every source rank's tokens are drawn, or taken from a recording, and planned by the real planner; the rows
that result go through a cost model (tools/cost_model.py) whose figures come from ``benchmark.py
--cost-model`` or are stated. Beside the policies stand bounds that move weights instead of tokens: EPLB
with replicated experts (placed by the loads of the step before), least-loaded EP (spills to idle ranks,
weights sent along), and ideal balance; what they take in memory and traffic is counted, and not
overlapped with anything.

Shapes: R ranks, E experts; asked [R, E] rows that each source sends to each expert.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_model import Breakdown, CostModel, at_home, break_even, captured, on_network, stated_h100
from rich.console import Console
from rich.progress import track
from rich.table import Table
from workloads import (
    SHAPES,
    VANILLA,
    WORKLOADS,
    Batch,
    Contender,
    Shape,
    contenders,
    draw,
    features,
    load_recordings,
    loosened,
    replay,
    stream,
    with_visual_share,
)

from macs import Topology, build_policy
from macs.files import output_file, output_folder

IDEAL = "ideal balance"
BatchOf = Callable[[int, int], Batch]
"""step, source rank -> batch."""


# Loads.


@dataclass(frozen=True)
class Asked:
    """What the sources ask for in a step: rows [R, E]; combine mass kept, rerouted, dropped (in sum 1)."""

    rows: np.ndarray
    mass: np.ndarray


def asked_by(
    shape: Shape, chosen: dict[str, Contender], batch_of: BatchOf, step: int, ranks: int, seed: int
) -> dict[str, Asked]:
    """What they ask for under every policy."""
    rows: dict[str, list[np.ndarray]] = {title: [] for title in chosen}
    mass = {title: np.zeros(3) for title in chosen}
    for rank in range(ranks):
        batch = batch_of(step, rank)
        # Features only tell visual tokens apart, and do so with fewer.
        hidden = features(batch, min(shape.hidden, 256), step, rank, seed)
        tokens = batch.tokens
        topology = Topology(shape.experts, ranks, sources=(rank,))
        for title, contender in chosen.items():
            policy = build_policy(contender.policy, contender.config, topology, shape.top_k)
            found = policy.plan(hidden, batch.experts, batch.weights, batch.scores, tokens).statistics
            rows[title].append(found.load_after.numpy())
            parts = (found.kept_mass, found.rerouted_mass, found.dropped_mass)
            mass[title] += [float(part) for part in parts]
    return {title: Asked(np.stack(rows[title]), mass[title] / mass[title].sum()) for title in chosen}


# Bounds: where the rows of an expert are computed instead. share [E, R]: what part of them on which rank.


@dataclass(frozen=True)
class Placement:
    """share [E, R]; extra bytes a rank keeps; bytes a rank receives or sends for them in a step, at most."""

    share: np.ndarray
    memory: float = 0.0
    moved: float = 0.0


def replicated(loads: np.ndarray, ranks: int, replicas: int, expert_bytes: int, interval: int) -> Placement:
    """As EPLB: ``replicas`` more experts on every rank. The busiest expert is copied, again and again, until
    all places are taken; then the busiest copies go first, each to the idlest rank with a place.

    loads [E]: what is known when experts are placed. All experts move, once in ``interval`` steps.
    """
    experts = len(loads)
    copies = np.ones(experts, dtype=int)
    queue = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(queue)
    for _ in range(replicas * ranks):
        _, expert = heapq.heappop(queue)
        copies[expert] += 1
        heapq.heappush(queue, (-loads[expert] / copies[expert], expert))
    places = experts // ranks + replicas
    share = np.zeros((experts, ranks))
    ranks_by_load = [(0.0, rank, 0) for rank in range(ranks)]
    for expert in np.argsort(-loads / copies, kind="stable"):
        for _ in range(copies[expert]):
            load, rank, taken = heapq.heappop(ranks_by_load)
            share[expert, rank] += 1 / copies[expert]
            if taken + 1 < places:
                entry = load + loads[expert] / copies[expert], rank, taken + 1
                heapq.heappush(ranks_by_load, entry)
    return Placement(share, replicas * expert_bytes, places * expert_bytes / interval)


def least_loaded(loads: np.ndarray, ranks: int, expert_bytes: int) -> Placement:
    """Ranks with more rows than the mean hand the rest to the idlest, biggest expert first, weights with
    them; every step anew."""
    experts = len(loads)
    share = at_home(experts, ranks)
    rows = loads @ share
    mean = rows.mean()
    taken, given = np.zeros(ranks, dtype=int), np.zeros(ranks, dtype=int)
    for rank in np.argsort(-rows):
        mine = np.flatnonzero(share[:, rank] == 1)
        for expert in mine[np.argsort(-loads[mine])]:
            while rows[rank] > mean + 1 and share[expert, rank] * loads[expert] > 1:
                idlest = int(rows.argmin())
                part = min(rows[rank] - mean, mean - rows[idlest], share[expert, rank] * loads[expert])
                if part < 1:
                    break
                share[expert, rank] -= part / loads[expert]
                share[expert, idlest] += part / loads[expert]
                rows[rank] -= part
                rows[idlest] += part
                taken[idlest] += 1
                given[rank] += 1
    rounding = (share * loads[:, None] < 0.5) & (loads[:, None] >= 1)
    share[rounding] = 0.0
    most = max(int(taken.max()), int(given.max()))
    return Placement(share, int(taken.max()) * expert_bytes, most * expert_bytes)


def moving_ms(model: CostModel, placement: Placement) -> float:
    """For the weights that go with a placement, over the slower network."""
    return placement.moved / min(model.inside_gbs, model.beyond_gbs) / 1e6


def ideal(model: CostModel, asked: np.ndarray) -> Breakdown:
    """The same rows, even over sources, ranks and experts."""
    return model.layer(np.full(asked.shape, asked.sum() / asked.size))


# Simulation.


def simulate(
    shape: Shape,
    ranks: int,
    batch_of: BatchOf,
    chosen: dict[str, Contender],
    model: CostModel,
    steps: int,
    replicas: Sequence[int] = (),
    interval: int = 100,
    bounds: bool = True,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Mean layer time of every policy and bound over the steps, in ms, and the parts of it."""
    times: dict[str, list[Breakdown]] = {}
    stragglers: dict[str, list[float]] = {}
    masses: dict[str, list[np.ndarray]] = {}
    extra: dict[str, Placement] = {}
    replayed: dict[str, float] = {}
    mean = shape.tokens * shape.top_k
    before = np.zeros(shape.experts)
    placed: dict[str, Placement] = {}
    for step in range(steps):
        asked = asked_by(shape, chosen, batch_of, step, ranks, seed)
        for title, one in asked.items():
            planning = model.planning_ms(title, shape.tokens)
            replayed[title] = captured(model).planning_ms(title, shape.tokens) - planning
            times.setdefault(title, []).append(model.layer(one.rows, planning))
            stragglers.setdefault(title, []).append(float(one.rows.sum(0).reshape(ranks, -1).sum(1).max()))
            masses.setdefault(title, []).append(one.mass)
        vanilla = asked[VANILLA].rows
        if not bounds:
            continue
        loads = vanilla.sum(0).astype(float)
        if step % interval == 0:
            if step == 0:
                # By what the experts have in another step of the same traffic.
                other = asked_by(shape, {VANILLA: chosen[VANILLA]}, batch_of, steps, ranks, seed)[VANILLA]
                before = other.rows.sum(0).astype(float)
            for count in replicas:
                title = f"EPLB, {count} replica{'s' * (count > 1)} a rank"
                placed[title] = replicated(before, ranks, count, model.expert_bytes, interval)
        placed["least-loaded EP"] = least_loaded(loads, ranks, model.expert_bytes)
        for title, placement in placed.items():
            moving = moving_ms(model, placement)
            times.setdefault(title, []).append(model.layer(vanilla, 0.0, placement.share, moving))
            stragglers.setdefault(title, []).append(float((loads @ placement.share).max()))
            worst = extra.get(title, placement)
            extra[title] = replace(
                placement,
                memory=max(worst.memory, placement.memory),
                moved=max(worst.moved, placement.moved),
            )
        times.setdefault(IDEAL, []).append(ideal(model, vanilla))
        stragglers.setdefault(IDEAL, []).append(loads.sum() / ranks)
        before = loads
    base = float(np.mean([one.total for one in times[VANILLA]]))
    best = float(np.mean([one.total for one in times[IDEAL]])) if bounds else 0.0
    rows = []
    for title, parts in times.items():
        total = float(np.mean([one.total for one in parts]))
        row = {
            "ranks": ranks,
            "policy": title,
            "ms": total,
            "ratio": total / base,
            "captured": (total + replayed.get(title, 0.0)) / base,
            "straggler": float(np.mean(stragglers[title])) / mean,
            **{
                part: float(np.mean([getattr(one, part) for one in parts]))
                for part in ("source", "planner", "exchange", "experts")
            },
        }
        if bounds and base > best:
            row["won_back"] = (base - total) / (base - best)
        if title in masses:
            names = ("kept_mass", "rerouted_mass", "dropped_mass")
            row |= dict(zip(names, np.mean(masses[title], axis=0).tolist(), strict=True))
        if title in extra:
            row |= {"extra_bytes": extra[title].memory, "moved_bytes": extra[title].moved}
        rows.append(row)
    return rows


def synthetic(workload: str, shape: Shape, ranks: int, seed: int) -> BatchOf:
    return lambda step, rank: draw(workload, shape, step, rank, ranks, seed)


def resampled(paths: Sequence[Path], layer: int, shape: Shape, seed: int) -> tuple[Shape, BatchOf]:
    """Recorded traffic for any number of ranks: each source draws its tokens, with replacement, from those
    of one recorded rank and step."""
    recordings = load_recordings(paths)
    steps = replay(recordings, layer)
    shape = replace(shape, experts=recordings[0].num_experts, top_k=recordings[0].top_k)

    def batch_of(step: int, rank: int) -> Batch:
        row = steps[step % len(steps)]
        own = row[rank % len(row)]
        count = len(own.kinds)
        taken = torch.randint(count, (shape.tokens,), generator=stream("resampled", seed, step, rank))
        return Batch(*(getattr(own, name)[taken] for name in ("experts", "weights", "scores", "kinds")))

    return shape, batch_of


# Against measurements.


def check(path: Path, console: Console) -> list[dict[str, Any]]:
    """Predicted beside measured layer times, for every result of layer and virtual-ep in a file; the rows are
    planned anew, and the costs are those of calls that no workload made."""
    found = []
    for line in path.read_text().splitlines():
        result = json.loads(line)
        if result["mode"] not in ("layer", "virtual-ep"):
            continue
        arguments, shape = result["arguments"], Shape(**result["shape"])
        ranks, model = arguments["ranks"], CostModel(**result["cost_model"])
        known = contenders(arguments["straggler"])
        measured = [row for row in result["rows"] if "failed" not in row and row["workload"] in WORKLOADS]
        titles = list(dict.fromkeys(row["policy"] for row in measured))
        known |= dict(
            loosened(title, known[title], bound)
            for title in ("token drop", "expanded drop")
            for bound in arguments["ladder"]
        )
        chosen = {title: known[title] for title in titles}
        for workload in track(
            dict.fromkeys(row["workload"] for row in measured), result["mode"], console=console
        ):
            batch_of = synthetic(workload, shape, ranks, arguments["seed"])
            predicted = simulate(
                shape,
                ranks,
                batch_of,
                chosen,
                model,
                arguments["steps"],
                bounds=False,
                seed=arguments["seed"],
            )
            by_title = {row["policy"]: row for row in predicted}
            for row in measured:
                if row["workload"] == workload:
                    guess = by_title[row["policy"]]
                    # Of virtual-ep what was measured: the rest of it is this very model.
                    virtual = result["mode"] == "virtual-ep"
                    told = row["measured_ms"] if virtual else row["ms"]
                    expected = guess["experts"] + guess["planner"] if virtual else guess["ms"]
                    # As slow as the machine was then, by calls that no workload makes.
                    expected *= result.get("slowness", {}).get(workload, 1.0)
                    found.append(
                        {
                            "mode": result["mode"],
                            "ranks": ranks,
                            "workload": workload,
                            "policy": row["policy"],
                            "measured": told,
                            "predicted": expected,
                            "error": expected / told - 1,
                            "ratio_error": None if virtual else guess["ratio"] / row["ratio"] - 1,
                        }
                    )
    if not found:
        raise ValueError(f"--check {path}: found no result of layer or virtual-ep with a known workload")
    table = Table(
        caption="Predicted over measured time, less one: of the layer; in virtual-ep of experts and planner.",
        caption_justify="left",
    )
    headings = ("mode", "ranks", "workload", "median", "largest", "of")
    for heading in (*headings, "over vanilla: median", "largest", "of"):
        table.add_column(heading, justify="left" if heading in ("mode", "workload", "of") else "right")
    for key in dict.fromkeys((one["mode"], one["ranks"], one["workload"]) for one in found):
        mine = [one for one in found if (one["mode"], one["ranks"], one["workload"]) == key]
        cells = []
        for name in ("error", "ratio_error"):
            told = [one for one in mine if one[name] is not None]
            if told:
                worst = max(told, key=lambda one: abs(one[name]))
                middle = np.median([abs(one[name]) for one in told])
                cells += [f"{middle:.1%}", f"{worst[name]:+.1%}", worst["policy"]]
        table.add_row(key[0], str(key[1]), key[2], *cells)
    console.print(table)
    for mode, ranks in dict.fromkeys((one["mode"], one["ranks"]) for one in found):
        for name, what in (("error", "times"), ("ratio_error", "times over vanilla's")):
            mine = [one for one in found if (one["mode"], one["ranks"]) == (mode, ranks)]
            errors = np.array([abs(one[name]) for one in mine if one[name] is not None])
            if len(errors):
                low, high = np.percentile(errors, (50, 95))
                console.print(
                    f"{mode}, {ranks} ranks: {len(errors)} {what}, {np.mean(errors <= 0.15):.0%} within "
                    f"15 %; median {low:.1%}, 95th percentile {high:.1%}, largest {errors.max():.1%}"
                )
    return found


# Plots.


def _plot(path: Path, title: str, across: str, draw_on: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.6))
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    draw_on(axes)
    axes.set_xlabel(across)
    axes.set_title(textwrap.fill(title, 90), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_over(rows: Sequence[dict[str, Any]], key: str, path: Path, title: str, across: str) -> None:
    """Layer time over vanilla's at the first point, by policy."""

    def lines(axes: Any) -> None:
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = [row for row in rows if row["policy"] == policy]
            bound = "replica" in policy or policy in (IDEAL, "least-loaded EP")
            axes.plot(
                [row[key] for row in mine],
                [row["ms"] for row in mine],
                marker="o",
                markersize=3,
                linestyle=":" if bound else "-",
                label=policy,
            )
        if key == "ranks":
            axes.set_xscale("log", base=2)
        axes.set_ylabel("MoE layer, ms")
        axes.set_ylim(bottom=0)

    _plot(path, title, across, lines)


def plot_quality(points: Path, shape: Shape, model: CostModel, path: Path) -> bool:
    """KL of the evaluation's points against the layer time that their busiest rank would have here."""
    found = [json.loads(line) for line in points.read_text().splitlines()]
    found = [one for one in found if one["found"]["batches"] == "mixed"]
    if not found:
        return False
    key = json.loads(found[0]["key"])["model"]
    ranks = max(one["found"]["ranks"] for one in found if json.loads(one["key"])["model"] == key)
    chosen = [
        one["found"]
        for one in found
        if json.loads(one["key"])["model"] == key and one["found"]["ranks"] == ranks
    ]

    planned = model.planning_ms("macs", shape.tokens) if model.planner_ms else 0.0

    def time_of(straggler: float, computed: float, planning: float = planned) -> float:
        """The busiest rank has ``straggler`` times vanilla's mean, the others what is left."""
        mean = shape.tokens * shape.top_k
        rest = max(0.0, (computed * ranks - straggler) / (ranks - 1))
        rows = np.array([straggler] + [rest] * (ranks - 1)) * mean
        local = shape.experts // ranks
        asked = np.repeat(rows / ranks / local, local)[None].repeat(ranks, 0)
        return model.layer(asked, planning).total

    def dots(axes: Any) -> None:
        for title in dict.fromkeys(one["title"] for one in chosen):
            mine = [one for one in chosen if one["title"] == title]
            times = [time_of(one["straggler"], 1 - one["dropped"]) for one in mine]
            axes.plot(times, [one["picture_kl"][0] * 1000 for one in mine], "o", label=title)
        axes.axvline(
            time_of(chosen[0]["straggler_before"], 1.0, 0.0), color="grey", linewidth=0.8, label=VANILLA
        )
        axes.set_ylabel("KL to vanilla over picture questions, x 1000")
        axes.set_yscale("log")

    _plot(path, f"Answers against time, {ranks} ranks", "MoE layer, ms", dots)
    return True


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--tokens", type=int, default=1024, help="of a source rank")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["image-flood"])
    parser.add_argument("--recordings", nargs="+", type=Path)
    parser.add_argument("--layer", type=int, default=0, help="layer of the recordings")
    parser.add_argument("--policies", nargs="+", help="titles beside vanilla (default: all with a bound)")
    parser.add_argument("--straggler", type=float, default=1.05)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=48, help="MoE layers of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", nargs="*", type=int, default=[1, 2], help="of EPLB, on every rank")
    parser.add_argument("--interval", type=int, default=100, help="steps between placements of EPLB")
    parser.add_argument("--cost-model", type=Path, help="of benchmark.py (default: an H100 as stated)")
    parser.add_argument("--inside-gbs", type=float, help="10^9 bytes/s of a rank within its node")
    parser.add_argument("--beyond-gbs", type=float, help="10^9 bytes/s of a rank beyond it")
    parser.add_argument("--node", type=int, help="ranks of a node")
    parser.add_argument("--shares", nargs="*", type=float, default=[], help="visual shares to sweep")
    parser.add_argument(
        "--break-even", action="store_true", help="from how many tokens a rank on a plan pays, alone"
    )
    parser.add_argument("--quality", type=Path, help="points of tools/evaluate.py")
    parser.add_argument(
        "--check", type=Path, help="results of benchmark.py to be predicted, and nothing else"
    )
    parser.add_argument("--plots", type=output_folder)
    parser.add_argument("--json", type=output_file, help="append the result, one line")
    arguments = parser.parse_args(given)
    known = contenders(arguments.straggler)
    for title in arguments.policies or ():
        if title not in known:
            parser.error(f"--policies: found {title!r}, expected some of {', '.join(known)}")
    if arguments.steps < 1 or arguments.interval < 1:
        parser.error("--steps, --interval: expected 1 or more")
    experts = SHAPES[arguments.shape].experts
    if arguments.recordings:
        experts = load_recordings(arguments.recordings)[0].num_experts
    for count in arguments.ranks:
        if count < 1 or experts % count:
            parser.error(f"--ranks: found {count}, expected divisors of the {experts} experts")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 165)
    result: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(arguments).items()}}
    if arguments.break_even:
        show_break_even(SHAPES[arguments.shape], arguments.ranks[0], console)
    elif arguments.check:
        result["errors"] = check(arguments.check, console)
    else:
        result |= run(arguments, console)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    shape = replace(SHAPES[arguments.shape], tokens=arguments.tokens)
    model = CostModel.load(arguments.cost_model) if arguments.cost_model else stated_h100(shape)
    model.check(shape)
    model = on_network(model, arguments.inside_gbs, arguments.beyond_gbs, arguments.node)
    known = contenders(arguments.straggler)
    titles = arguments.policies or [title for title in list(known)[1:] if "nothing" not in title]
    chosen = {title: known[title] for title in (VANILLA, *titles)}
    options = {
        "steps": arguments.steps,
        "replicas": arguments.replicas,
        "interval": arguments.interval,
        "seed": arguments.seed,
    }
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {"cost_model": asdict(model), "sizes": {}, "shares": []}
    names = ["recording"] if arguments.recordings else arguments.workloads
    for name in names:
        rows: list[dict[str, Any]] = []
        for ranks in track(arguments.ranks, name, console=console):
            if arguments.recordings:
                shape, batch_of = resampled(arguments.recordings, arguments.layer, shape, arguments.seed)
            else:
                batch_of = synthetic(name, shape, ranks, arguments.seed)
            rows += simulate(shape, ranks, batch_of, chosen, model, **options)
        everything["sizes"][name] = rows
        for ranks in arguments.ranks:
            show([row for row in rows if row["ranks"] == ranks], name, arguments.layers, model, console)
        if arguments.plots:
            title = f"{name}, T {shape.tokens} a rank, E {shape.experts}, k {shape.top_k}; {model.origin}"
            plot_over(rows, "ranks", arguments.plots / f"size-{name}.png", title, "expert-parallel ranks")
    if arguments.shares:
        ranks = arguments.ranks[-1]
        for share in track(arguments.shares, "shares", console=console):
            flood = with_visual_share(share)

            def batch_of(step: int, rank: int, flood: Any = flood, share: float = share) -> Batch:
                return flood(shape, step, rank, ranks, stream(f"share {share}", arguments.seed, step, rank))

            rows = simulate(shape, ranks, batch_of, chosen, model, **options)
            everything["shares"] += [row | {"share": share} for row in rows]
        if arguments.plots:
            title = f"{ranks} ranks, T {shape.tokens} a rank, E {shape.experts}; {model.origin}"
            plot_over(everything["shares"], "share", arguments.plots / "share.png", title, "visual share")
    if arguments.quality and arguments.plots:
        plot_quality(arguments.quality, shape, model, arguments.plots / "quality.png")
    return everything


def show_break_even(shape: Shape, ranks: int, console: Console) -> None:
    """Tokens from which a plan pays, by the busiest rank without it."""
    table = Table(title=f"a plan pays from so many tokens a rank on, {ranks} ranks, an H100 as stated")
    for heading in ("busiest rank", "eager", "captured"):
        table.add_column(heading, justify="right")
    for straggler in (1.1, 1.2, 1.5, 2.0):
        found = (break_even(shape, ranks, straggler, replayed) for replayed in (False, True))
        table.add_row(f"{straggler:g}", *(str(one or "never") for one in found))
    console.print(table)


def show(rows: Sequence[dict[str, Any]], name: str, layers: int, model: CostModel, console: Console) -> None:
    table = Table(
        title=f"{name}, {rows[0]['ranks']} ranks",
        caption=f"Costs {model.origin}. Won back: of the time that vanilla takes beyond ideal balance of all "
        "its rows (who drops rows may win more). Captured: over vanilla where a CUDA graph replays the plan.",
        caption_justify="left",
    )
    headings = (
        "policy",
        "layer, ms",
        f"{layers} layers, ms",
        "/ vanilla",
        "captured",
        "won back",
        "busiest rank",
        "experts",
    )
    headings += ("exchange", "kept mass", "dropped mass", "extra MB", "moved MB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "policy" else "right")

    def told(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
        return form.format(row[key] * scale) if key in row else ""

    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['ms']:.3f}",
            f"{row['ms'] * layers:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['captured']:.3f}",
            told(row, "won_back", "{:.0%}"),
            f"{row['straggler']:.3f}",
            f"{row['experts']:.3f}",
            f"{row['exchange']:.3f}",
            told(row, "kept_mass", "{:.3f}"),
            told(row, "dropped_mass", "{:.3f}"),
            told(row, "extra_bytes", "{:.1f}", 1e-6),
            told(row, "moved_bytes", "{:.1f}", 1e-6),
        )
    console.print(table)


if __name__ == "__main__":
    main()

"""What to make of it: whether MACS pays on this traffic, what to put on the command line, and when not to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from macs import Profile

from .prediction import BALANCED, TARGETS, Prediction
from .traffic import Traffic

WORTH = 0.02
"""Share of a MoE layer's time below which a prediction of this kind is noise."""

FEW_VISUAL = 0.05
MAX_KL = 0.002


@dataclass(frozen=True)
class Advice:
    """verdict: in a line; reasons: what it rests on; against: why not, as far as this traffic says;
    commands: (title, lines)."""

    verdict: str
    reasons: list[str]
    against: list[str]
    commands: list[tuple[str, str]]


def size_of(traffic: Traffic, prediction: Prediction) -> int:
    """The predicted cluster size that is nearest to the recorded one."""
    return min(prediction.sizes, key=lambda size: abs(np.log2(size / traffic.ranks)))


def lowest(prediction: Prediction) -> str:
    """The policy with the lowest target: tuned, where the profile has a split for it."""
    below = [one for one in prediction.policies if one.startswith("macs 0")]
    tuned = [one for one in below if one.endswith("tuned")]
    return (tuned or below)[-1]


def advise(traffic: Traffic, prediction: Prediction, profile: Profile | None, named: Path | None) -> Advice:
    """From the measured traffic and what was predicted for it; named: the profile's file."""
    size = size_of(traffic, prediction)
    balance, low = prediction.of(size, f"macs {BALANCED:g}"), prediction.of(size, lowest(prediction))
    won, won_low = 1 - balance["ratio"], 1 - low["ratio"]
    target = lowest(prediction).split()[1]
    if won_low < WORTH:
        verdict = f"Not here: on {size} ranks no target wins more than {max(won_low, 0):.0%} of a MoE layer."
    elif won >= WORTH:
        verdict = (
            f"Worth it: on {size} ranks balance alone wins {won:.0%} of a MoE layer's time, a target of "
            f"{target} {won_low:.0%}."
        )
    else:
        verdict = (
            f"Only below the mean: on {size} ranks balance alone wins {max(won, 0):.0%}, a target of "
            f"{target} {won_low:.0%} of a MoE layer's time. macs tune measures what that costs in answers."
        )
    commands = [] if won_low < WORTH else _commands(profile, named, won, float(target))
    return Advice(verdict, _reasons(traffic, prediction), _against(traffic, prediction, size), commands)


def _reasons(traffic: Traffic, prediction: Prediction) -> list[str]:
    worst = traffic.percentiles()[2]
    median = float(np.median(traffic.tokens))
    found = [
        f"In the median step the busiest of {traffic.ranks} ranks has {traffic.typical:.2f} times the mean "
        f"rank's rows (mean of {traffic.layers} layers); at worst, p99 of layer {int(worst.argmax())}, "
        f"{worst.max():.2f}.",
        f"{traffic.visual_share:.0%} of the assignments are of visual tokens; a step has {median:.0f} tokens "
        f"a rank in the median.",
    ]
    if traffic.small:
        found.append(
            f"{traffic.small} of {traffic.small + traffic.steps} steps were small, as in decoding: left out."
        )
    if prediction.targets:
        wanted = [target for target in prediction.targets if target in TARGETS] or list(prediction.targets)
        kept = {target: prediction.targets[target] for target in wanted}
        said = ", ".join(f"{kl:.2g} nats at {target:g}" for target, kl in kept.items())
        found.append(f"The profile's tuning verified a KL of {said}.")
    return found


def _against(traffic: Traffic, prediction: Prediction, size: int) -> list[str]:
    found = []
    if traffic.visual_share == 0:
        found.append(
            "The recording has no visual token (Megatron's traces do not say which they are). All tokens "
            "count as text, whose load MACS bounds by score alone."
        )
    elif traffic.visual_share < FEW_VISUAL:
        found.append(
            "Hardly any token is visual. On text MACS is a balancer that drops the least-scored assignments."
        )
    if traffic.typical <= BALANCED:
        found.append("The ranks are balanced already: nothing to win without a target below the mean.")
    pays = prediction.pays_from.get(size, 0)
    median = float(np.median(traffic.tokens))
    if pays is None or median < (pays or 0):
        since = "at no size" if pays is None else f"from {pays} tokens a rank on"
        found.append(
            f"By balance alone a plan pays {since} (launched one by one; sooner in a CUDA graph); the median "
            f"step has {median:.0f}."
        )
    balance = prediction.of(size, f"macs {BALANCED:g}")["ratio"]
    replicated = [one for one in prediction.policies if "replica" in one]
    if replicated and prediction.of(size, replicated[0])["ratio"] < balance + WORTH:
        memory = prediction.of(size, replicated[0]).get("extra_bytes", 0.0) / 1e6
        found.append(
            f"{replicated[0]} comes as far as a bound of {BALANCED:g} and changes no answer, for "
            f"{memory:.0f} MB a layer and rank. Both together are possible."
        )
    found.append(
        "Pictures that must be read in full, such as dense text, stand no target far below the mean: tune on "
        "requests like your own, and look at the KL of each kind."
    )
    return found


def _commands(
    profile: Profile | None, named: Path | None, won: float, target: float
) -> list[tuple[str, str]]:
    settings: dict[str, object] = {}
    if profile is not None and profile.tuning is not None:
        within = profile.tuning.kl[:, 0]
        kl = MAX_KL if bool((within <= MAX_KL).any()) else float(within.min())
        settings = {"split": "tuned", "max_kl": kl}
    else:
        settings = {"target_load": BALANCED if won >= WORTH else target}
    flags = "".join(f" --moe-macs-{name.replace('_', '-')} {value}" for name, value in settings.items())
    if named is not None:
        flags += f" --moe-macs-profile {named}"
    block = {"macs": {**settings, **({} if named is None else {"profile": str(named)})}}
    found = [
        ("Megatron", f"... -m megatron_macs.launch SCRIPT --moe-macs --moe-macs-image-token-id ID{flags}"),
        ("DeepSpeed", json.dumps(block)),
    ]
    if profile is None or profile.tuning is None:
        cost = ("What a lower target costs in answers", "macs tune --model MODEL --data REQUESTS")
        found.insert(len(found) if won >= WORTH else 0, cost)  # first, where nothing else wins
    return found

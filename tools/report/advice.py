"""The verdict of a report: whether MACS pays on this traffic, the flags to use, and when not to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from macs import Profile

from .prediction import BALANCED, Prediction
from .simulation import EPLB
from .traffic import Traffic

WORTH = 0.02
"""Share of a MoE layer's time below which a prediction of this kind is noise."""

FEW_VISUAL = 0.05
MAX_KL = 0.002
LOSSY = 0.1
"""Dropped share of the combine weight above which nothing is recommended before its KL is measured."""


@dataclass(frozen=True)
class Advice:
    """verdict: one line; reasons: the figures behind it; against: when not to, on this traffic; commands:
    (title, lines)."""

    verdict: str
    reasons: list[str]
    against: list[str]
    commands: list[tuple[str, str]]


def nearest_size(traffic: Traffic, prediction: Prediction) -> int:
    """The predicted cluster size that is nearest to the recorded one."""
    return min(prediction.sizes, key=lambda size: abs(np.log2(size / traffic.ranks)))


def lowest(prediction: Prediction) -> str:
    """The policy with the lowest target: tuned, where the profile has a split for it."""
    ours = [one for one in prediction.policies if one.startswith("macs ")]
    least = min(float(one.split()[1]) for one in ours)
    return [one for one in ours if float(one.split()[1]) == least][-1]


def eplb_of(prediction: Prediction, size: int) -> dict[str, Any] | None:
    """EPLB's row, if it was predicted."""
    return prediction.of(size, EPLB) if EPLB in prediction.policies else None


def advise(traffic: Traffic, prediction: Prediction, profile: Profile | None, path: Path | None) -> Advice:
    """From the measured traffic and what was predicted for it; path: the profile's file."""
    size = nearest_size(traffic, prediction)
    recommended, verdict = _verdict(prediction, size)
    commands = _commands(prediction, size, profile, path) if recommended else []
    has_tuning = profile is not None and profile.tuning is not None
    if not has_tuning and 1 - prediction.of(size, lowest(prediction))["ratio"] >= WORTH:
        tune = ("KL of each target on your requests", "macs tune --model MODEL --data REQUESTS --out FILE")
        commands.insert(len(commands) if recommended else 0, tune)
    return Advice(verdict, _reasons(traffic, prediction), _against(traffic, prediction, size), commands)


def _verdict(prediction: Prediction, size: int) -> tuple[bool, str]:
    """Whether to turn MACS on, and why. What changes no answer comes first, an unmeasured loss last."""

    def row(target: float) -> dict[str, Any]:
        tuned = f"macs {target:g} tuned"
        return prediction.of(size, tuned if tuned in prediction.policies else f"macs {target:g}")

    low = float(lowest(prediction).split()[1])
    won, won_low = 1 - row(BALANCED)["ratio"], 1 - row(low)["ratio"]
    if max(won, won_low) < WORTH:
        return False, f"Not here: on {size} ranks no target wins {WORTH:.0%} of a MoE layer's time."
    predicted = [one for one in prediction.targets if f"macs {one:g}" in prediction.policies]
    verified = [t for t in predicted if prediction.targets[t] <= MAX_KL and 1 - row(t)["ratio"] >= WORTH]
    target = min(verified) if verified else BALANCED if won >= WORTH else low
    chosen = row(target)
    gain = (
        f"on {size} ranks a target of {target:g} wins {1 - chosen['ratio']:.0%} of a MoE layer's time and "
        f"drops {chosen['dropped_mass']:.0%} of the combine weight"
    )
    eplb = eplb_of(prediction, size)
    if eplb is not None and eplb["ratio"] < min(1, chosen["ratio"]) - WORTH:
        return False, (
            f"EPLB first: {EPLB.removeprefix('EPLB, ')} a rank takes {eplb['ratio']:.3f} of "
            f"vanilla's time and changes no answer, MACS at {target:g} {chosen['ratio']:.3f}; {gain}."
        )
    if verified:
        return True, f"Worth it: {gain}, with a verified KL of {prediction.targets[target]:.2g} nats."
    if predicted:
        return (
            False,
            f"Not as tuned: no target that wins time has a verified KL of {MAX_KL} nats; {gain}.",
        )
    if chosen["dropped_mass"] > LOSSY:
        return False, f"Measure first: {gain}. macs tune measures what that costs in answers."
    if won < WORTH:
        return True, f"Only below the mean: {gain}. macs tune measures what that costs in answers."
    return True, f"Worth it: {gain}."


def _reasons(traffic: Traffic, prediction: Prediction) -> list[str]:
    worst = traffic.percentiles()[2]
    median = float(np.median(traffic.tokens))
    found = [
        f"The load over {traffic.ranks} ranks is {traffic.typical:.2f} in the median step (mean of "
        f"{traffic.layers} layers) and {worst.max():.2f} at worst, p99 of layer {int(worst.argmax())}.",
        f"{traffic.visual_share:.0%} of the assignments are of visual tokens; the median step has "
        f"{median:.0f} tokens a rank.",
    ]
    if traffic.small:
        found.append(
            f"{traffic.small} of {traffic.small + traffic.steps} steps were small, as in decoding: left out."
        )
    if prediction.targets:
        each = ", ".join(f"{kl:.2g} nats at {target:g}" for target, kl in prediction.targets.items())
        found.append(f"The profile's tuning verified a KL of {each}.")
    return found


def _against(traffic: Traffic, prediction: Prediction, size: int) -> list[str]:
    found = []
    if traffic.visual_share == 0:
        found.append(
            "The recording has no visual token (Megatron's traces do not say which they are). All tokens "
            "count as text, which MACS drops by router score alone."
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
    balance, eplb = prediction.of(size, f"macs {BALANCED:g}"), eplb_of(prediction, size)
    if eplb is not None and eplb["ratio"] < 1 - WORTH:
        found.append(
            f"{eplb['policy']} a rank takes {eplb['ratio']:.3f} of vanilla's time and changes no answer, for "
            f"{eplb['extra_bytes'] / 1e6:.0f} MB a layer and rank; MACS at {BALANCED:g} takes "
            f"{balance['ratio']:.3f}. Both together are possible."
        )
    found.append(
        "Pictures that must be read in full, such as dense text, stand no target far below the mean: tune on "
        "requests like your own, and look at the KL of each task."
    )
    return found


def _commands(
    prediction: Prediction, size: int, profile: Profile | None, path: Path | None
) -> list[tuple[str, str]]:
    settings: dict[str, object] = {}
    if profile is not None and profile.tuning is not None:
        settings = {"split": "tuned", "max_kl": MAX_KL}
    else:
        pays = 1 - prediction.of(size, f"macs {BALANCED:g}")["ratio"] >= WORTH
        settings = {"target_load": BALANCED if pays else float(lowest(prediction).split()[1])}
    flags = "".join(f" --moe-macs-{name.replace('_', '-')} {value}" for name, value in settings.items())
    if path is not None:
        flags += f" --moe-macs-profile {path}"
    block = {"macs": {**settings, **({} if path is None else {"profile": str(path)})}}
    return [
        ("Megatron", f"... -m megatron_macs.launch SCRIPT --moe-macs --moe-macs-image-token-id ID{flags}"),
        ("DeepSpeed", json.dumps(block)),
    ]

"""Fit the cost figures in ``figures.json`` to the measurements that aiconfigurator-core publishes.

    pip install 'macs-moe[hardware]'
    python -m macs_tools.hardware.fit                # writes figures.json beside this file
    python -m macs_tools.hardware.fit --check        # and prints the errors on what a fit has not seen

aiconfigurator-core (Apache-2.0, github.com/ai-dynamo/aiconfigurator) holds times of single operations on
H100, H200 and B200 under TensorRT-LLM, vLLM and SGLang. A form of a few terms is fitted to each by least
squares of the logarithm; the coefficients are milliseconds a unit.

    MoE       t = c0 + c1 A D + c2 (D + F) sum n + sum over experts max(c3 D F [n > 0], c4 D F n)
              for A assignments of the tokens a rank has, n rows of each of its experts
    GEMM      t = c0 + c1 flops + c2 bytes; attention the same
    exchange  t = c0 + bytes / bandwidth, a token sent once to every rank (beyond a node: to every node)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .machine import ENGINES, FIGURES, moe_ms

PACKAGE = "aiconfigurator-core"
SYSTEMS = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm"}
VERSIONS = {"trtllm": "1.3.0rc20", "vllm": "0.24.0", "sglang": "0.5.14"}
EXCHANGE, BEYOND = "sglang/0.5.12", "sglang/0.5.6.post2"
"""Versions of the DeepEP tables: within a node by features and k; over 1, 2, 4 and 8 nodes at D 7168."""
SMS = 20  # of DeepEP, its default
DTYPES = {"bf16": "bfloat16", "fp8": "fp8_block"}
LEAST_TOKENS, DRAWS = 128, 16


def table(system: str, path: str) -> Any:
    """A table of the package as a data frame."""
    import pandas

    root = Path(str(importlib.metadata.distribution(PACKAGE).locate_file("aiconfigurator_core")))
    return pandas.read_parquet(root / "systems" / "data" / SYSTEMS[system] / f"{path}.parquet")


@cache
def rows_of_rank(tokens: int, experts: int, top_k: int, ranks: int, distribution: str) -> np.ndarray:
    """Rows of each expert on the rank with the most, [draws, experts of a rank].

    ``balanced``: even. ``power_law_A``: an expert's share is drawn from a power law of exponent A over
    1..0.8 T (0.01..2 for fewer assignments than experts), as the package's collector states it; no expert
    has more rows than there are tokens.
    """
    local = experts // ranks
    if distribution == "balanced":
        return np.full((1, local), tokens * top_k / experts)
    exponent = 1 - float(distribution.rsplit("_", 1)[1])
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    generator, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        uniform = generator.random(experts)
        rows = ((high**exponent - low**exponent) * uniform + low**exponent) ** (1 / exponent)
        rows *= tokens * top_k / rows.sum()
        while (over := np.maximum(rows - tokens, 0).sum()) > 0.5:
            rows = np.minimum(rows, tokens)
            rows[rows < tokens] += over / (rows < tokens).sum()
        by_rank = rows.reshape(ranks, local)
        found.append(by_rank[by_rank.sum(1).argmax()])
    return np.array(found)


def fitted(time: Callable[[np.ndarray], np.ndarray], start: list[float], measured: np.ndarray) -> list[float]:
    """Positive coefficients, so that ``time`` of them is near ``measured``; outliers count less."""
    from scipy.optimize import least_squares

    found = least_squares(
        lambda logs: np.log(time(np.exp(logs)) / measured), np.log(start), loss="soft_l1", f_scale=0.1
    )
    return [float(f"{value:.4g}") for value in np.exp(found.x)]


class Layers:
    """Measured MoE layers, a row each, and the time that coefficients give them."""

    def __init__(self, frame: Any) -> None:
        self.frame = frame
        self.measured = frame.latency.to_numpy()
        self.rows = [
            rows_of_rank(one.num_tokens, one.num_experts, one.topk, one.moe_ep_size, one.distribution)
            for one in frame.itertuples()
        ]

    def time(self, coefficients: Any) -> np.ndarray:
        return np.array(
            [
                moe_ms(coefficients, one.hidden_size, one.inter_size, one.num_tokens * one.topk, rows).mean()
                for one, rows in zip(self.frame.itertuples(), self.rows, strict=True)
            ]
        )

    def fit(self) -> list[float]:
        return fitted(self.time, [0.02, 1e-9, 1e-9, 1e-9, 1e-11], self.measured)

    def errors(self, coefficients: Any) -> np.ndarray:
        """Predicted over measured, its logarithm."""
        return np.log(self.time(coefficients) / self.measured)


def measured_layers(system: str, engine: str, dtype: str) -> Any:
    """Gated MoE layers without tensor parallelism, of sizes that multimodal models have."""
    frame = table(system, f"moe/{engine}/{VERSIONS[engine]}/moe_perf")
    kept = (frame.moe_dtype == DTYPES[dtype]) & (frame.moe_tp_size == 1) & (frame.moe_ep_size <= 32)
    kept &= (frame.num_tokens >= LEAST_TOKENS) & (frame.num_experts >= 32) & (frame.inter_size <= 3072)
    kept &= frame.topk.between(4, 10) & ~frame.kernel_source.str.contains("nongated|min_latency")
    return frame[kept]


def by_shape(frame: Any) -> Iterator[tuple[str, Any]]:
    for key, part in frame.groupby(["hidden_size", "inter_size", "num_experts", "topk"]):
        yield "x".join(map(str, key)), part


def _moe(system: str, engine: str, dtype: str) -> dict[str, list[float]]:
    """Coefficients by shape, D x F x E x k, and of all shapes together, "any"."""
    frame = measured_layers(system, engine, dtype)
    found = {"any": Layers(frame).fit()}
    return found | {shape: Layers(part).fit() for shape, part in by_shape(frame)}


def _linear(work: np.ndarray, moved: np.ndarray, measured: np.ndarray) -> list[float]:
    return fitted(lambda c: c[0] + c[1] * work + c[2] * moved, [4e-3, 2e-12, 3e-10], measured)


def gemm_terms(frame: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Operations and bytes of m x k times k x n, elements of ``size`` bytes, output in bfloat16."""
    work = 2.0 * frame.m * frame.n * frame.k
    return work.to_numpy(), (
        size * (frame.m * frame.k + frame.n * frame.k) + 2.0 * frame.m * frame.n
    ).to_numpy()


def _gemm(system: str, engine: str, dtype: str) -> list[float]:
    frame = table(system, f"gemm/{engine}/{VERSIONS[engine]}/gemm_perf")
    kept = (frame.gemm_dtype == DTYPES[dtype]) & (frame.m >= LEAST_TOKENS)
    frame = frame[kept & frame.n.between(256, 16384) & frame.k.between(256, 16384)]
    return _linear(*gemm_terms(frame, 2 if dtype == "bf16" else 1), frame.latency.to_numpy())


def _attention(system: str, engine: str) -> list[float]:
    """Of causal attention over whole prompts, head size 128."""
    frame = table(system, f"attention/{engine}/{VERSIONS[engine]}/context_attention_perf")
    total = frame.batch_size * frame.isl
    kept = (frame.kv_cache_dtype == "bfloat16") & (frame.attn_dtype == "bfloat16") & (frame.head_dim == 128)
    kept &= (frame.window_size == 0) & total.between(1024, 65536) & (frame.isl >= 256)
    frame = frame[kept & frame.num_heads.between(16, 64)]
    tokens = frame.batch_size * frame.isl
    work = 2.0 * tokens * frame.isl * frame.num_heads * 128
    moved = 4.0 * tokens * 128 * (frame.num_heads + frame.num_key_value_heads)
    return _linear(work.to_numpy(), moved.to_numpy(), frame.latency.to_numpy())


def _encoder_attention(system: str, engine: str) -> list[float]:
    """Of attention within pictures, head size 72."""
    frame = table(system, f"encoder_attention/{engine}/{VERSIONS[engine]}/encoder_attention_perf")
    kept = (frame.head_dim == 72) & (frame.num_heads >= 8) & (frame.isl >= 256)
    frame = frame[kept & (frame.batch_size * frame.isl <= 131072)]
    tokens = frame.batch_size * frame.isl * frame.num_heads * 72.0
    return _linear((4.0 * tokens * frame.isl).to_numpy(), (8.0 * tokens).to_numpy(), frame.latency.to_numpy())


def chance(parts: int, top_k: int) -> float:
    """That one of ``parts`` equal parts of the experts has one of a token's k."""
    return 1 - (1 - 1 / parts) ** top_k


def one_way_ms(frame: Any) -> np.ndarray:
    """Mean of dispatch and combine."""
    both = frame.dispatch_transmit_us + frame.dispatch_notify_us
    both = both + frame.combine_transmit_us + frame.combine_notify_us
    return (both / 2e3).to_numpy()


def inside_table(system: str) -> tuple[Any, np.ndarray]:
    """DeepEP's rows within a node of 8, and the bytes a rank receives, bfloat16."""
    frame = table(system, f"comm/{EXCHANGE}/wideep_deepep_normal_perf")
    frame = frame[(frame.dispatch_sms == SMS) & frame.num_token.between(LEAST_TOKENS, 32768)]
    frame = frame[(frame.num_topk >= 4) & (frame.num_experts >= 32)].dropna()
    copies = frame.num_token * 7 * [chance(8, k) for k in frame.num_topk]
    return frame, (2.0 * copies * frame.hidden_size).to_numpy()


def beyond_table(system: str) -> tuple[Any, np.ndarray]:
    """DeepEP's rows over several nodes, and the bytes a rank sends beyond its own, once to every node."""
    frame = table(system, f"comm/{BEYOND}/wideep_deepep_normal_perf")
    frame = frame[(frame.dispatch_sms == SMS) & (frame.node_num > 1) & frame.num_token.between(256, 32768)]
    copies = frame.num_token * [(nodes - 1) * chance(nodes, 8) for nodes in frame.node_num]
    return frame, (2.0 * copies * frame.hidden_size).to_numpy()


def _exchange(system: str) -> dict[str, float]:
    frame, moved = inside_table(system)
    latency, slope = fitted(lambda c: c[0] + c[1] * moved, [0.03, 1e-8], one_way_ms(frame))
    # Beyond a node only H100 and H200 were measured, and at 8 nodes twice as slow as at 2 and 4.
    frame, moved = beyond_table("h100" if system == "b200" else system)
    few = (frame.node_num <= 4).to_numpy()
    _, beyond = fitted(lambda c: c[0] + c[1] * moved[few], [0.06, 3e-8], one_way_ms(frame)[few])
    return {
        "latency_ms": latency,
        "inside_gbs": float(f"{1e-6 / slope:.4g}"),
        "beyond_gbs": float(f"{1e-6 / beyond:.4g}"),
    }


def fit() -> dict[str, Any]:
    """All figures."""
    devices: dict[str, Any] = {}
    for system in SYSTEMS:
        devices[system] = {"exchange": _exchange(system), "engines": {}}
        for engine in VERSIONS:
            devices[system]["engines"][engine] = {
                "moe": {dtype: _moe(system, engine, dtype) for dtype in DTYPES},
                "gemm": {dtype: _gemm(system, engine, dtype) for dtype in DTYPES},
                "attention": _attention(system, engine),
                "encoder_attention": _encoder_attention(system, engine),
            }
    source = {
        "package": PACKAGE,
        "version": importlib.metadata.version(PACKAGE),
        "licence": "Apache-2.0",
        "home": "https://github.com/ai-dynamo/aiconfigurator",
        "fitted": date.today().isoformat(),
        "engines": VERSIONS,
        "exchange": f"DeepEP of {EXCHANGE}, {SMS} SMs; beyond a node {BEYOND}",
    }
    return {"source": source, "devices": devices}


def _summary(errors: np.ndarray) -> str:
    return f"{np.median(abs(errors)):.1%} / {np.quantile(abs(errors), 0.9):.1%} / {errors.mean():+.1%}"


def check() -> Iterator[list[str]]:
    """Rows of a table: system, engine, and errors on what the fit had not seen, for Qwen3-VL-30B-A3B's layer
    in bfloat16: median / 90th percentile of its size / mean."""
    shape = "2048x768x128x8"
    for system in SYSTEMS:
        for engine in VERSIONS:
            frame = measured_layers(system, engine, "bf16")
            own = dict(by_shape(frame))[shape]
            others = frame.drop(own.index)
            left_out = [
                Layers(own[own.num_tokens == size]).errors(Layers(own[own.num_tokens != size]).fit())
                for size in sorted(own.num_tokens.unique())
            ]
            even = Layers(own[own.distribution == "balanced"]).fit()
            skewed = [
                Layers(own[(own.distribution == name) & (own.moe_ep_size > 1)]).errors(even)
                for name in ("power_law_1.01", "power_law_1.2")
            ]
            another = Layers(own).errors(Layers(others).fit())
            yield [system, ENGINES[engine], *map(_summary, (np.concatenate(left_out), *skewed, another))]


def check_exchange() -> Iterator[list[str]]:
    """Rows of a table: errors of the exchange by number of tokens left out, and by nodes."""
    for system in SYSTEMS:
        frame, moved = inside_table(system)
        measured, sizes = one_way_ms(frame), frame.num_token.to_numpy()
        errors = []
        for size in np.unique(sizes):
            kept, out = sizes != size, sizes == size
            latency, slope = fitted(lambda c, m=moved[kept]: c[0] + c[1] * m, [0.03, 1e-8], measured[kept])
            errors.append(np.log((latency + slope * moved[out]) / measured[out]))
        yield [system, "1", _summary(np.concatenate(errors))]
        if system == "b200":
            continue
        figures = _exchange(system)
        frame, moved = beyond_table(system)
        predicted = figures["latency_ms"] + moved / figures["beyond_gbs"] / 1e6
        for nodes in (2, 4, 8):
            there = (frame.node_num == nodes).to_numpy()
            yield [system, str(nodes), _summary(np.log(predicted[there] / one_way_ms(frame)[there]))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="errors on what a fit has not seen; takes minutes"
    )
    if parser.parse_args().check:
        heads = (
            "GPU",
            "engine",
            "token count left out",
            "fitted even: skew 1.01",
            "skew 1.2",
            "shape left out",
        )
        for row in ([*heads], *check(), ["GPU", "nodes", "exchange"], *check_exchange()):
            print("| " + " | ".join(row) + " |", flush=True)
        return
    text = json.dumps(fit(), indent=1)
    in_lines = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text)
    FIGURES.write_text(in_lines + "\n")
    print(FIGURES)


if __name__ == "__main__":
    main()

"""The dashboard and the alerts ask only for metrics that rv exports, in PromQL that parses."""

from __future__ import annotations

import re

import promql_parser
import pytest
from cluster_files import CLUSTER, documents, expressions

# The contract with the runtime. To be imported from the runtime's METRIC_NAMES.
COUNTERS = (
    "rv_read_bytes",
    "rv_written_bytes",
    "rv_pieces_done",
    "rv_pieces_retried",
    "rv_read_wait_seconds",
    "rv_compute_wait_seconds",
    "rv_write_wait_seconds",
)
# As Ray 2.60 exports them: seen at its metrics port.
EXPORTED = {f"ray_{name}_total" for name in COUNTERS} | {"ray_rv_progress_ratio"}
EXPRESSIONS = expressions()


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_expression_parses_and_names_our_metrics(where: str) -> None:
    expression = EXPRESSIONS[where]
    promql_parser.parse(expression)
    names = set(re.findall(r"\bray_\w+", expression))
    assert names
    assert names <= EXPORTED


def test_every_metric_is_shown() -> None:
    assert {name for e in EXPRESSIONS.values() for name in re.findall(r"\bray_\w+", e)} == EXPORTED


def test_scrape_config_reads_rays_own_list() -> None:
    (config,) = documents(CLUSTER / "prometheus" / "prometheus.yaml")
    assert config["rule_files"] == ["rules.yaml"]
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]  # noqa: S108

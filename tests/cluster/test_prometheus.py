"""The dashboard and the alerts ask only for metrics that rv exports, in PromQL that parses."""

from __future__ import annotations

import re

import promql_parser
import pytest
from cluster_files import CLUSTER, documents, expressions

from rv_distributed.runtime.on_ray.metrics import METRIC_NAMES

#: As Ray exports them: the gauge as it is, counters with an ending.
EXPORTED = {f"ray_{name}" if name.endswith("_ratio") else f"ray_{name}_total" for name in METRIC_NAMES}
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


def test_pod_monitor_reads_the_port_that_the_pods_name() -> None:
    (monitor,) = documents(CLUSTER / "prometheus" / "podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for path in sorted((CLUSTER / "kuberay").glob("ray*.yaml")):
        assert f"name: {endpoint['port']}, containerPort: 8080" in path.read_text()

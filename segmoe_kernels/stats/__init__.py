"""Routing statistics of a model: collected here, drawn by `plots`, written by `writers`."""

from segmoe_kernels.stats.collector import (
    RoutingCollector,
    collect_routing_stats,
    collect_routings,
)

__all__ = ["RoutingCollector", "collect_routing_stats", "collect_routings"]

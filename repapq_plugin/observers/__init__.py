"""Observers: how starting ranges are found. One idea a file, all on torch.ao's ``ObserverBase``."""

from repapq_plugin.observers.base import OBSERVERS, RangeObserver, RangeOptions, register_observer
from repapq_plugin.observers.histogram import HistogramRangeObserver
from repapq_plugin.observers.mae import MAEObserver
from repapq_plugin.observers.min_max import MinMaxObserver, PerChannelMinMaxObserver
from repapq_plugin.observers.mse import MSEObserver, PerChannelMSEObserver
from repapq_plugin.observers.percentile import PercentileObserver
from repapq_plugin.observers.range_search import SearchedRangeObserver

__all__ = [
    "OBSERVERS",
    "HistogramRangeObserver",
    "MAEObserver",
    "MSEObserver",
    "MinMaxObserver",
    "PerChannelMSEObserver",
    "PerChannelMinMaxObserver",
    "PercentileObserver",
    "RangeObserver",
    "RangeOptions",
    "SearchedRangeObserver",
    "register_observer",
]
